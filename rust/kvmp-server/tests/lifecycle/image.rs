//! A segment as a killed server left it, laid again as often as wanted, and damaged anew each time.

use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use kvmp_core::geometry::{Geometry, RECORD};
use kvmp_core::ids::ChunkId;
use kvmp_core::segment::{Layout, SegmentHeader};
use rustix::fs::{SeekFrom, seek};

/// Repeatable numbers without order (splitmix64).
pub struct Dice(pub u64);

impl Dice {
    pub fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ mixed >> 31) % sides
    }
}

/// What can be damaged.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Region {
    Header,
    NamespaceBits,
    Namespaces,
    ChunkWords,
    Records,
    /// The byte of a record's word that says Free, Writing or Ready.
    States,
    Sums,
}

impl Region {
    pub const ALL: [Self; 7] = [
        Self::Header,
        Self::NamespaceBits,
        Self::Namespaces,
        Self::ChunkWords,
        Self::Records,
        Self::States,
        Self::Sums,
    ];
}

/// Every byte of a segment that has memory, and the length of the whole.
pub struct Image {
    pub layout: Layout,
    extents: Vec<(u64, Vec<u8>)>,
    namespaces: u64,
}

impl Image {
    pub fn of(file: &File, geometry: Geometry, namespaces: u64) -> Self {
        let (mut at, mut extents) = (0, Vec::new());
        while let Ok(from) = seek(file, SeekFrom::Data(at)) {
            at = seek(file, SeekFrom::Hole(from)).unwrap();
            let mut bytes = vec![0; (at - from) as usize];
            file.read_exact_at(&mut bytes, from).unwrap();
            extents.push((from, bytes));
        }
        Self { layout: Layout::new(geometry), extents, namespaces }
    }

    /// Puts it under a path, as a new inode.
    pub fn lay(&self, path: &Path) -> File {
        let temporary = path.with_extension("laying");
        let file = File::options().read(true).write(true).create_new(true).mode(0o600).open(&temporary).unwrap();
        file.set_len(self.layout.file_bytes()).unwrap();
        self.extents.iter().for_each(|(at, bytes)| file.write_all_at(bytes, *at).unwrap());
        std::fs::rename(&temporary, path).unwrap();
        file
    }

    /// A place in a region, and how many bytes from there on are of it.
    fn place(&self, region: Region, dice: &mut Dice) -> (u64, u64) {
        let geometry = self.layout.geometry;
        let chunk = ChunkId(dice.roll(u64::from(geometry.chunks)) as u32);
        let (table, _) = self.layout.chunk_table(chunk);
        let slot = dice.roll(u64::from(geometry.chunk_pages()));
        match region {
            Region::Header => (0, SegmentHeader::BYTES as u64),
            Region::NamespaceBits => (512, 512),
            Region::Namespaces => (self.layout.namespace_entry(dice.roll(self.namespaces) as u32).0, 600),
            Region::ChunkWords => (self.layout.chunk_word(chunk), 8),
            Region::Records => (table + slot * RECORD, RECORD),
            Region::States => (table + slot * RECORD + 1, 1),
            Region::Sums => (table + u64::from(geometry.chunk_pages()) * RECORD + slot * 16, 16),
        }
    }

    /// Flips a bit, rolls a byte, or puts a small number or a neighbour's eight bytes in the place of eight.
    pub fn damage(&self, file: &File, region: Region, dice: &mut Dice) {
        let (from, len) = self.place(region, dice);
        let at = from + dice.roll(len);
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        let word = from + dice.roll(len.div_ceil(8)) * 8;
        match (region, dice.roll(4)) {
            (Region::States, _) => file.write_all_at(&[dice.roll(4) as u8], at).unwrap(),
            (_, 0) => file.write_all_at(&[byte[0] ^ 1 << dice.roll(8)], at).unwrap(),
            (_, 1) => file.write_all_at(&[dice.roll(256) as u8], at).unwrap(),
            (_, 2) => file.write_all_at(&dice.roll(8).to_ne_bytes(), word).unwrap(),
            _ => {
                let mut other = [0; 8];
                file.read_exact_at(&mut other, self.place(region, dice).0).unwrap();
                file.write_all_at(&other, word).unwrap();
            }
        }
    }
}
