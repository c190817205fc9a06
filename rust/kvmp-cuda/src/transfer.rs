//! A copy under way.

use std::sync::Arc;

use kvmp_client::PartsAt;

use crate::gather::Table;
use crate::stream::Event;
use crate::{CudaError, Lanes, Registered};

/// Submitted, not yet known to have ended. Dropped before that, it waits: until then the GPU reads or writes the parts.
#[derive(Debug)]
pub struct Transfer {
    event: Event,
    table: Option<Table>,
    at: PartsAt,
    registered: Arc<Registered>,
    lanes: Arc<Lanes>,
}

impl Transfer {
    pub(crate) fn new(
        event: Event,
        at: PartsAt,
        registered: Arc<Registered>,
        lanes: Arc<Lanes>,
        table: Option<Table>,
    ) -> Self {
        Self { event, table, at, registered, lanes }
    }

    /// Whether the last byte has moved.
    ///
    /// # Errors
    /// The GPU failed, which ends every copy: what this one moved is garbage.
    pub fn has_ended(&self) -> Result<bool, CudaError> {
        self.event.has_ended()
    }

    /// Sleeps until the last byte has moved.
    ///
    /// # Errors
    /// As [`Self::has_ended`].
    pub fn wait(&self) -> Result<(), CudaError> {
        self.event.wait()
    }

    /// Where the parts lie.
    #[must_use]
    pub fn parts(&self) -> &PartsAt {
        &self.at
    }

    /// What was registered of the arena.
    #[must_use]
    pub fn registered(&self) -> &Arc<Registered> {
        &self.registered
    }
}

impl Drop for Transfer {
    fn drop(&mut self) {
        let _ = self.event.wait();
        if let Some(table) = self.table.take() {
            self.lanes.give_back(table);
        }
    }
}
