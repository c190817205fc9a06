//! Engines and their writers: when may the slots of a dead one be given away?
//!
//! `joined -> session ended -> holder entry free -> grace passed -> its parts are closed`. A part that no worker has
//! joined for is closed by the scheduler's entry, and from then on joins under that token are refused.
//! Readers of a part write nothing, so nothing here waits for them: they are not even kept.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use kvmp_core::ids::{EngineToken, PartId};
use kvmp_core::wire::Role;

/// DMA queued by a process may land after it is gone (DESIGN.md 6).
pub(super) const DMA_GRACE: Duration = Duration::from_secs(1);

/// A client that may still be storing, through one holder entry.
#[derive(Debug)]
struct Writer {
    holder: u32,
    role: Role,
    part: Option<PartId>,
    dma: bool,
    /// Set when its session ended.
    ended: bool,
    /// When its entry was first seen free.
    free_since: Option<Instant>,
}

impl Writer {
    fn is_done(&mut self, now: Instant, is_free: &impl Fn(u32) -> bool) -> bool {
        // Seen free once is free for good: the entry may have a new holder by the next look.
        if !self.ended || (self.free_since.is_none() && !is_free(self.holder)) {
            return false;
        }
        let since = *self.free_since.get_or_insert(now);
        now.duration_since(since) >= if self.dma { DMA_GRACE } else { Duration::ZERO }
    }
}

#[derive(Debug, Default)]
struct Engine {
    writers: Vec<Writer>,
    /// Parts that somebody joined for who may still write them.
    joined: HashSet<PartId>,
    /// Parts whose writer is gone for good: what it had open is closed, and may be somebody else's by now. A process that
    /// came back for such a part under this token could still store under a lease of before.
    left: HashSet<PartId>,
    /// The scheduler's session ended: no joins any more.
    closed: bool,
}

/// Something that the store must be told.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Gone {
    /// Every copy of this writer has ended.
    Part(EngineToken, PartId),
    /// The scheduler's entry is free: parts that nobody joined for are closed.
    Unjoined(EngineToken),
    /// Nobody of the engine is left.
    Engine(EngineToken),
}

/// All engines of this server epoch.
#[derive(Debug, Default)]
pub(crate) struct Engines {
    all: HashMap<EngineToken, Engine>,
}

impl Engines {
    pub fn len(&self) -> usize {
        self.all.len()
    }

    /// A scheduler's new engine.
    pub fn add(&mut self, token: EngineToken, holder: u32, dma: bool) {
        let writer = Writer { holder, role: Role::Scheduler, part: None, dma, ended: false, free_since: None };
        self.all.insert(token, Engine { writers: vec![writer], ..Engine::default() });
    }

    /// A worker joins, or is told why it may not.
    pub fn join(&mut self, token: EngineToken, part: PartId, holder: u32, dma: bool) -> Result<(), &'static str> {
        let engine = self.all.get_mut(&token).ok_or("this server does not know it")?;
        if engine.closed {
            return Err("its scheduler has gone");
        }
        if engine.left.contains(&part) {
            return Err(
                "its worker for that part left and what it had open was closed; its scheduler must attach anew",
            );
        }
        if engine.writers.iter().any(|writer| writer.part == Some(part) && !writer.ended) {
            return Err("another worker writes that part");
        }
        engine.joined.insert(part);
        let (role, part) = (Role::Worker, Some(part));
        engine.writers.push(Writer { holder, role, part, dma, ended: false, free_since: None });
        Ok(())
    }

    /// Whether somebody may join who only loads. Also a part whose writer is gone: what was committed stays whole.
    pub fn may_read(&self, token: EngineToken) -> Result<(), &'static str> {
        match self.all.get(&token) {
            None => Err("this server does not know it"),
            Some(engine) if engine.closed => Err("its scheduler has gone"),
            Some(_) => Ok(()),
        }
    }

    /// A part of a writer that is gone had blocks open, which are closed now: nobody may join for it any more.
    pub fn bar(&mut self, token: EngineToken, part: PartId) {
        if let Some(engine) = self.all.get_mut(&token) {
            engine.left.insert(part);
        }
    }

    /// Whether a worker has joined for a part, and is not gone.
    pub fn has_joined(&self, token: EngineToken, part: PartId) -> bool {
        self.all.get(&token).is_some_and(|engine| engine.joined.contains(&part))
    }

    /// A session ended; its copies may not have.
    pub fn ended(&mut self, token: EngineToken, holder: u32) {
        let Some(engine) = self.all.get_mut(&token) else { return };
        for writer in engine.writers.iter_mut().filter(|writer| writer.holder == holder) {
            writer.ended = true;
            engine.closed |= writer.role == Role::Scheduler;
        }
    }

    /// Whether any ended session's entry is still to be watched.
    pub fn watching(&self) -> bool {
        self.all.values().any(|engine| engine.writers.iter().any(|writer| writer.ended))
    }

    /// Looks at the entries of ended sessions; says what became certain.
    pub fn settle(&mut self, now: Instant, is_free: impl Fn(u32) -> bool) -> Vec<Gone> {
        let mut gone = Vec::new();
        for (&token, engine) in &mut self.all {
            engine.settle(token, now, &is_free, &mut gone);
        }
        self.all.retain(|_, engine| !engine.writers.is_empty());
        gone
    }
}

impl Engine {
    fn settle(&mut self, token: EngineToken, now: Instant, is_free: &impl Fn(u32) -> bool, gone: &mut Vec<Gone>) {
        let (done, left): (Vec<_>, Vec<_>) = std::mem::take(&mut self.writers)
            .into_iter()
            .map(|mut w| (w.is_done(now, is_free), w))
            .partition(|(done, _)| *done);
        self.writers = left.into_iter().map(|(_, writer)| writer).collect();
        for (_, writer) in done {
            match writer.part {
                None => gone.push(Gone::Unjoined(token)),
                // A worker that came back on a new session is the same writer: its parts stay open.
                Some(part) if !self.writers.iter().any(|w| w.part == Some(part)) => {
                    self.joined.remove(&part);
                    gone.push(Gone::Part(token, part));
                }
                Some(_) => {}
            }
        }
        if self.writers.is_empty() {
            gone.push(Gone::Engine(token));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const E: EngineToken = EngineToken(1);
    const P: PartId = PartId(0);

    #[test]
    fn a_part_is_closed_when_its_writers_entry_is_free_and_not_before() {
        let mut engines = Engines::default();
        engines.add(E, 0, false);
        engines.join(E, P, 1, false).unwrap();
        let now = Instant::now();
        engines.ended(E, 1);
        assert_eq!(engines.settle(now, |_| false), []);
        assert_eq!(engines.settle(now, |h| h == 1), [Gone::Part(E, P)]);
        engines.ended(E, 0);
        assert_eq!(engines.settle(now, |_| true), [Gone::Unjoined(E), Gone::Engine(E)]);
        assert_eq!(engines.len(), 0);
    }

    #[test]
    fn dma_gets_its_grace() {
        let mut engines = Engines::default();
        engines.add(E, 0, false);
        engines.join(E, P, 1, true).unwrap();
        engines.ended(E, 1);
        let now = Instant::now();
        assert_eq!(engines.settle(now, |_| true), []);
        assert_eq!(engines.settle(now + DMA_GRACE, |_| true), [Gone::Part(E, P)]);
    }

    #[test]
    fn nobody_joins_an_engine_whose_scheduler_ended() {
        let mut engines = Engines::default();
        engines.add(E, 0, false);
        engines.ended(E, 0);
        assert!(engines.join(E, P, 1, false).is_err());
        assert!(engines.join(EngineToken(2), P, 1, false).is_err());
    }

    #[test]
    fn a_worker_whose_parts_were_closed_does_not_come_back() {
        let mut engines = Engines::default();
        engines.add(E, 0, false);
        engines.join(E, P, 1, false).unwrap();
        engines.ended(E, 1);
        assert_eq!(engines.settle(Instant::now(), |_| true), [Gone::Part(E, P)]);
        engines.bar(E, P);
        assert!(engines.join(E, P, 2, false).unwrap_err().contains("attach anew"));
        engines.join(E, PartId(1), 3, false).unwrap();
    }

    #[test]
    fn a_part_whose_writer_is_gone_is_closed_by_the_schedulers_entry_again() {
        let mut engines = Engines::default();
        engines.add(E, 0, false);
        engines.join(E, P, 1, false).unwrap();
        engines.join(E, PartId(1), 2, false).unwrap();
        engines.ended(E, 1);
        assert_eq!(engines.settle(Instant::now(), |_| true), [Gone::Part(E, P)]);
        engines.ended(E, 0);
        assert_eq!(engines.settle(Instant::now(), |_| true), [Gone::Unjoined(E)]);
        assert!(!engines.has_joined(E, P) && engines.has_joined(E, PartId(1)));
    }

    #[test]
    fn a_part_has_one_writer() {
        let mut engines = Engines::default();
        engines.add(E, 0, false);
        engines.join(E, P, 1, false).unwrap();
        assert!(engines.join(E, P, 2, false).is_err());
    }

    #[test]
    fn a_reader_is_no_writer_and_needs_none() {
        let mut engines = Engines::default();
        assert!(engines.may_read(E).is_err());
        engines.add(E, 0, false);
        engines.may_read(E).unwrap();
        assert!(!engines.has_joined(E, P));
        engines.join(E, P, 1, false).unwrap();
        engines.ended(E, 1);
        assert_eq!(engines.settle(Instant::now(), |_| true), [Gone::Part(E, P)]);
        engines.bar(E, P);
        engines.may_read(E).unwrap();
        engines.ended(E, 0);
        assert!(engines.may_read(E).unwrap_err().contains("scheduler has gone"));
    }

    #[test]
    fn a_worker_that_came_back_keeps_its_parts_open() {
        let mut engines = Engines::default();
        engines.add(E, 0, false);
        engines.join(E, P, 1, false).unwrap();
        engines.ended(E, 1);
        engines.join(E, P, 2, false).unwrap();
        assert_eq!(engines.settle(Instant::now(), |_| true), []);
        engines.ended(E, 2);
        assert_eq!(engines.settle(Instant::now(), |_| true), [Gone::Part(E, P)]);
    }
}
