//! Two streams, one a direction, and the ways to move bytes on them.

use std::sync::{Arc, Mutex, PoisonError};

use kvmp_client::PartsAt;
use kvmp_client::copy::{check_load, check_store};
use kvmp_core::sync::{Ordering, fence};

use crate::batch::Copies;
use crate::end::{Asked, End};
use crate::gather::{Gather, Table};
use crate::plan::{DeviceLayout, Pair};
use crate::stream::{Event, Stream};
use crate::{Bell, CudaError, Device, Registered, Transfer};

/// Runs shorter than this are moved by the kernel: the copy engines take about 0.7 us a run on top of its bytes.
const GATHER_BELOW: usize = 512 << 10;

/// Which way bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From the GPU to the arena.
    Store,
    /// From the arena to the GPU.
    Load,
}

/// How bytes in registered memory are moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// By the copy engines, in one driver call.
    Batch,
    /// By the copy engines, in a driver call a run: drivers before 12.8.
    Single,
    /// By the gather kernel.
    Gather,
}

/// One copy.
#[derive(Debug)]
pub struct Order<'a> {
    /// Where the parts lie; kept until the copy has ended.
    pub at: PartsAt,
    /// Block of each part.
    pub blocks: &'a [u32],
    /// What of the arena the GPU knows.
    pub registered: &'a Arc<Registered>,
    /// Event (`CUevent`) behind which the copy goes: what wrote the blocks, or read them last.
    pub after: Option<u64>,
    /// Rung when the copy has ended.
    pub bell: Option<&'a Arc<Bell>>,
}

/// Blocks and their parts: by the kernel, by the copy engines, and those that CUDA does not know.
#[derive(Default)]
struct Parts {
    gathered: Vec<Pair>,
    registered: Vec<(u32, usize)>,
    unknown: Vec<(u32, usize)>,
}

/// Streams and kernel of one engine process.
#[derive(Debug)]
pub struct Lanes {
    layout: DeviceLayout,
    way: Way,
    gather: Option<Gather>,
    load: Stream,
    store: Stream,
    /// Events of copies that have ended, for the next ones.
    events: Mutex<Vec<Event>>,
    asked: Asked,
    device: Arc<Device>,
}

impl Lanes {
    /// Lanes for paged memory on `device`.
    ///
    /// `way` left out takes what is fastest for the layout's runs; `width` is how many multiprocessors the kernel may take.
    ///
    /// # Errors
    /// The driver refuses or, like the layout, has no such way.
    pub fn new(device: &Arc<Device>, layout: DeviceLayout, way: Option<Way>, width: u32) -> Result<Self, CudaError> {
        let (way, gather) = match way {
            Some(Way::Gather) => (Way::Gather, Some(Gather::new(device, &layout, width)?)),
            Some(Way::Batch) if !has_batches(device) => return Err(CudaError::NoBatches),
            Some(way) => (way, None),
            None => best(device, &layout, width),
        };
        Ok(Self {
            layout,
            way,
            gather,
            load: Stream::new(Arc::clone(device))?,
            store: Stream::new(Arc::clone(device))?,
            events: Mutex::default(),
            asked: Asked::default(),
            device: Arc::clone(device),
        })
    }

    /// How registered memory is moved.
    #[must_use]
    pub fn way(&self) -> Way {
        self.way
    }

    /// The paged memory.
    #[must_use]
    pub fn layout(&self) -> &DeviceLayout {
        &self.layout
    }

    /// Submits a copy. Nothing waits for it, but where the arena is not registered yet: those bytes go through the driver's
    /// own staging, and a store of them waits on the host for `after`.
    ///
    /// # Errors
    /// A block or part out of range or named twice, then no byte has moved; or the driver refuses, then the copy has ended
    /// and what it moved is garbage.
    ///
    /// # Safety
    /// Until the transfer has ended the layout's memory lives and nobody else touches the blocks (writes them, for a store);
    /// a store is under an open write lease of this server epoch; `after` is an event of this GPU or `None`.
    pub unsafe fn submit(self: &Arc<Self>, direction: Direction, order: Order<'_>) -> Result<Transfer, CudaError> {
        let pairs = order.at.pairs(self.layout.blocks(), order.blocks)?;
        let check = if direction == Direction::Store { check_store } else { check_load };
        check(self.layout.blocks(), order.at.view(), &pairs)?;
        let _here = self.device.enter()?;
        let stream = if direction == Direction::Store { &self.store } else { &self.load };
        // Release: no byte of a store may be seen by one who has not yet seen the slot granted.
        fence(Ordering::Release);
        // The table lives outside: where a later step fails, the kernel may be reading it.
        let mut table = None;
        // SAFETY: the caller's obligations, passed on; the parts were found to lie in the arena.
        let submitted = unsafe { self.enqueue(direction, &order, &pairs, stream, &mut table) };
        let end = Arc::new(End::new(order.bell.cloned()));
        match submitted.and_then(|()| self.marked(stream, &end)) {
            Ok(event) => {
                let (registered, lanes) = (Arc::clone(order.registered), Arc::clone(self));
                Ok(Transfer::new(event, end, table, order.at, registered, lanes))
            }
            Err(error) => {
                // Part of it may be under way: only when that has ended may the parts be another's.
                stream.finish();
                Err(error)
            }
        }
    }

    /// # Safety
    /// As [`Self::submit`], for `pairs` that were checked.
    unsafe fn enqueue(
        &self,
        direction: Direction,
        order: &Order<'_>,
        pairs: &[(u32, u64)],
        stream: &Stream,
        table: &mut Option<Table>,
    ) -> Result<(), CudaError> {
        if let Some(event) = order.after {
            stream.wait_for(event)?;
        }
        let parts = self.sorted(order, pairs);
        if let (Some(gather), false) = (&self.gather, parts.gathered.is_empty()) {
            let table = table.insert(gather.table(parts.gathered.len())?);
            // SAFETY: the caller's obligations, passed on.
            unsafe { gather.submit(direction, &parts.gathered, table, stream) }?;
        }
        let mut copies = Copies::new(direction, &self.layout, &parts.registered);
        if self.way == Way::Single {
            // SAFETY: the caller's obligations, passed on.
            unsafe { copies.submit_singly(stream) }?;
        } else {
            // SAFETY: the caller's obligations, passed on; these parts are registered.
            unsafe { copies.submit_together(stream) }?;
        }
        // SAFETY: the caller's obligations, passed on.
        unsafe { Copies::new(direction, &self.layout, &parts.unknown).submit_singly(stream) }
    }

    /// The pairs by how they are to be moved.
    fn sorted(&self, order: &Order<'_>, pairs: &[(u32, u64)]) -> Parts {
        let base = order.at.arena.as_ptr().addr();
        let mut parts = Parts::default();
        let seen = order.registered.locate(pairs.iter().map(|&(_, offset)| offset));
        for (&(block, offset), part) in pairs.iter().zip(seen) {
            match part {
                Some(part) if self.gather.is_some() => parts.gathered.push(Pair { part, block: u64::from(block) }),
                Some(_) => parts.registered.push((block, base + offset as usize)),
                None => parts.unknown.push((block, base + offset as usize)),
            }
        }
        parts
    }

    /// The event behind all that was submitted; its end will be told.
    fn marked(&self, stream: &Stream, end: &Arc<End>) -> Result<Event, CudaError> {
        let free = self.events.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let event = free.map_or_else(|| Event::new(Arc::clone(&self.device)), Ok)?;
        event.record(stream)?;
        stream.tell_at_end(end)?;
        Ok(event)
    }

    /// Takes back what a copy that has ended had.
    pub(crate) fn give_back(&self, event: Event, table: Option<Table>) {
        self.events.lock().unwrap_or_else(PoisonError::into_inner).push(event);
        if let (Some(gather), Some(table)) = (&self.gather, table) {
            gather.give_back(table);
        }
    }

    /// When the driver is asked how copies stand.
    pub(crate) fn asked(&self) -> &Asked {
        &self.asked
    }
}

fn has_batches(device: &Device) -> bool {
    device.has("cuMemcpyBatchAsync")
}

/// What is fastest for the layout's runs, of what this driver can do.
fn best(device: &Arc<Device>, layout: &DeviceLayout, width: u32) -> (Way, Option<Gather>) {
    if layout.run_bytes() < GATHER_BELOW {
        // Where the driver or the layout cannot have the kernel, there are the copy engines still.
        if let Ok(gather) = Gather::new(device, layout, width) {
            return (Way::Gather, Some(gather));
        }
    }
    (if has_batches(device) { Way::Batch } else { Way::Single }, None)
}
