//! A copy under way.

use std::sync::Arc;
use std::time::Instant;

use kvmp_client::PartsAt;

use crate::end::End;
use crate::gather::Table;
use crate::stream::Event;
use crate::{CudaError, Lanes, Registered};

/// Submitted, not yet known to have ended. Dropped before that, it waits: until then the GPU reads or writes the parts.
#[derive(Debug)]
pub struct Transfer {
    /// Goes back to the lanes with the transfer's end.
    event: Option<Event>,
    end: Arc<End>,
    table: Option<Table>,
    at: PartsAt,
    registered: Arc<Registered>,
    lanes: Arc<Lanes>,
}

impl Transfer {
    pub(crate) fn new(
        event: Event,
        end: Arc<End>,
        table: Option<Table>,
        at: PartsAt,
        registered: Arc<Registered>,
        lanes: Arc<Lanes>,
    ) -> Self {
        Self { event: Some(event), end, table, at, registered, lanes }
    }

    /// Whether the GPU has told that the last byte has moved: then neither a look nor a wait nor the drop calls the driver.
    #[must_use]
    pub fn is_told(&self) -> bool {
        self.end.is_told()
    }

    /// Whether the last byte has moved, as far as can be said without a call of the driver, which may wait for its lock.
    /// `None`: it is time to ask it ([`Self::has_ended`]), as it does not tell of a failure by itself.
    #[must_use]
    pub fn glance(&self) -> Option<bool> {
        if self.is_told() {
            return Some(true);
        }
        (!self.lanes.asked().is_due(Instant::now())).then_some(false)
    }

    /// Whether the last byte has moved.
    ///
    /// # Errors
    /// The GPU failed, which ends every copy: what this one moved is garbage.
    pub fn has_ended(&self) -> Result<bool, CudaError> {
        self.ask(Event::has_ended, true)
    }

    /// Sleeps until the last byte has moved.
    ///
    /// # Errors
    /// As [`Self::has_ended`].
    pub fn wait(&self) -> Result<(), CudaError> {
        self.ask(Event::wait, ())
    }

    /// What the driver says of the event; `ended` where the GPU has told already.
    fn ask<T>(&self, how: impl FnOnce(&Event) -> Result<T, CudaError>, ended: T) -> Result<T, CudaError> {
        match &self.event {
            Some(event) if !self.is_told() => how(event).inspect_err(|_| self.lanes.asked().failed()),
            _ => Ok(ended),
        }
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
        let _ = self.wait();
        if let Some(event) = self.event.take() {
            self.lanes.give_back(event, self.table.take());
        }
    }
}
