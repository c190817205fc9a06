//! The blocks that lives store: each block's key says which it is, and its bytes are made from its key.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use kvmp_core::ids::{BlockKey, GroupId};
use kvmp_core::namespace::{GroupRule, GroupSpec, NamespaceSpec, PartPlace, PartSpec, SlotLayout};
use kvmp_core::slot::PartSum;

/// Chains of a namespace: more than the arena holds, so that there is always something to evict.
pub const CHAINS: u64 = 40;
/// Blocks of a chain.
pub const LONGEST: u64 = 40;

/// A stream of numbers from a seed.
#[derive(Clone, Debug)]
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// A number below `n`.
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Two parts in slots of two pages, one part in slots of one: the two fight for chunks.
pub static SPECS: LazyLock<Vec<NamespaceSpec>> =
    LazyLock::new(|| vec![spec("two parts", &[320, 192]), spec("one part", &[512])]);

static LAYOUTS: LazyLock<Vec<SlotLayout>> =
    LazyLock::new(|| SPECS.iter().map(|spec| spec.slot_layout(GroupId(0))).collect());

/// How the parts of a namespace's blocks lie in their slots.
pub fn layout(namespace: u16) -> &'static SlotLayout {
    &LAYOUTS[usize::from(namespace)]
}

fn spec(model: &str, parts: &[u64]) -> NamespaceSpec {
    let part = |&bytes: &u64| PartSpec { bytes: vec![bytes], layout: serde_json::json!({ "bytes": bytes }) };
    NamespaceSpec {
        model: model.into(),
        facts: BTreeMap::new(),
        groups: vec![GroupSpec { rule: GroupRule::Prefix, block_tokens: 16, window_tokens: 0, hash_stride: 1 }],
        parts: parts.iter().map(part).collect(),
        salt: String::new(),
    }
}

/// One block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Block {
    pub namespace: u16,
    pub chain: u64,
    pub position: u64,
}

impl Block {
    /// The blocks of a chain, from its first on.
    pub fn chain(namespace: u16, chain: u64, len: u64) -> Vec<Self> {
        (0..len).map(|position| Self { namespace, chain, position }).collect()
    }

    fn number(self) -> u64 {
        1 + (u64::from(self.namespace) << 32 | self.chain << 16 | self.position)
    }

    /// Any eight bytes of another key in it make it no key at all.
    pub fn key(self) -> BlockKey {
        let words: [u64; 4] =
            std::array::from_fn(|i| if i == 0 { self.number() } else { mix(self.number() ^ (i as u64) << 56) });
        BlockKey(std::array::from_fn(|i| words[i / 8].to_le_bytes()[i % 8]))
    }

    /// Which block has this key.
    pub fn of(key: &BlockKey) -> Option<Self> {
        let number = u64::from_le_bytes(*key.0.first_chunk()?).checked_sub(1)?;
        let block = Self { namespace: (number >> 32) as u16, chain: number >> 16 & 0xffff, position: number & 0xffff };
        (block.key() == *key).then_some(block)
    }

    /// Parts with their numbers.
    pub fn parts(self) -> impl Iterator<Item = (u16, PartPlace)> {
        (0u16..).zip(layout(self.namespace).parts.iter().copied())
    }

    /// The bytes of a part.
    pub fn bytes(self, part: u16) -> Vec<u8> {
        let seed = mix(self.number() << 8 | u64::from(part));
        let mut bytes = vec![0; layout(self.namespace).parts[usize::from(part)].bytes as usize];
        for (word, i) in bytes.as_chunks_mut::<8>().0.iter_mut().zip(0u64..) {
            *word = (seed ^ i.wrapping_mul(0x9e37_79b9_7f4a_7c15)).to_le_bytes();
        }
        bytes
    }

    /// What a part's commit says of it.
    pub fn sum(self, part: u16) -> PartSum {
        let length = layout(self.namespace).parts[usize::from(part)].bytes as u32;
        PartSum { xxh3: mix(self.number() ^ u64::from(part) << 48), length, flags: PartSum::HAS_SUM }
    }
}
