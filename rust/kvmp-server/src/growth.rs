//! How the growth of the arena ended, for a person.

use kvmp_core::geometry::Geometry;

use crate::error::ServerError;
use crate::limits::Bound;
use crate::segment::backing::Ended;
use crate::size::Bytes;

/// Not even one chunk has room.
pub(crate) fn no_room(geometry: &Geometry, bound: Bound) -> ServerError {
    ServerError::NoRoom { chunk: geometry.chunk_bytes, what: bound.what, free: bound.free, mend: bound.mend }
}

/// One warning when the arena stays smaller than asked for; an error when there is nothing at all.
pub(crate) fn growth_ended(ended: Ended, backed: usize, geometry: &Geometry) -> Option<ServerError> {
    let have = Bytes(backed as u64 * geometry.chunk_bytes);
    let asked = Bytes(geometry.arena_bytes());
    match ended {
        Ended::Complete => {
            tracing::info!("all {asked} are backed");
            None
        }
        Ended::Stopped => None,
        Ended::NoRoom(bound) if backed == 0 => Some(no_room(geometry, bound)),
        Ended::NoRoom(bound) => {
            tracing::warn!(
                "the arena stays at {have} of {asked}: {} has {} free; {}",
                bound.what,
                Bytes(bound.free),
                bound.mend
            );
            None
        }
        Ended::Failed(source) if backed == 0 => {
            Some(ServerError::Os { what: "backing the first chunk".into(), source })
        }
        Ended::Failed(e) => {
            tracing::warn!("the arena stays at {have} of {asked}: {e}");
            None
        }
    }
}
