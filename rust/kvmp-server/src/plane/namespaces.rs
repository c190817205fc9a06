//! Open namespaces: their ids, digests and specs, and the table in the segment that outlives the server.

use std::collections::HashMap;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use kvmp_core::ids::NamespaceId;
use kvmp_core::namespace::NamespaceSpec;
use kvmp_core::segment::{MAX_SPEC_BYTES, NAMESPACES, NamespaceEntry};
use kvmp_core::wire::Refusal;
use rustix::fs::FallocateFlags;

use super::command::{Refused, refused};
use crate::segment::SegmentFile;

/// Namespaces that a new one is compared with: adapters and resets make thousands of one model.
const COMPARED: usize = 32;

struct Open {
    digest: [u8; 32],
    spec: Arc<NamespaceSpec>,
    /// Which opening of this server's it was.
    serial: u64,
}

/// The registry; `id -> spec`, found by digest.
pub(crate) struct Namespaces {
    segment: Arc<SegmentFile>,
    by_id: HashMap<NamespaceId, Open>,
    by_digest: HashMap<[u8; 32], NamespaceId>,
    /// Entries opened so far.
    opened: u64,
}

/// Bytes as hex digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

impl Namespaces {
    pub fn new(segment: Arc<SegmentFile>) -> Self {
        Self { segment, by_id: HashMap::new(), by_digest: HashMap::new(), opened: 0 }
    }

    pub fn len(&self) -> usize {
        self.by_id.len()
    }

    /// Parts of the namespace that has most.
    pub fn most_parts(&self) -> u16 {
        self.by_id.values().map(|open| open.spec.parts.len() as u16).max().unwrap_or(0)
    }

    /// Namespaces that an earlier server wrote; a spec that does not give its digest any more is dropped.
    pub fn recover(&mut self) -> Vec<(NamespaceId, Arc<NamespaceSpec>)> {
        let table = &self.segment.table;
        let mut found = Vec::new();
        for id in table.namespaces() {
            let spec = self.entry(id).and_then(|entry| {
                let spec = NamespaceSpec::from_json(&entry.spec).ok()?;
                (spec.digest() == entry.digest).then_some((entry.digest, Arc::new(spec)))
            });
            match spec {
                Some((digest, spec)) => found.push((id, digest, spec)),
                None => table.clear_namespace(id),
            }
        }
        for (id, digest, spec) in &found {
            self.remember(*id, *digest, Arc::clone(spec));
        }
        found.into_iter().map(|(id, _, spec)| (id, spec)).collect()
    }

    /// An entry as the file has it. Not through the mapping: damage may say that one is used which has no memory, and to
    /// touch it would take that from a file system that may have none left.
    fn entry(&self, id: NamespaceId) -> Option<NamespaceEntry> {
        let (at, len) = self.segment.table.layout().namespace_entry(u32::from(id.0));
        let mut place = vec![0; len as usize];
        self.segment.file().read_exact_at(&mut place, at).ok()?;
        NamespaceEntry::parse(&place)
    }

    /// The id of a digest, if it is open.
    pub fn find(&self, digest: &[u8; 32]) -> Option<NamespaceId> {
        self.by_digest.get(digest).copied()
    }

    /// The spec of an id.
    pub fn spec(&self, id: NamespaceId) -> Option<Arc<NamespaceSpec>> {
        self.by_id.get(&id).map(|open| Arc::clone(&open.spec))
    }

    /// The digest of an id, in hex.
    pub fn digest(&self, id: NamespaceId) -> Option<String> {
        self.by_id.get(&id).map(|open| hex(&open.digest))
    }

    /// An id that nobody has; `unused` says which open ones may be taken back when the table is full.
    pub fn free_id(&mut self, unused: impl Fn(NamespaceId) -> bool) -> Result<NamespaceId, Refused> {
        let mut ids = (0..NAMESPACES as u16).map(NamespaceId);
        if let Some(id) = ids.find(|id| !self.by_id.contains_key(id)) {
            return Ok(id);
        }
        let reused = self.by_id.keys().copied().filter(|&id| unused(id)).min();
        reused.ok_or_else(|| {
            refused(
                Refusal::Full,
                "all 4,096 namespaces have blocks or sessions; `kvmp clear` empties those without sessions",
            )
        })
    }

    /// Writes an entry, in the segment too.
    pub fn insert(&mut self, id: NamespaceId, spec: Arc<NamespaceSpec>) -> Result<(), Refused> {
        let json = spec.canonical_json();
        if json.len() > MAX_SPEC_BYTES {
            return Err(refused(
                Refusal::Namespace,
                format!("the namespace spec has {} bytes of JSON, {MAX_SPEC_BYTES} fit", json.len()),
            ));
        }
        let (at, len) = self.segment.table.layout().namespace_entry(u32::from(id.0));
        rustix::fs::fallocate(self.segment.file(), FallocateFlags::KEEP_SIZE, at, len).map_err(|e| {
            refused(
                Refusal::Full,
                format!("no memory for the namespace's entry ({e}); make room in the file system of the segment"),
            )
        })?;
        let digest = spec.digest();
        self.segment.table.set_namespace(id, &NamespaceEntry { digest, spec: json });
        self.remember(id, digest, spec);
        Ok(())
    }

    fn remember(&mut self, id: NamespaceId, digest: [u8; 32], spec: Arc<NamespaceSpec>) {
        self.opened += 1;
        self.by_digest.insert(digest, id);
        self.by_id.insert(id, Open { digest, spec, serial: self.opened });
    }

    /// Takes an entry back.
    pub fn remove(&mut self, id: NamespaceId) {
        if let Some(open) = self.by_id.remove(&id) {
            self.by_digest.remove(&open.digest);
            self.segment.table.clear_namespace(id);
        }
    }

    /// The fields in which a new spec differs from the one of the same model that differs least, of those opened last.
    pub fn nearest(&self, spec: &NamespaceSpec) -> Option<(NamespaceId, Vec<String>)> {
        let mut same_model: Vec<_> = self.by_id.iter().filter(|(_, open)| open.spec.model == spec.model).collect();
        same_model.sort_unstable_by_key(|(_, open)| std::cmp::Reverse(open.serial));
        let compared = same_model.into_iter().take(COMPARED);
        compared
            .map(|(id, open)| (*id, spec.differences(&open.spec)))
            .filter(|(_, d)| !d.is_empty())
            .min_by_key(|(id, d)| (d.len(), *id))
    }
}
