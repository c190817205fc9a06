//! Namespaces as the store sees them: groups with their rules and slot sizes.

use std::ops::Range;

use crate::geometry::PAGE;
use crate::ids::{GroupId, NamespaceId, SlotId};
use crate::namespace::{GroupRule, NamespaceSpec};
use crate::slot::SlotWord;

use super::BlockStore;
use super::answers::StoreError;
use super::table::SlotTable;

/// One KV-cache group.
#[derive(Clone, Debug)]
pub(super) struct Group {
    pub rule: GroupRule,
    /// Hashes a block.
    pub stride: u32,
    /// Blocks of the window, for `Window`.
    pub window: u32,
    /// 4 KiB pages of a slot.
    pub pages: u32,
    /// Bytes of a block before rounding up.
    pub bytes: u32,
    /// Index of its slot size.
    pub class: usize,
}

/// One namespace.
#[derive(Clone, Debug)]
pub(super) struct Namespace {
    pub groups: Vec<Group>,
    pub parts: u16,
    /// Tokens of a hash.
    pub hash_tokens: u32,
    /// A hit's hashes are a multiple of this: whole blocks in every group.
    pub unit: u32,
    /// Slots that are not Free.
    pub slots: u64,
}

impl Group {
    /// Blocks that a hit of `hashes` hashes needs.
    pub fn needs(&self, hashes: usize) -> Range<usize> {
        let end = hashes / self.stride as usize;
        match self.rule {
            GroupRule::Prefix => 0..end,
            GroupRule::Window => end.saturating_sub(self.window as usize)..end,
            GroupRule::State => end.saturating_sub(1)..end,
        }
    }

    /// `None` if the blocks for a hit of `hashes` hashes are there; else fewer hashes, above which
    /// nothing fits this group.
    pub fn fits(&self, hashes: usize, found: &[(SlotId, SlotWord)]) -> Option<usize> {
        let blocks = self.needs(hashes);
        if blocks.end > found.len() {
            return Some(found.len() * self.stride as usize);
        }
        if self.rule == GroupRule::Prefix {
            return None;
        }
        let missing = found[blocks.clone()].iter().rposition(|(slot, _)| !slot.is_some())?;
        Some((blocks.start + missing) * self.stride as usize)
    }
}

fn gcd(a: u32, b: u32) -> u32 {
    if b == 0 { a } else { gcd(b, a % b) }
}

impl<T: SlotTable> BlockStore<T> {
    /// Makes a namespace known under the number that the header's table gave it.
    pub fn add_namespace(&mut self, id: NamespaceId, spec: &NamespaceSpec) -> Result<(), StoreError> {
        if self.namespace(id).is_ok() {
            return Err(StoreError::NamespaceExists(id));
        }
        for group in 0..spec.groups.len() {
            self.check_slot(GroupId(group as u16), spec)?;
        }
        let groups: Vec<Group> = (0..spec.groups.len()).map(|group| self.new_group(group, spec)).collect();
        let unit = groups.iter().fold(1, |unit, group| unit / gcd(unit, group.stride) * group.stride);
        let namespace =
            Namespace { groups, parts: spec.parts.len() as u16, hash_tokens: spec.hash_tokens(), unit, slots: 0 };
        let index = usize::from(id.0);
        self.namespaces.resize(self.namespaces.len().max(index + 1), None);
        self.namespaces[index] = Some(namespace);
        Ok(())
    }

    fn check_slot(&self, group: GroupId, spec: &NamespaceSpec) -> Result<(), StoreError> {
        let slot_bytes = u64::from(spec.slot_layout(group).pages) * PAGE;
        let chunk_bytes = self.config.geometry.chunk_bytes;
        if slot_bytes <= chunk_bytes {
            return Ok(());
        }
        Err(StoreError::SlotTooLarge { group, slot_bytes, chunk_bytes, mend: slot_bytes.next_power_of_two() })
    }

    fn new_group(&mut self, id: usize, spec: &NamespaceSpec) -> Group {
        let (group, layout) = (&spec.groups[id], spec.slot_layout(GroupId(id as u16)));
        Group {
            rule: group.rule,
            stride: group.hash_stride,
            window: group.window_tokens.div_ceil(group.block_tokens),
            pages: layout.pages,
            bytes: layout.bytes as u32,
            class: self.class_of(layout.pages),
        }
    }

    pub(super) fn namespace(&self, id: NamespaceId) -> Result<&Namespace, StoreError> {
        self.namespaces.get(usize::from(id.0)).and_then(Option::as_ref).ok_or(StoreError::NoNamespace(id))
    }

    pub(super) fn namespace_group(&self, id: NamespaceId, group: GroupId) -> Result<&Group, StoreError> {
        let groups = &self.namespace(id)?.groups;
        let missing = StoreError::NoGroup { namespace: id, group, groups: groups.len() };
        groups.get(usize::from(group.0)).ok_or(missing)
    }

    /// Slots of a namespace that are not Free; 0 if it is not there.
    #[must_use]
    pub fn slots_of(&self, id: NamespaceId) -> u64 {
        self.namespace(id).map_or(0, |namespace| namespace.slots)
    }

    /// Forgets a namespace without slots.
    pub fn remove_namespace(&mut self, id: NamespaceId) -> Result<(), StoreError> {
        match self.namespace(id)?.slots {
            0 => {
                self.namespaces[usize::from(id.0)] = None;
                Ok(())
            }
            slots => Err(StoreError::NamespaceInUse { namespace: id, slots }),
        }
    }
}
