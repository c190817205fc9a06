//! The segment's file, looked at now and then: what somebody else has done to it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::error::ServerError;
use crate::segment::{FileState, SegmentFile};

/// Between two looks.
pub(super) const LOOK: Duration = Duration::from_millis(500);

/// Notices a file that was removed (the server goes on) or made shorter, for good or for a moment (it cannot).
pub(super) struct FileWatch {
    segment: Arc<SegmentFile>,
    next: Instant,
    is_missed: bool,
}

impl FileWatch {
    pub fn new(segment: Arc<SegmentFile>) -> Self {
        Self { segment, next: Instant::now(), is_missed: false }
    }

    /// An error, when the server cannot go on. From then on nothing of it touches the file any more.
    pub fn look(&mut self) -> Option<ServerError> {
        if Instant::now() < self.next {
            return None;
        }
        self.next = Instant::now() + LOOK;
        match self.segment.state() {
            FileState::AsItWas => {}
            FileState::Removed => self.missed("was removed"),
            FileState::Replaced => self.missed("was replaced by another file"),
            FileState::Shorter { bytes, of } => {
                self.let_go();
                return Some(ServerError::Shortened { path: self.segment.path().to_owned(), bytes, of });
            }
            FileState::Hollow => {
                self.let_go();
                // It has its length: the next start would take zeroes for blocks.
                self.segment.unlink();
                return Some(ServerError::Hollow { path: self.segment.path().to_owned() });
            }
        }
        None
    }

    /// Said once.
    fn missed(&mut self, what: &str) {
        if !std::mem::replace(&mut self.is_missed, true) {
            tracing::warn!(
                "{} {what} from outside: this server and its clients go on, but nothing of the cache will be there for the \
                 next start",
                self.segment.path().display()
            );
        }
    }

    fn let_go(&self) {
        if let Err(e) = self.segment.sever() {
            tracing::error!("letting go of the segment: {e}");
        }
    }
}
