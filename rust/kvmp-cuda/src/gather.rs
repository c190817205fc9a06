//! The gather kernel: many short runs moved by a few multiprocessors, straight to and from the registered mapping.

use std::ffi::CString;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::{result, sys};

use crate::error::Doing;
use crate::lanes::Direction;
use crate::plan::{DeviceLayout, Pair, Tile};
use crate::stream::Stream;
use crate::{CudaError, Device};

/// Made from gather.cu, see there; ends in NUL, as the driver wants it.
const PTX: &str = concat!(include_str!("gather.ptx"), "\0");

const THREADS: u32 = 512;
/// Threads of a warp.
const WARP: u32 = 32;
/// Pairs that a table has room for at least, and tables made at the start.
const TABLE_PAIRS: usize = 4096;
const TABLES: usize = 4;

/// The kernel with the layout's tiles on the GPU.
#[derive(Debug)]
pub(crate) struct Gather {
    device: Arc<Device>,
    module: sys::CUmodule,
    function: sys::CUfunction,
    /// Multiprocessors that it takes at most.
    width: u32,
    tiles: Buffer,
    tile_count: u32,
    /// Tables that no copy uses.
    tables: Mutex<Vec<Table>>,
}

// SAFETY: handles that may be used from any thread; what changes is behind the lock.
unsafe impl Send for Gather {}
// SAFETY: as above.
unsafe impl Sync for Gather {}

impl Gather {
    pub fn new(device: &Arc<Device>, layout: &DeviceLayout, width: u32) -> Result<Self, CudaError> {
        if layout.tiles().is_empty() {
            return Err(CudaError::NoVectors);
        }
        let _here = device.enter()?;
        // SAFETY: text that ends in NUL.
        let module = unsafe { result::module::load_data(PTX.as_ptr().cast()) }.doing("loading the gather kernel")?;
        // SAFETY: the module was just loaded.
        let function = unsafe { result::module::get_function(module, CString::from(c"kvmp_gather")) }
            .doing("finding the gather kernel")?;
        let tiles = Buffer::new(device, std::mem::size_of_val(layout.tiles()))?;
        // SAFETY: the buffer has just the room; the slice may go once the call, which waits, has returned.
        unsafe { result::memcpy_htod_sync(tiles.address, layout.tiles()) }.doing("describing the layout to the GPU")?;
        let tables = (0..TABLES).map(|_| Table::new(device, TABLE_PAIRS)).collect::<Result<_, _>>()?;
        Ok(Self {
            device: Arc::clone(device),
            module,
            function,
            width: width.max(1),
            tile_count: layout.tiles().len() as u32,
            tiles,
            tables: Mutex::new(tables),
        })
    }

    /// A table with the room for so many pairs; it goes back with [`Self::give_back`] once the copy has ended.
    ///
    /// One is made where none is free, also while the engine serves; it is kept, so there are never more than copies that
    /// were under way at once, for the usual ones 64 KiB on the GPU and as much pinned each.
    pub fn table(&self, pairs: usize) -> Result<Table, CudaError> {
        match self.free_table(pairs) {
            Some(table) => Ok(table),
            None => Table::new(&self.device, pairs.next_power_of_two().max(TABLE_PAIRS)),
        }
    }

    fn free_table(&self, pairs: usize) -> Option<Table> {
        let mut tables = self.tables.lock().unwrap_or_else(PoisonError::into_inner);
        tables.iter().position(|table| table.room >= pairs).map(|at| tables.swap_remove(at))
    }

    /// Takes back a table whose copy has ended.
    pub fn give_back(&self, table: Table) {
        self.tables.lock().unwrap_or_else(PoisonError::into_inner).push(table);
    }

    /// Moves all tiles of all pairs.
    ///
    /// # Safety
    /// The memory that layout and pairs name, and the table, live until the stream has run it.
    pub unsafe fn submit(
        &self,
        direction: Direction,
        pairs: &[Pair],
        table: &Table,
        stream: &Stream,
    ) -> Result<(), CudaError> {
        // SAFETY: the table has the room, and no other copy uses it.
        unsafe { table.host.cast::<Pair>().copy_from_nonoverlapping(pairs.as_ptr(), pairs.len()) };
        let bytes = std::mem::size_of_val(pairs);
        // SAFETY: both sides have the room and live with the table.
        unsafe { sys::cuMemcpyHtoDAsync_v2(table.device.address, table.host, bytes, stream.raw()) }
            .result()
            .doing("sending the copies' table")?;
        // SAFETY: the caller vouches for the memory named; table and tiles live.
        unsafe { self.launch(direction, table, pairs.len(), stream) }
    }

    /// # Safety
    /// As [`Self::submit`].
    unsafe fn launch(
        &self,
        direction: Direction,
        table: &Table,
        pairs: usize,
        stream: &Stream,
    ) -> Result<(), CudaError> {
        let mut items = pairs as u64 * u64::from(self.tile_count);
        let (mut tiles, mut tile_count, mut pairs) = (self.tiles.address, self.tile_count, table.device.address);
        let mut to_arena = u32::from(direction == Direction::Store);
        let mut arguments: [*mut std::ffi::c_void; 5] = [
            (&raw mut tiles).cast(),
            (&raw mut tile_count).cast(),
            (&raw mut pairs).cast(),
            (&raw mut items).cast(),
            (&raw mut to_arena).cast(),
        ];
        let wanted = items.div_ceil(u64::from(THREADS / WARP));
        let grid = (u64::from(self.width).min(wanted) as u32, 1, 1);
        // SAFETY: the arguments are the kernel's, in its order; the driver copies them before it returns.
        unsafe { result::launch_kernel(self.function, grid, (THREADS, 1, 1), 0, stream.raw(), &mut arguments) }
            .doing("launching the gather kernel")
    }
}

impl Drop for Gather {
    fn drop(&mut self) {
        let Ok(_here) = self.device.enter() else { return };
        // SAFETY: loaded once; no copy is under way, as each holds the lanes that hold this.
        let _ = unsafe { result::module::unload(self.module) };
    }
}

/// Memory on the GPU.
#[derive(Debug)]
struct Buffer {
    address: sys::CUdeviceptr,
    device: Arc<Device>,
}

impl Buffer {
    fn new(device: &Arc<Device>, bytes: usize) -> Result<Self, CudaError> {
        let _here = device.enter()?;
        // SAFETY: nothing is read before it was written.
        let address = unsafe { result::malloc_sync(bytes) }.doing("allocating on the GPU")?;
        Ok(Self { address, device: Arc::clone(device) })
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let Ok(_here) = self.device.enter() else { return };
        // SAFETY: allocated once; no kernel uses it any more.
        let _ = unsafe { result::free_sync(self.address) };
    }
}

/// The pairs of one copy: written in pinned memory, read on the GPU.
#[derive(Debug)]
pub(crate) struct Table {
    host: *mut std::ffi::c_void,
    device: Buffer,
    room: usize,
}

// SAFETY: pinned memory that only the table's owner touches.
unsafe impl Send for Table {}
// SAFETY: as above; shared, it is not touched at all.
unsafe impl Sync for Table {}

impl Table {
    fn new(device: &Arc<Device>, room: usize) -> Result<Self, CudaError> {
        let bytes = room * size_of::<Pair>();
        let buffer = Buffer::new(device, bytes)?;
        let _here = device.enter()?;
        // SAFETY: nothing is read before it was written.
        let host = unsafe { result::malloc_host(bytes, 0) }.doing("allocating pinned memory")?;
        Ok(Self { host, device: buffer, room })
    }
}

impl Drop for Table {
    fn drop(&mut self) {
        let Ok(_here) = self.device.device.enter() else { return };
        // SAFETY: allocated once; no copy reads it any more.
        let _ = unsafe { result::free_host(self.host) };
    }
}

const _: () = assert!(size_of::<Tile>() == 32 && size_of::<Pair>() == 16);
