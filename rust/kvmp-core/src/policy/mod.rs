//! Which block goes when room is needed.
//!
//! A policy is one file here, one line in [`POLICIES`] and one in the conformance suite
//! (`tests/policy_conformance.rs`). There is one instance a slot size.

mod lru;

pub use lru::Lru;

use crate::clock::Ticks;
use crate::geometry::Geometry;
use crate::ids::{ChunkId, SlotId};

/// What a policy would evict next, and how cold it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Victim {
    /// The block's slot.
    pub slot: SlotId,
    /// When it, or anything that hung on it, was last used: compares across policies of one store.
    pub last_use: Ticks,
}

/// Order in which the blocks of one slot size are evicted.
///
/// The caller guarantees:
/// - a slot is named only between [`add_chunk`](Self::add_chunk) and [`remove_chunk`](Self::remove_chunk)
///   of its chunk, and a chunk is removed only when none of its slots is tracked;
/// - a slot is tracked from [`insert`](Self::insert) to [`remove`](Self::remove), and every other call
///   names tracked slots only;
/// - a block is *evictable* when it is Ready, unpinned and has no resident child;
///   [`evictable`](Self::evictable) is called each time a block becomes so;
/// - a hit touches the last block of its run only; `heir` in `remove` hands a block's heat on to its
///   parent, so that a parent is never colder than what hung on it;
/// - `now` never goes back.
///
/// An implementor must:
/// - answer from [`coldest`](Self::coldest) only slots that are tracked and that `evictable` accepts,
///   and find one whenever there is one;
/// - decide by its calls alone (no clock, no randomness of its own), so that a run can be replayed;
/// - take amortised O(1), or O(log n), a call, and at most 24 bytes a slot.
pub trait EvictionPolicy: Send {
    /// Name in [`POLICIES`].
    fn name(&self) -> &'static str;

    /// `slots` slots of a chunk are this policy's from now on.
    fn add_chunk(&mut self, chunk: ChunkId, slots: u32);

    /// The chunk went to another slot size.
    fn remove_chunk(&mut self, chunk: ChunkId);

    /// A block was granted in `slot`.
    fn insert(&mut self, slot: SlotId, now: Ticks);

    /// A hit ended at this block.
    fn touch(&mut self, slot: SlotId, now: Ticks);

    /// The block left `slot`; `heir` is its parent, where it has one that is still resident.
    fn remove(&mut self, slot: SlotId, heir: Option<SlotId>);

    /// The block became evictable.
    fn evictable(&mut self, slot: SlotId);

    /// The block to evict next; it stays tracked until `remove`.
    fn coldest(&mut self, evictable: &dyn Fn(SlotId) -> bool) -> Option<Victim>;

    /// Whether a new block is worth a slot that another must leave.
    fn admits(&mut self, _now: Ticks) -> bool {
        true
    }

    /// Recomputes what the policy believes of itself; `tracked` are all tracked slots.
    fn validate(&self, tracked: &[SlotId], evictable: &dyn Fn(SlotId) -> bool) -> Result<(), String>;
}

/// Makes a policy for one slot size.
pub type PolicyFactory = fn(&Geometry) -> Box<dyn EvictionPolicy>;

/// Every policy by name.
pub const POLICIES: &[(&str, PolicyFactory)] = &[("lru", |geometry| Box::new(Lru::new(geometry)))];

/// No policy has this name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("there is no eviction policy {name:?}; did you mean {nearest:?}? (there are: {known})")]
pub struct UnknownPolicy {
    /// Name asked for.
    pub name: String,
    /// The name there is that is nearest to it.
    pub nearest: &'static str,
    /// All names.
    pub known: String,
}

/// The factory of a policy by its name.
pub fn factory(name: &str) -> Result<PolicyFactory, UnknownPolicy> {
    POLICIES.iter().find(|(known, _)| *known == name).map(|(_, make)| *make).ok_or_else(|| unknown(name))
}

/// A policy by its name, for the slots of `geometry`.
pub fn create(name: &str, geometry: &Geometry) -> Result<Box<dyn EvictionPolicy>, UnknownPolicy> {
    factory(name).map(|make| make(geometry))
}

fn unknown(name: &str) -> UnknownPolicy {
    let names = || POLICIES.iter().map(|(known, _)| *known);
    let nearest = names().min_by_key(|known| edit_distance(known, name)).unwrap_or_default();
    UnknownPolicy { name: name.to_owned(), nearest, known: names().collect::<Vec<_>>().join(", ") }
}

/// Levenshtein distance in characters.
fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_name_lists_what_there_is_and_the_nearest() {
        let error = factory("lur").err().unwrap();
        assert_eq!(error.nearest, "lru");
        assert_eq!(error.to_string(), "there is no eviction policy \"lur\"; did you mean \"lru\"? (there are: lru)");
    }

    #[test]
    fn edit_distance_counts_edits() {
        assert_eq!(edit_distance("lru", "lru"), 0);
        assert_eq!(edit_distance("lru", "lfu"), 1);
        assert_eq!(edit_distance("lru", ""), 3);
        assert_eq!(edit_distance("kitten", "sitting"), 3);
    }

    #[test]
    fn every_policy_answers_to_its_name() {
        let geometry = Geometry::new(4 << 20, None).unwrap();
        for (name, _) in POLICIES {
            assert_eq!(create(name, &geometry).unwrap().name(), *name);
        }
    }
}
