//! Identity: a namespace spec is everything that shapes KV bytes; its digest is what engines must share.
//!
//! The digest is SHA-256 over the spec and [`LAYOUT_VERSION`] as JSON with sorted keys, made here only.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::geometry::PAGE;
use crate::ids::{GroupId, PartId};

/// Most keys in one lookup or reserve, and most slots in one commit or abort.
pub const LOOKUP_MAX: u32 = 16_384;

/// Version of the slot and part layout; part of every digest and of the segment header.
pub const LAYOUT_VERSION: u32 = 2;
/// Alignment of a part within its slot, bytes.
pub const PART_ALIGN: u64 = 64;

/// Which blocks of a group a request needs to go on after a hit.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GroupRule {
    /// Every block from the first on (full attention).
    Prefix,
    /// The blocks of the last `window_tokens` tokens (sliding window).
    Window,
    /// The one block that ends at the hit (recurrent state).
    State,
}

/// One KV-cache group.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GroupSpec {
    /// Which blocks a hit needs.
    pub rule: GroupRule,
    /// Tokens in one block.
    pub block_tokens: u32,
    /// Tokens of the window, for `Window`.
    #[serde(default)]
    pub window_tokens: u32,
    /// This group's key is every `hash_stride`-th hash of a hash list.
    #[serde(default = "one")]
    pub hash_stride: u32,
}

fn one() -> u32 {
    1
}

/// What one rank writes of a slot.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PartSpec {
    /// Bytes of one block of each group, in the order of the groups.
    pub bytes: Vec<u64>,
    /// Canonical strides, dtypes and per-layer specs: what shapes this part's bytes.
    pub layout: Value,
}

/// Everything that shapes the bytes of a namespace's blocks.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NamespaceSpec {
    /// Model the KV was computed by; a digest of its weights belongs into `facts`.
    pub model: String,
    /// Every other thing that shapes the bytes.
    pub facts: BTreeMap<String, Value>,
    /// KV-cache groups.
    pub groups: Vec<GroupSpec>,
    /// Parts, one a writer.
    pub parts: Vec<PartSpec>,
    /// Fresh and random after a `reset_cache`, empty otherwise.
    #[serde(default)]
    pub salt: String,
}

/// Why a spec is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    /// Not JSON of the right shape.
    #[error("the namespace spec does not parse: {0}")]
    Parse(String),
    /// A field has a value that cannot be.
    #[error("namespace spec, {field}: {why}")]
    Field {
        /// Path of the field.
        field: String,
        /// What is wrong with it.
        why: String,
    },
}

/// Of no more than it takes to be told from what is allowed: it does not grow without end.
fn least_common_multiple(a: u64, b: u32) -> u64 {
    let (mut x, mut y) = (a, u64::from(b));
    while y > 0 {
        (x, y) = (y, x % y);
    }
    (a / x).saturating_mul(u64::from(b))
}

fn field(field: impl Into<String>, why: impl Into<String>) -> SpecError {
    SpecError::Field { field: field.into(), why: why.into() }
}

impl NamespaceSpec {
    /// Parses and checks a spec.
    pub fn from_json(text: &str) -> Result<Self, SpecError> {
        let spec: Self = serde_json::from_str(text).map_err(|e| SpecError::Parse(e.to_string()))?;
        spec.check()?;
        Ok(spec)
    }

    /// Checks what the types leave open: counts, sizes, and that the groups' hashes agree.
    pub fn check(&self) -> Result<(), SpecError> {
        if self.groups.is_empty() || self.groups.len() > 64 {
            return Err(field("groups", format!("{} groups, 1 to 64 are allowed", self.groups.len())));
        }
        if self.parts.is_empty() || self.parts.len() > 1024 {
            return Err(field("parts", format!("{} parts, 1 to 1024 are allowed", self.parts.len())));
        }
        for (i, group) in self.groups.iter().enumerate() {
            if group.block_tokens == 0 || group.hash_stride == 0 {
                return Err(field(format!("groups[{i}]"), "block_tokens and hash_stride must be at least 1"));
            }
            if (group.rule == GroupRule::Window) != (group.window_tokens > 0) {
                return Err(field(
                    format!("groups[{i}].window_tokens"),
                    "goes with rule \"window\", and must be at least 1",
                ));
            }
        }
        self.check_hashes()?;
        let hash_tokens = self.hash_tokens();
        for (i, group) in self.groups.iter().enumerate() {
            if Some(group.block_tokens) != hash_tokens.checked_mul(group.hash_stride) {
                return Err(field(
                    format!("groups[{i}].block_tokens"),
                    format!(
                        "{} is not hash_stride {} times the {hash_tokens} tokens of a hash",
                        group.block_tokens, group.hash_stride
                    ),
                ));
            }
        }
        for (i, part) in self.parts.iter().enumerate() {
            if part.bytes.len() != self.groups.len() {
                return Err(field(
                    format!("parts[{i}].bytes"),
                    format!("{} sizes for {} groups", part.bytes.len(), self.groups.len()),
                ));
            }
            if part.bytes.iter().any(|&b| b == 0 || b > u64::from(u32::MAX)) {
                return Err(field(format!("parts[{i}].bytes"), "each size must be from 1 byte to 4 GiB"));
            }
        }
        for g in 0..self.groups.len() {
            let total = self.slot_layout(GroupId(g as u16)).bytes;
            if total > u64::from(u32::MAX) {
                return Err(field("parts", format!("a block of group {g} takes {total} bytes, more than 4 GiB")));
            }
        }
        Ok(())
    }

    /// A hit is counted in tokens, in 32 bits, and is whole blocks of every group: a list must be able to hold one.
    fn check_hashes(&self) -> Result<(), SpecError> {
        let (most, hash_tokens) = (u32::MAX / LOOKUP_MAX, self.hash_tokens());
        if hash_tokens > most {
            return Err(field(
                "groups[0].block_tokens",
                format!("a hash of {hash_tokens} tokens, at most {most} may be"),
            ));
        }
        let common = self.groups.iter().fold(1, |common, group| least_common_multiple(common, group.hash_stride));
        if common > u64::from(LOOKUP_MAX) {
            return Err(field(
                "groups",
                format!("whole blocks of every group take {common} hashes, and a list has {LOOKUP_MAX} at most"),
            ));
        }
        Ok(())
    }

    /// Tokens that one hash of a hash list covers.
    #[must_use]
    pub fn hash_tokens(&self) -> u32 {
        self.groups.first().map_or(1, |g| g.block_tokens / g.hash_stride).max(1)
    }

    /// The spec as JSON with sorted keys.
    #[must_use]
    pub fn canonical_json(&self) -> String {
        // serde_json's map is a BTreeMap (no `preserve_order`), so a Value prints with sorted keys.
        serde_json::to_value(self).map(|v| v.to_string()).unwrap_or_default()
    }

    /// SHA-256 of the canonical JSON and the layout version.
    #[must_use]
    pub fn digest(&self) -> [u8; 32] {
        let mut hash = Sha256::new();
        hash.update(format!("kvmp layout {LAYOUT_VERSION}\n"));
        hash.update(self.canonical_json());
        hash.finalize().into()
    }

    /// Where the parts of a block of `group` lie in its slot.
    #[must_use]
    pub fn slot_layout(&self, group: GroupId) -> SlotLayout {
        let mut at = 0u64;
        let mut parts = Vec::with_capacity(self.parts.len());
        for part in &self.parts {
            let bytes = part.bytes.get(usize::from(group.0)).copied().unwrap_or(0);
            parts.push(PartPlace { offset: at, bytes });
            at = (at + bytes).next_multiple_of(PART_ALIGN);
        }
        // A page of the slot at least for each part: the table of parts has one place a page.
        let pages = at.div_ceil(PAGE).max(self.parts.len() as u64);
        SlotLayout { parts, bytes: at, pages: pages.min(u64::from(u32::MAX)) as u32 }
    }

    /// The fields in which two specs differ, as `path: ours, theirs`.
    #[must_use]
    pub fn differences(&self, other: &Self) -> Vec<String> {
        let mut out = Vec::new();
        let (a, b) = (serde_json::to_value(self), serde_json::to_value(other));
        if let (Ok(a), Ok(b)) = (a, b) {
            compare("", &a, &b, &mut out);
        }
        out
    }
}

fn compare(path: &str, a: &Value, b: &Value, out: &mut Vec<String>) {
    match (a, b) {
        (Value::Object(x), Value::Object(y)) => {
            let keys: std::collections::BTreeSet<_> = x.keys().chain(y.keys()).collect();
            for key in keys {
                let inner = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                compare(&inner, x.get(key).unwrap_or(&Value::Null), y.get(key).unwrap_or(&Value::Null), out);
            }
        }
        (Value::Array(x), Value::Array(y)) if x.len() == y.len() => {
            for (i, (p, q)) in x.iter().zip(y).enumerate() {
                compare(&format!("{path}[{i}]"), p, q, out);
            }
        }
        _ if a != b => out.push(format!("{path}: {a}, there {b}")),
        _ => {}
    }
}

/// Where one part lies in a slot.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PartPlace {
    /// Offset from the slot's first byte, a multiple of [`PART_ALIGN`].
    pub offset: u64,
    /// Length in bytes.
    pub bytes: u64,
}

/// Sizes of a slot of one group.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SlotLayout {
    /// Places of the parts.
    pub parts: Vec<PartPlace>,
    /// Bytes of all parts with their alignment.
    pub bytes: u64,
    /// 4 KiB pages of the slot.
    pub pages: u32,
}

impl SlotLayout {
    /// Place of a part.
    #[must_use]
    pub fn part(&self, part: PartId) -> Option<PartPlace> {
        self.parts.get(usize::from(part.0)).copied()
    }
}
