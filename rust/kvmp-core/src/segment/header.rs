//! The first bytes of the file. The first 64 never change, whatever the layout version.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::layout::Layout;
use crate::geometry::{Geometry, GeometryError};
use crate::namespace::LAYOUT_VERSION;

const MAGIC: [u8; 8] = *b"KVMPSEG\0";

/// Identity of one segment inode: random, made with the file.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct SegmentId(pub [u8; 16]);

impl std::fmt::Display for SegmentId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl std::fmt::Debug for SegmentId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{self}")
    }
}

/// The header as it lies in the file.
#[derive(Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct SegmentHeader {
    magic: [u8; 8],
    /// Layout version of the file.
    pub layout_version: u32,
    header_bytes: u32,
    file_bytes: u64,
    chunk_bytes: u64,
    chunks: u32,
    reserved: u32,
    /// Kernel boot id: tmpfs does not outlive a boot.
    pub boot_id: [u8; 16],
    /// Boot-time clock in nanoseconds when the file was made; `touched` counts from here.
    pub made_ns: u64,
    /// Random identity of the inode.
    pub segment_id: [u8; 16],
    /// Which life of a server has the file.
    pub server_epoch: u64,
    /// That server's process id.
    pub server_pid: u64,
    /// Start time of that process in clock ticks since boot, to tell a reused pid.
    pub server_start: u64,
    /// Recoveries begun since the last that succeeded.
    pub recoveries_begun: u64,
}

/// The kernel's boot id: tmpfs does not outlive a boot, so neither does a segment.
pub fn boot_id() -> std::io::Result<[u8; 16]> {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let hex: String = text.chars().filter(char::is_ascii_hexdigit).collect();
    let id = u128::from_str_radix(&hex, 16).map_err(std::io::Error::other)?;
    Ok(id.to_be_bytes())
}

/// Why a file is not taken as a segment.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// Shorter than a header, or another magic.
    #[error("not a kvmp segment: {0}")]
    NotASegment(&'static str),
    /// Written by another layout version.
    #[error("segment layout version {found}, this build knows {LAYOUT_VERSION}")]
    Version {
        /// Version in the file.
        found: u32,
    },
    /// Made before this boot of the machine.
    #[error("the segment was made before the machine's last boot")]
    Boot,
    /// Sizes that do not fit each other.
    #[error("segment header says {header} bytes, its geometry gives {geometry}, the file has {file}")]
    Length {
        /// Length in the header.
        header: u64,
        /// Length that the geometry gives.
        geometry: u64,
        /// Length of the file.
        file: u64,
    },
    /// A geometry that cannot be.
    #[error("segment header: {0}")]
    Geometry(#[from] GeometryError),
}

impl SegmentHeader {
    /// Bytes of the header that hold these fields.
    pub const BYTES: usize = size_of::<Self>();

    /// Header of a new file.
    #[must_use]
    pub fn new(layout: &Layout, segment_id: SegmentId, boot_id: [u8; 16], made_ns: u64) -> Self {
        Self {
            magic: MAGIC,
            layout_version: LAYOUT_VERSION,
            header_bytes: Self::BYTES as u32,
            file_bytes: layout.file_bytes(),
            chunk_bytes: layout.geometry.chunk_bytes,
            chunks: layout.geometry.chunks,
            reserved: 0,
            boot_id,
            made_ns,
            segment_id: segment_id.0,
            server_epoch: 0,
            server_pid: 0,
            server_start: 0,
            recoveries_begun: 0,
        }
    }

    /// Checks what a file of `file_bytes` has in front, and gives its layout.
    pub fn check(&self, file_bytes: u64, boot_id: [u8; 16]) -> Result<Layout, HeaderError> {
        if self.magic != MAGIC {
            return Err(HeaderError::NotASegment("its first bytes are not KVMPSEG"));
        }
        if self.layout_version != LAYOUT_VERSION {
            return Err(HeaderError::Version { found: self.layout_version });
        }
        if self.boot_id != boot_id {
            return Err(HeaderError::Boot);
        }
        let arena = self.chunk_bytes.saturating_mul(u64::from(self.chunks));
        let layout = Layout::new(Geometry::new(arena, Some(self.chunk_bytes))?);
        if self.file_bytes != layout.file_bytes() || file_bytes != layout.file_bytes() {
            return Err(HeaderError::Length {
                header: self.file_bytes,
                geometry: layout.file_bytes(),
                file: file_bytes,
            });
        }
        Ok(layout)
    }

    /// Parses the first bytes of a file.
    pub fn parse(bytes: &[u8]) -> Result<Self, HeaderError> {
        Self::read_from_prefix(bytes).map(|(header, _)| header).map_err(|_| HeaderError::NotASegment("it is too short"))
    }
}

// The parked word has a cache line of its own behind the fields.
const _: () = assert!(SegmentHeader::BYTES as u64 <= super::layout::PARKED_OFFSET);

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> (Layout, SegmentHeader) {
        let layout = Layout::new(Geometry::new(8 << 20, None).unwrap());
        (layout, SegmentHeader::new(&layout, SegmentId([7; 16]), [1; 16], 5))
    }

    #[test]
    fn a_header_round_trips() {
        let (layout, header) = header();
        let again = SegmentHeader::parse(header.as_bytes()).unwrap();
        assert_eq!(again.check(layout.file_bytes(), [1; 16]), Ok(layout));
    }

    #[test]
    fn every_lie_is_named() {
        let (layout, good) = header();
        let len = layout.file_bytes();
        assert!(matches!(SegmentHeader::parse(&[0; 10]), Err(HeaderError::NotASegment(_))));
        assert!(matches!(
            SegmentHeader { magic: [0; 8], ..good }.check(len, [1; 16]),
            Err(HeaderError::NotASegment(_))
        ));
        assert_eq!(
            SegmentHeader { layout_version: 9, ..good }.check(len, [1; 16]),
            Err(HeaderError::Version { found: 9 })
        );
        assert_eq!(good.check(len, [2; 16]), Err(HeaderError::Boot));
        assert!(matches!(good.check(len - 1, [1; 16]), Err(HeaderError::Length { .. })));
        assert!(matches!(SegmentHeader { chunk_bytes: 5, ..good }.check(len, [1; 16]), Err(HeaderError::Geometry(_))));
        assert!(SegmentHeader { chunks: u32::MAX, chunk_bytes: u64::MAX, ..good }.check(len, [1; 16]).is_err());
    }
}
