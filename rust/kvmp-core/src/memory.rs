//! Vectors whose pages are there before they are filled: one call to the kernel instead of a fault for each page.

use rustix::mm::{Advice, madvise};

const PAGE: usize = 4096;
/// Below this a call costs more than the faults it saves.
const WORTH_A_CALL: usize = 12 << 10;
/// From here on, whole huge pages lie within.
const HUGE: usize = 4 << 20;

/// Room for `len` values, and the memory for it where that is much. What the kernel refuses comes by faults, as ever.
#[must_use]
pub(crate) fn with_memory<V>(len: usize) -> Vec<V> {
    let mut values = Vec::<V>::with_capacity(len);
    let room = std::mem::size_of_val(values.spare_capacity_mut());
    let begin = values.as_mut_ptr().cast::<u8>();
    let skipped = begin.align_offset(PAGE);
    let whole = room.saturating_sub(skipped) / PAGE * PAGE;
    if whole < WORTH_A_CALL {
        return values;
    }
    let first = begin.wrapping_add(skipped).cast();
    let huge = (room >= HUGE).then_some(Advice::LinuxHugepage);
    for advice in huge.into_iter().chain([Advice::LinuxPopulateWrite]) {
        // SAFETY: whole pages within the vector's own allocation; neither advice changes a byte.
        let _ = unsafe { madvise(first, whole, advice) };
    }
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_is_as_asked_and_the_values_are_ones_own() {
        for len in [0, 1, 1 << 10, 1 << 17, 1 << 20] {
            let mut values = with_memory::<u64>(len);
            assert!(values.is_empty() && values.capacity() >= len);
            values.resize(len, 7);
            assert!(values.iter().all(|value| *value == 7));
        }
        assert!(with_memory::<()>(1 << 30).is_empty());
    }
}
