//! Slots in the order of a key, by radix sort: with a million of them a comparison sort takes a quarter of a recovery.

use crate::ids::SlotId;

const DIGIT_BITS: u32 = 11;
const DIGITS: usize = 1 << DIGIT_BITS;

/// A slot and its key. Packed: what lists of a million slots cost is mostly the kernel's giving them pages.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(Rust, packed(4))]
pub(super) struct Keyed {
    pub key: u64,
    pub slot: SlotId,
}

const NONE: Keyed = Keyed { key: 0, slot: SlotId::NONE };

fn digit(key: u64, shift: u32) -> usize {
    key.wrapping_shr(shift) as usize % DIGITS
}

/// Puts slots in the order of their keys; what has the same key stays in order. `spare` is room to work in.
pub(super) fn sort(slots: &mut Vec<Keyed>, spare: &mut Vec<Keyed>) {
    let (all, any) = slots.iter().fold((u64::MAX, 0), |(all, any), slot| (all & slot.key, any | slot.key));
    // Bits that all share sort nothing: each digit begins at the next one that varies.
    let mut varies = all ^ any;
    while varies != 0 {
        let shift = varies.trailing_zeros();
        sort_by_digit(slots, spare, shift);
        varies &= !((DIGITS as u64 - 1) << shift);
    }
}

/// Groups slots by the highest digit of their keys' lowest `bits` bits; within a group they stay in order.
pub(super) fn group(slots: &mut Vec<Keyed>, spare: &mut Vec<Keyed>, bits: u32) {
    sort_by_digit(slots, spare, bits.saturating_sub(DIGIT_BITS));
}

fn sort_by_digit(slots: &mut Vec<Keyed>, spare: &mut Vec<Keyed>, shift: u32) {
    let mut places = [0; DIGITS];
    slots.iter().for_each(|slot| places[digit(slot.key, shift)] += 1);
    let mut before = 0;
    for place in &mut places {
        before += std::mem::replace(place, before);
    }
    spare.resize(slots.len(), NONE);
    for slot in slots.iter() {
        let place = &mut places[digit(slot.key, shift)];
        spare[*place] = *slot;
        *place += 1;
    }
    std::mem::swap(slots, spare);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keyed(masks: u64) -> Vec<Keyed> {
        let mix = |n: u32| u64::from(n).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(31);
        (0..5000).map(|n| Keyed { key: mix(n) & masks, slot: SlotId(n) }).collect()
    }

    #[test]
    fn the_order_is_that_of_a_stable_comparison_sort() {
        for mask in [0, 1, 0x7ff, 0xff_0000_0000, 0xf000_0000_0000_00f0, u64::MAX] {
            let (mut slots, mut expected) = (keyed(mask), keyed(mask));
            sort(&mut slots, &mut vec![NONE; 7]);
            expected.sort_by_key(|slot| slot.key);
            assert_eq!(slots, expected);
        }
        sort(&mut Vec::new(), &mut Vec::new());
    }

    #[test]
    fn groups_follow_the_low_bits() {
        for bits in [0, 5, 11, 16] {
            let (mut slots, mut expected) = (keyed(u64::MAX), keyed(u64::MAX));
            group(&mut slots, &mut Vec::new(), bits);
            expected.sort_by_key(|slot| digit(slot.key, bits.saturating_sub(DIGIT_BITS)));
            assert_eq!(slots, expected);
        }
    }
}
