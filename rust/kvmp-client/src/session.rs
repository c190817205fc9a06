//! One session: submit, harvest, wait.
//!
//! The lock is held to publish and to harvest, never while sleeping. Sleepers are counted under it, so that the
//! parked word is set as long as anybody of this process sleeps; who harvests another's reply wakes the others.

use std::fs::File;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use kvmp_core::ring::{COMPLETIONS, Consumer, MappedQueue, Parking, Producer, Ring, SUBMISSIONS};
use kvmp_core::segment::TableMap;
use kvmp_core::sync::{AtomicU32, AtomicU64, Ordering};
use kvmp_core::wire::{Completion, Op, Submission};
use rustix::thread::futex;

use crate::connect::Attached;
use crate::control::{Control, SLICE, timespec};
use crate::error::LostWhy;
use crate::fork::{self, LocalFd};
use crate::holder::Holder;
use crate::request::{Ask, Reply, Requests, name};
use crate::{Bound, ClientError};

/// Longest spin before a sleep, where there are cores to spare.
const SPIN: Duration = Duration::from_micros(2);
/// With so few cores a spinning client keeps the server from running.
const FEW_CORES: usize = 2;

struct State {
    submissions: Producer<MappedQueue>,
    completions: Consumer<MappedQueue>,
    requests: Requests,
    /// Threads of this process that sleep or are about to.
    sleepers: u32,
    /// A ping that was not answered in time: the next one waits for its reply instead of sending another.
    old_ping: Option<u64>,
}

/// What a session shares between its client, its leases and its pending requests.
pub(crate) struct Session {
    pub number: u64,
    pub epoch: u64,
    pub segment_id: String,
    pub control: Control,
    pub holder: Holder,
    pub table: TableMap,
    ring: Ring,
    doorbell: LocalFd,
    state: Mutex<State>,
    /// Call and bound of the first miss since the last ping was answered: (op, ms), op 0 is none.
    missed: (AtomicU32, AtomicU64),
    dead: OnceLock<LostWhy>,
    waited_us: AtomicU64,
    spin: Duration,
    forks: u64,
    pid: u32,
}

impl Session {
    /// The session of an attach, and the segment's file, which only the client keeps.
    pub fn new(attached: Attached) -> (Arc<Self>, File) {
        let Attached { welcome, control, doorbell, holder, ring, table, segment, .. } = attached;
        let state = State {
            submissions: Producer::new(ring.queue(SUBMISSIONS)),
            completions: Consumer::new(ring.queue(COMPLETIONS)),
            requests: Requests::new(),
            sleepers: 0,
            old_ping: None,
        };
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let session = Self {
            number: welcome.session,
            epoch: welcome.server_epoch,
            segment_id: welcome.segment_id,
            control,
            holder,
            table,
            ring,
            doorbell,
            state: Mutex::new(state),
            missed: (AtomicU32::new(0), AtomicU64::new(0)),
            dead: OnceLock::new(),
            waited_us: AtomicU64::new(0),
            spin: if cores <= FEW_CORES { Duration::ZERO } else { SPIN },
            forks: fork::forks(),
            pid: std::process::id(),
        };
        (Arc::new(session), segment)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Refuses calls from a forked child; nothing of this session may be touched there, not even its lock.
    pub fn check_process(&self) -> Result<(), ClientError> {
        if self.forks == fork::forks() { Ok(()) } else { Err(ClientError::Forked { parent: self.pid }) }
    }

    /// Why nothing can be asked for now, if so.
    pub fn lost(&self) -> Option<LostWhy> {
        self.dead.get().cloned().or_else(|| self.missed())
    }

    /// Looks for a hang-up too, which takes a system call that never waits.
    pub fn lost_now(&self) -> Option<LostWhy> {
        self.notice_hang_up();
        self.lost()
    }

    fn missed(&self) -> Option<LostWhy> {
        let op = Op::from_u8(self.missed.0.load(Ordering::Acquire) as u8)?;
        Some(LostWhy::MissedBound { op: name(op), limit_ms: self.missed.1.load(Ordering::Relaxed) })
    }

    fn note_miss(&self, op: Op, bound: &Bound<'_>) {
        self.missed.1.store(bound.limit_ms(), Ordering::Relaxed);
        self.missed.0.store(op as u32, Ordering::Release);
        self.wake_all();
    }

    fn note_alive(&self) {
        self.missed.0.store(0, Ordering::Release);
    }

    /// Ends the session for good; the first reason stays.
    pub fn end(&self, why: LostWhy) {
        if self.dead.set(why).is_ok() {
            self.wake_all();
        }
    }

    fn notice_hang_up(&self) {
        if self.dead.get().is_none() && self.control.hung_up() {
            self.end(LostWhy::HungUp(self.control.last_words()));
        }
    }

    fn check_alive(&self) -> Result<(), ClientError> {
        self.check_process()?;
        self.dead.get().map_or(Ok(()), |why| Err(ClientError::Lost(why.clone())))
    }

    /// Refuses where a call may neither submit nor wait.
    pub fn check_usable(&self) -> Result<(), ClientError> {
        self.check_alive()?;
        self.missed().map_or(Ok(()), |why| Err(ClientError::Lost(why)))
    }

    /// Microseconds that calls of this session have waited.
    pub fn waited_us(&self) -> u64 {
        self.waited_us.load(Ordering::Relaxed)
    }

    /// Requests that are not settled.
    pub fn open_requests(&self) -> usize {
        self.lock().requests.len()
    }

    /// Publishes a request; never waits.
    pub fn submit(self: &Arc<Self>, ask: &Ask<'_>) -> Result<Ticket, ClientError> {
        self.check_usable()?;
        self.publish(ask)
    }

    fn publish(self: &Arc<Self>, ask: &Ask<'_>) -> Result<Ticket, ClientError> {
        let mut state = self.lock();
        self.harvest(&mut state)?;
        let entry = state.requests.begin(&self.ring, ask)?;
        self.push(&mut state, entry)?;
        drop(state);
        self.ring_server();
        Ok(Ticket { session: self.clone(), request: Some(entry.request), op: ask.op })
    }

    fn push(&self, state: &mut State, entry: Submission) -> Result<(), ClientError> {
        match state.submissions.push(&entry.to_entry()) {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(self.broken("it answered requests that it has not taken from the queue".into())),
            Err(corrupt) => Err(self.broken(corrupt.to_string())),
        }
    }

    fn broken(&self, why: String) -> ClientError {
        self.end(LostWhy::Protocol(why.clone()));
        ClientError::Protocol(why)
    }

    /// Wakes the data-plane thread if it sleeps.
    fn ring_server(&self) {
        if Parking(self.table.parked()).must_ring()
            && let Some(doorbell) = self.doorbell.get()
        {
            // Edge-triggered and never read: only a write rings. A write fails (EAGAIN) once the counter is full, after
            // 2^64 - 2 rings, and then there is nothing more to do; the server looks at every queue when it wakes.
            let _ = rustix::io::write(doorbell, &1u64.to_ne_bytes());
        }
    }

    /// Takes in every completion that has come, wakes whose they may be, and submits the lease ends that are owed.
    fn harvest(&self, state: &mut State) -> Result<(), ClientError> {
        let mut any = false;
        while let Some(entry) = state.completions.pop().map_err(|corrupt| self.broken(corrupt.to_string()))? {
            any = true;
            let completion = Completion::from_entry(entry);
            state.requests.answer(&self.ring, completion).map_err(|unasked| self.broken(unasked.0))?;
            if state.old_ping == Some(completion.request) {
                state.old_ping = None;
                self.note_alive();
            }
        }
        if any && state.sleepers > 0 {
            self.wake_all();
        }
        self.pay(state)
    }

    fn pay(&self, state: &mut State) -> Result<(), ClientError> {
        let mut any = false;
        while let Some(entry) = state.requests.next_owed() {
            self.push(state, entry)?;
            any = true;
        }
        if any {
            self.ring_server();
        }
        Ok(())
    }

    /// Ends a lease without waiting. Nothing is said by a forked child, nor to a server that is gone.
    pub fn owe(&self, op: Op, lease: u64) {
        if lease == 0 || self.check_alive().is_err() {
            return;
        }
        let mut state = self.lock();
        state.requests.owe(op, lease);
        // A broken ring ends the session, which ends the lease.
        let _ = self.harvest(&mut state);
    }

    fn give_up(&self, request: u64, op: Op) {
        if self.check_process().is_ok() {
            let mut state = self.lock();
            state.requests.give_up(request);
            if op == Op::Ping {
                state.old_ping = Some(request);
            }
            let _ = self.harvest(&mut state);
        }
    }

    /// The reply, if it has come.
    fn look(&self, request: u64) -> Result<Option<Reply>, ClientError> {
        let mut state = self.lock();
        if let Some(reply) = state.requests.take(request) {
            return Ok(Some(reply));
        }
        self.harvest(&mut state)?;
        Ok(state.requests.take(request))
    }

    fn wake_all(&self) {
        // Waking nobody is no error.
        let _ = futex::wake(self.ring.completion_futex(), futex::Flags::empty(), i32::MAX as u32);
    }

    fn spin(&self, request: u64, from: Instant) -> Result<Option<Reply>, ClientError> {
        loop {
            let reply = self.look(request)?;
            if reply.is_some() || from.elapsed() >= self.spin {
                return Ok(reply);
            }
            std::hint::spin_loop();
        }
    }

    /// Sleeps until a completion is published, somebody wakes all, or a slice has passed; `None` then.
    fn sleep(&self, request: u64, limit: Duration) -> Result<Option<Reply>, ClientError> {
        self.announce();
        // Read before the last look: what is published after the look changes it, and then the sleep ends at once.
        let seen = self.ring.completion_futex().load(Ordering::Acquire);
        let reply = self.look(request);
        if matches!(reply, Ok(None)) {
            // Woken, timed out, interrupted or too late: all the same, the caller looks again.
            let _ = futex::wait(
                self.ring.completion_futex(),
                futex::Flags::empty(),
                seen,
                Some(&timespec(limit.min(SLICE))),
            );
        }
        self.withdraw();
        reply
    }

    fn announce(&self) {
        self.lock().sleepers += 1;
        Parking(self.ring.client_parked()).announce();
    }

    fn withdraw(&self) {
        let mut state = self.lock();
        state.sleepers -= 1;
        if state.sleepers == 0 {
            Parking(self.ring.client_parked()).withdraw();
        }
    }

    /// Waits for a reply within the bound. `while_lost`: also when another call missed its bound.
    fn wait(&self, request: u64, op: Op, bound: &Bound<'_>, while_lost: bool) -> Result<Reply, ClientError> {
        let from = Instant::now();
        let reply = self.wait_uncounted(request, op, bound, while_lost, from);
        self.waited_us.fetch_add(from.elapsed().as_micros() as u64, Ordering::Relaxed);
        reply
    }

    fn wait_uncounted(
        &self,
        request: u64,
        op: Op,
        bound: &Bound<'_>,
        while_lost: bool,
        from: Instant,
    ) -> Result<Reply, ClientError> {
        if let Some(reply) = self.spin(request, from)? {
            return Ok(reply);
        }
        loop {
            // Before the first sleep too: a server that died before the call is not waited for.
            self.notice_hang_up();
            if while_lost { self.check_alive() } else { self.check_usable() }?;
            if let Some(reply) = self.sleep(request, bound.left())? {
                return Ok(reply);
            }
            if let Some(reply) = self.look(request)? {
                return Ok(reply);
            }
            if bound.is_interrupted() {
                return Err(ClientError::Interrupted);
            }
            if bound.left().is_zero() {
                self.note_miss(op, bound);
                return Err(ClientError::BoundExceeded { op: name(op), limit_ms: bound.limit_ms() });
            }
        }
    }

    /// Asks for a sign of life, also while the session is lost; an answer ends that.
    pub fn ping(self: &Arc<Self>, bound: &Bound<'_>) -> Result<Duration, ClientError> {
        self.notice_hang_up();
        self.check_alive()?;
        let from = Instant::now();
        let mut ticket = match self.adopt_ping()? {
            Some(ticket) => ticket,
            None => self.publish(&Ask::plain(Op::Ping))?,
        };
        ticket.wait_for(bound, true)?;
        self.note_alive();
        Ok(from.elapsed())
    }

    fn adopt_ping(self: &Arc<Self>) -> Result<Option<Ticket>, ClientError> {
        let mut state = self.lock();
        self.harvest(&mut state)?;
        let Some(request) = state.old_ping.take().filter(|&id| state.requests.adopt(id)) else { return Ok(None) };
        Ok(Some(Ticket { session: self.clone(), request: Some(request), op: Op::Ping }))
    }
}

/// One request's claim on its reply. Dropped before, the reply is settled when it comes.
pub(crate) struct Ticket {
    session: Arc<Session>,
    request: Option<u64>,
    op: Op,
}

impl Ticket {
    /// The reply if it has come; never waits. A hang-up is looked for where none has.
    pub fn poll(&mut self) -> Result<Option<Reply>, ClientError> {
        self.session.check_process()?;
        let Some(request) = self.request else { return Ok(None) };
        let reply = self.session.look(request)?;
        if reply.is_some() {
            self.request = None;
            return Ok(reply);
        }
        self.session.notice_hang_up();
        self.session.check_usable()?;
        Ok(None)
    }

    /// The reply if it comes within `limit`; a server that takes longer is not lost for that.
    pub fn poll_for(&mut self, limit: Duration) -> Result<Option<Reply>, ClientError> {
        let from = Instant::now();
        loop {
            let reply = self.poll()?;
            let (left, Some(request)) = (limit.saturating_sub(from.elapsed()), self.request) else { return Ok(reply) };
            if left.is_zero() {
                return Ok(None);
            }
            if let Some(reply) = self.session.sleep(request, left)? {
                self.request = None;
                return Ok(Some(reply));
            }
        }
    }

    /// The reply, within the bound; past it the session is lost.
    pub fn wait(&mut self, bound: &Bound<'_>) -> Result<Reply, ClientError> {
        self.wait_for(bound, false)
    }

    fn wait_for(&mut self, bound: &Bound<'_>, while_lost: bool) -> Result<Reply, ClientError> {
        self.session.check_process()?;
        let request = self.request.ok_or_else(|| ClientError::Protocol("a reply was taken twice".into()))?;
        let reply = self.session.wait(request, self.op, bound, while_lost)?;
        self.request = None;
        Ok(reply)
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if let Some(request) = self.request.take() {
            self.session.give_up(request, self.op);
        }
    }
}
