//! The log of `kvmp serve`: `line -> queue -> written to standard error by a thread of its own`.
//!
//! A log that nobody reads (a stopped terminal, a full pipe) costs lines, which are counted; no thread of the server waits
//! for it. A client that is ended with a reason a thousand times would otherwise stop the data plane.

use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use tracing::level_filters::LevelFilter;

use super::last::LAST_LINES;

/// Lines that may wait to be written.
const LINES: usize = 1024;

enum Item {
    Line(Vec<u8>),
    /// All before it is written when this is dropped.
    Mark(#[expect(dead_code, reason = "its end is what is waited for")] SyncSender<()>),
}

/// The server's end of the queue.
#[derive(Clone)]
struct Lines {
    queue: SyncSender<Item>,
    dropped: Arc<AtomicU64>,
}

impl Write for Lines {
    /// One line a call, as the subscriber writes them.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if self.queue.try_send(Item::Line(line.to_vec())).is_err() {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// As long as this exists the log is written; its end waits for the last lines, but not for a reader that does not read.
pub(super) struct Log {
    queue: SyncSender<Item>,
}

impl Log {
    /// Sets the process's log up, at the level that `KVMP_LOG` says.
    pub fn start() -> io::Result<Self> {
        let level = std::env::var("KVMP_LOG").ok().and_then(|level| level.parse().ok()).unwrap_or(LevelFilter::INFO);
        let (queue, items) = sync_channel(LINES);
        let lines = Lines { queue: queue.clone(), dropped: Arc::default() };
        let dropped = Arc::clone(&lines.dropped);
        // Not `Stderr`: its lock, held while a write waits, would keep the main thread from its last words.
        let out = std::fs::File::from(io::stderr().as_fd().try_clone_to_owned()?);
        std::thread::Builder::new().name("kvmp-log".into()).spawn(move || write_out(&items, out, &dropped))?;
        // A second server in one process keeps the first one's subscriber.
        let _ = tracing_subscriber::fmt()
            .with_max_level(level)
            .with_target(false)
            // A log that nobody can read any more (a closed terminal, a full disk) must not end the server.
            .log_internal_errors(false)
            .with_ansi(io::stderr().is_terminal())
            .with_writer(move || lines.clone())
            .try_init();
        Ok(Self { queue })
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        let (mark, written) = sync_channel(0);
        // With the queue full nobody reads: then there is nothing to wait for.
        if self.queue.try_send(Item::Mark(mark)).is_ok() {
            let _ = written.recv_timeout(LAST_LINES);
        }
    }
}

fn write_out(items: &Receiver<Item>, mut out: impl Write, dropped: &AtomicU64) {
    while let Ok(item) = items.recv() {
        let Item::Line(line) = item else { continue };
        let _ = out.write_all(&line);
        match dropped.swap(0, Ordering::Relaxed) {
            0 => {}
            lost => drop(writeln!(out, "kvmp: {lost} lines of this log were dropped: nobody read it")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_that_find_no_room_are_counted_and_nobody_waits() {
        let (queue, items) = sync_channel(2);
        let mut lines = Lines { queue, dropped: Arc::default() };
        for line in ["a\n", "b\n", "c\n", "d\n"] {
            lines.write_all(line.as_bytes()).unwrap();
        }
        let dropped = Arc::clone(&lines.dropped);
        drop(lines);
        let mut out = Vec::new();
        write_out(&items, &mut out, &dropped);
        assert_eq!(String::from_utf8(out).unwrap(), "a\nkvmp: 2 lines of this log were dropped: nobody read it\nb\n");
    }
}
