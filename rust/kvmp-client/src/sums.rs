//! Sums of parts with their lengths: which namespace and group a slot is of stands in its record.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use kvmp_core::ids::{PartId, SlotId};
use kvmp_core::segment::TableMap;
use kvmp_core::slot::PartSum;

use crate::error::input;
use crate::lease::record_of;
use crate::{ClientError, Namespace};

/// The namespaces that a client opened or joined, by number.
#[derive(Debug, Default)]
pub(crate) struct OpenedNamespaces(Mutex<HashMap<u16, Namespace>>);

impl OpenedNamespaces {
    fn lock(&self) -> MutexGuard<'_, HashMap<u16, Namespace>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn add(&self, namespace: &Namespace) {
        self.lock().insert(namespace.id(), namespace.clone());
    }

    /// A sum a slot. The commit's slot words show the server whether a record was another grant's meanwhile.
    pub fn part_sums(
        &self,
        table: &TableMap,
        part: u16,
        slots: &[u32],
        xxh3: &[u64],
    ) -> Result<Vec<PartSum>, ClientError> {
        if xxh3.len() != slots.len() {
            return Err(input("sums", format!("{} sums for {} slots", xxh3.len(), slots.len())));
        }
        let opened = self.lock();
        let sum = |(&slot, &xxh3)| {
            let length = part_bytes(&opened, table, part, slot).ok_or_else(|| unknown(slot, part))?;
            Ok(PartSum { xxh3, length, flags: PartSum::HAS_SUM })
        };
        slots.iter().zip(xxh3).map(sum).collect()
    }
}

fn unknown(slot: u32, part: u16) -> ClientError {
    input("slots", format!("slot {slot} is of no namespace joined here that has a part {part}; join it first"))
}

fn part_bytes(opened: &HashMap<u16, Namespace>, table: &TableMap, part: u16, slot: u32) -> Option<u32> {
    let identity = record_of(table, SlotId(slot))?.read().identity;
    let layout = opened.get(&identity.namespace.0)?.slot_layout(identity.group.0).ok()?;
    u32::try_from(layout.part(PartId(part))?.bytes).ok()
}
