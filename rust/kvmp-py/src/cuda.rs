//! `CudaLanes`: begins copies between a GPU and the arena.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvmp_cuda::{CudaError, Device, DeviceLayout, Direction, Lanes, Order, Registered, Registration, Way};
use pyo3::prelude::*;

use crate::arguments::list;
use crate::bell::Bell;
use crate::blocks::block_ids;
use crate::client::Client;
use crate::errors::{Class, OrRaise, from_client, invalid, raise};
use crate::layout::BlockLayout;
use crate::namespace::Namespace;
use crate::numbers::{integer, name, optional};
use crate::transfer::{Transfer, drop_detached};

/// The one place that turns what a GPU refuses into Python's exceptions.
pub fn from_cuda(py: Python<'_>, error: &CudaError) -> PyErr {
    match error {
        CudaError::Input(error) => from_client(py, error),
        other => raise(py, Class::Device, other.to_string()),
    }
}

/// Two streams of a GPU, one a direction, for paged memory on it.
#[pyclass(frozen, module = "kvmp._kvmp")]
pub struct CudaLanes {
    inner: Arc<Lanes>,
    device: Arc<Device>,
    /// Of the arena used last.
    registration: Mutex<Option<Registration>>,
}

fn way_of(py: Python<'_>, way: &str) -> PyResult<Way> {
    match way {
        "batch" => Ok(Way::Batch),
        "single" => Ok(Way::Single),
        "gather" => Ok(Way::Gather),
        other => Err(invalid(py, "way", format!("{other:?} is none of \"batch\", \"single\", \"gather\""))),
    }
}

impl CudaLanes {
    fn lock(&self) -> MutexGuard<'_, Option<Registration>> {
        self.registration.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn registered(&self, py: Python<'_>, client: &Client) -> PyResult<Arc<Registered>> {
        client.inner.arena().or_raise(py)?;
        let arena = client.inner.keep_arena();
        let arena = arena.ok_or_else(|| raise(py, Class::ServerLost, "the client was closed"))?;
        let mut registration = self.lock();
        match &*registration {
            Some(registration) if registration.is_of(&arena) => Ok(Arc::clone(registration.registered())),
            _ => {
                let fresh = Registration::start(Arc::clone(&self.device), arena);
                let registered = Arc::clone(fresh.registered());
                if let Some(before) = registration.replace(fresh) {
                    before.retire();
                }
                Ok(registered)
            }
        }
    }

    fn submit(&self, py: Python<'_>, direction: Direction, copy: &Copy<'_, '_>) -> PyResult<Transfer> {
        let blocks = block_ids(copy.block_ids, self.inner.layout().blocks().num_blocks())?;
        let slots = list::<u32>(copy.slots, "slots")?;
        let registered = self.registered(py, copy.client)?;
        let at = copy.client.inner.parts_at(&copy.namespace.inner, copy.group, &slots).or_raise(py)?;
        let bell = copy.bell.map(|bell| &bell.inner);
        let order = Order { at, blocks: &blocks, registered: &registered, after: copy.after, bell };
        // SAFETY: Python's caller vouches for the memory that the layout names (it holds the tensors), for the event and for
        // the lease.
        let transfer = py.detach(|| unsafe { self.inner.submit(direction, order) });
        transfer.map(Transfer::new).map_err(|error| from_cuda(py, &error))
    }
}

/// Arguments that a store and a load have in common.
struct Copy<'a, 'py> {
    client: &'a Client,
    namespace: &'a Namespace,
    group: u16,
    block_ids: &'a Bound<'py, PyAny>,
    slots: &'a Bound<'py, PyAny>,
    after: Option<u64>,
    bell: Option<&'a Bell>,
}

#[pymethods]
impl CudaLanes {
    /// Lanes for the memory that `layout` describes. `way`: "batch" (copy engines, one driver call), "single" (one call a
    /// run) or "gather" (a kernel on `width` multiprocessors); None takes what is fastest for the layout's runs.
    #[new]
    #[pyo3(signature = (layout, way=None, width=16))]
    fn new(
        py: Python<'_>,
        layout: &BlockLayout,
        way: Option<&str>,
        #[pyo3(from_py_with = integer::<name::Width, _>)] width: u32,
    ) -> PyResult<Self> {
        let ordinal = layout.device.ok_or_else(|| invalid(py, "layout", "its memory is the host's, not a GPU's"))?;
        let way = way.map(|way| way_of(py, way)).transpose()?;
        let blocks = layout.inner.clone();
        let opened = py.detach(|| {
            let device = Device::open(ordinal)?;
            Lanes::new(&device, DeviceLayout::new(blocks), way, width).map(|lanes| (device, lanes))
        });
        let (device, lanes) = opened.map_err(|error| from_cuda(py, &error))?;
        Ok(Self { inner: Arc::new(lanes), device, registration: Mutex::default() })
    }

    /// How registered memory is moved: "batch", "single" or "gather".
    #[getter]
    fn way(&self) -> &'static str {
        match self.inner.way() {
            Way::Batch => "batch",
            Way::Single => "single",
            Way::Gather => "gather",
        }
    }

    /// Begins to make the client's arena known to CUDA, in the background; an arena that is known already stays so.
    fn register(&self, py: Python<'_>, client: &Client) -> PyResult<()> {
        self.registered(py, client).map(drop)
    }

    /// Lets go of the client's arena, also of a closed client's: it is unregistered and unmapped in the background, once no
    /// copy of it is under way. An arena that is not known is none to let go of.
    fn unregister(&self, client: &Client) {
        let Some(arena) = client.inner.keep_arena() else { return };
        let registration = self.lock().take_if(|registration| registration.is_of(&arena));
        if let Some(registration) = registration {
            registration.retire();
        }
    }

    /// Of the arena used last: (bytes registered so far, bytes of the arena, why there will be no more or None).
    fn registration(&self) -> (u64, u64, Option<String>) {
        let registration = self.lock();
        let registered = registration.as_ref().map(Registration::registered);
        registered.map_or((0, 0, None), |of| (of.bytes(), of.arena_bytes(), of.failure()))
    }

    /// Submits a copy of blocks into this client's part of slots, behind the event `after` (a `CUevent`; None: at once).
    ///
    /// block_ids int64 `(n,)`, slots uint32 `(n,)`. Commit only once the transfer has ended. An open write lease of the
    /// namespace's server epoch must cover the slots; `server_epoch`, where given, is the lease's and is compared.
    #[pyo3(signature = (client, namespace, group, block_ids, slots, after=None, bell=None, server_epoch=None))]
    #[expect(clippy::too_many_arguments, reason = "arguments of Python")]
    fn store(
        &self,
        py: Python<'_>,
        client: &Client,
        namespace: &Namespace,
        #[pyo3(from_py_with = integer::<name::Group, _>)] group: u16,
        block_ids: &Bound<'_, PyAny>,
        slots: &Bound<'_, PyAny>,
        #[pyo3(from_py_with = optional::<name::After, _>)] after: Option<u64>,
        bell: Option<&Bell>,
        #[pyo3(from_py_with = optional::<name::ServerEpoch, _>)] server_epoch: Option<u64>,
    ) -> PyResult<Transfer> {
        server_epoch.map_or(Ok(()), |epoch| client.inner.check_epoch(epoch)).or_raise(py)?;
        client.inner.check_writes().or_raise(py)?;
        self.submit(py, Direction::Store, &Copy { client, namespace, group, block_ids, slots, after, bell })
    }

    /// Submits a copy of this client's part of slots into blocks, behind the event `after`. Once the transfer has ended,
    /// `Client.check` says whether each slot was the one leased; where not, the block holds garbage.
    ///
    /// block_ids int64 `(n,)`, slots uint32 `(n,)`.
    #[pyo3(signature = (client, namespace, group, block_ids, slots, after=None, bell=None))]
    #[expect(clippy::too_many_arguments, reason = "arguments of Python")]
    fn load(
        &self,
        py: Python<'_>,
        client: &Client,
        namespace: &Namespace,
        #[pyo3(from_py_with = integer::<name::Group, _>)] group: u16,
        block_ids: &Bound<'_, PyAny>,
        slots: &Bound<'_, PyAny>,
        #[pyo3(from_py_with = optional::<name::After, _>)] after: Option<u64>,
        bell: Option<&Bell>,
    ) -> PyResult<Transfer> {
        self.submit(py, Direction::Load, &Copy { client, namespace, group, block_ids, slots, after, bell })
    }
}

impl Drop for CudaLanes {
    fn drop(&mut self) {
        let registration = self.registration.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        drop_detached(registration);
    }
}
