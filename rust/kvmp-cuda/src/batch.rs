//! Copies by the copy engines: one driver call for all of them, or one each.

use cudarc::driver::sys;

use crate::CudaError;
use crate::error::Doing;
use crate::lanes::Direction;
use crate::plan::DeviceLayout;
use crate::stream::Stream;

/// Parallel arrays, as the driver takes them.
#[derive(Default)]
pub(crate) struct Copies {
    from: Vec<sys::CUdeviceptr>,
    to: Vec<sys::CUdeviceptr>,
    bytes: Vec<usize>,
}

impl Copies {
    /// Every run of every block; `parts` are (block id, host address of its part).
    pub fn new(direction: Direction, layout: &DeviceLayout, parts: &[(u32, usize)]) -> Self {
        let runs = layout.blocks().runs();
        let mut copies = Self::default();
        for list in [&mut copies.from, &mut copies.to] {
            list.reserve_exact(parts.len() * runs.len());
        }
        copies.bytes.reserve_exact(parts.len() * runs.len());
        for &(block, part) in parts {
            for run in runs {
                let paged = run.addr.wrapping_add_signed(run.block_stride.wrapping_mul(block as isize)) as u64;
                let arena = (part + run.part_offset) as u64;
                let (from, to) = if direction == Direction::Store { (paged, arena) } else { (arena, paged) };
                copies.from.push(from);
                copies.to.push(to);
                copies.bytes.push(run.len);
            }
        }
        copies
    }

    /// One call for all.
    ///
    /// # Safety
    /// All memory named lives until the stream has run them; the host's is registered.
    pub unsafe fn submit_together(&mut self, stream: &Stream) -> Result<(), CudaError> {
        if self.bytes.is_empty() {
            return Ok(());
        }
        let mut attributes = in_stream_order();
        let (mut first, mut failed) = (0usize, 0usize);
        // SAFETY: three arrays of one length, one attribute that starts at copy 0; the caller vouches for the memory.
        unsafe {
            sys::cuMemcpyBatchAsync(
                self.to.as_mut_ptr(),
                self.from.as_mut_ptr(),
                self.bytes.as_mut_ptr(),
                self.bytes.len(),
                &raw mut attributes,
                &raw mut first,
                1,
                &raw mut failed,
                stream.raw(),
            )
        }
        .result()
        .doing("a batch of copies")
    }

    /// One call each: where the driver has no batches, and for memory that is not registered.
    ///
    /// # Safety
    /// All memory named lives until the stream has run them.
    pub unsafe fn submit_singly(&self, stream: &Stream) -> Result<(), CudaError> {
        for ((&to, &from), &bytes) in self.to.iter().zip(&self.from).zip(&self.bytes) {
            // SAFETY: the caller vouches for both ranges; addresses are unified, so the driver knows the direction.
            unsafe { sys::cuMemcpyAsync(to, from, bytes, stream.raw()) }.result().doing("a copy")?;
        }
        Ok(())
    }
}

/// Sources are read when the stream comes to the copy, and not before.
fn in_stream_order() -> sys::CUmemcpyAttributes {
    let anywhere = sys::CUmemLocation { type_: sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_INVALID, id: 0 };
    sys::CUmemcpyAttributes {
        srcAccessOrder: sys::CUmemcpySrcAccessOrder::CU_MEMCPY_SRC_ACCESS_ORDER_STREAM,
        srcLocHint: anywhere,
        dstLocHint: anywhere,
        // 64 KiB runs beside matrix products: 30 ms a GiB with it, 36 without (H200); longer runs alike.
        flags: sys::CUmemcpyFlags::CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE as u32,
    }
}
