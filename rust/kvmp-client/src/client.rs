//! The client: one session's calls in one place.

use std::sync::Arc;
use std::time::Duration;

use kvmp_core::namespace::NamespaceSpec;
use kvmp_core::segment::Mapping;
use kvmp_core::slot::PartSum;
use kvmp_core::wire::{ClientMessage, Op, Opened, Refusal, Role, ServerMessage, SocketError};
use serde_json::Value;

use crate::arena::{Arena, KeptArena};
use crate::connect::{ConnectOptions, attach};
use crate::control::ExchangeError;
use crate::copy::{self, BlockLayout};
use crate::error::{LostWhy, input};
use crate::lease::{self, ReadLease, WriteLease};
use crate::listed::{ListedNamespace, listed};
use crate::parts::{PartList, close_parts};
use crate::session::Session;
use crate::slots::{PartsAt, part_offsets};
use crate::stats;
use crate::sums::{self, OpenedNamespaces, PartCheck};
use crate::{Bound, ClientError, Endpoint, Namespace, PendingLookup, PendingReserve, ReserveList};

/// A connected client. Shared between threads freely: no call holds a lock while it sleeps.
pub struct Client {
    session: Arc<Session>,
    endpoint: String,
    role: Role,
    engine_token: u64,
    part: Option<u16>,
    keys_max: u32,
    server_version: String,
    features: Vec<String>,
    arena: Arena,
    opened: OpenedNamespaces,
}

impl Client {
    /// Connects, says hello, maps what comes back.
    ///
    /// # Errors
    /// No server, a refusal (uid, version, engine) with the server's words, a segment that is not what it should be,
    /// or the bound.
    pub fn connect(endpoint: &str, options: &ConnectOptions, bound: &Bound<'_>) -> Result<Self, ClientError> {
        let attached = attach(&endpoint.parse::<Endpoint>()?, options, bound)?;
        let (path, welcome) = (attached.path.clone(), attached.welcome.clone());
        let (session, segment) = Session::new(attached);
        Ok(Self {
            endpoint: Endpoint::Unix(path).to_string(),
            role: options.role,
            engine_token: welcome.engine_token,
            part: options.part,
            keys_max: welcome.keys_max.clamp(1, kvmp_core::wire::LOOKUP_MAX),
            server_version: welcome.server_version,
            features: welcome.features,
            arena: Arena::new(segment, session.table.clone(), options.keep.as_ref()),
            opened: OpenedNamespaces::default(),
            session,
        })
    }

    /// `unix:PATH` of the socket in use.
    #[must_use]
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// What this client is.
    #[must_use]
    pub fn role(&self) -> Role {
        self.role
    }

    /// Token of the engine: minted for a scheduler, given by a worker, 0 for a tool.
    #[must_use]
    pub fn engine_token(&self) -> u64 {
        self.engine_token
    }

    /// Part this client writes, or loads only if it is a reader.
    #[must_use]
    pub fn part(&self) -> Option<u16> {
        self.part
    }

    /// Most hashes or slots in one request.
    #[must_use]
    pub fn keys_max(&self) -> u32 {
        self.keys_max
    }

    /// Version of the server's package.
    #[must_use]
    pub fn server_version(&self) -> &str {
        &self.server_version
    }

    /// Optional features of the protocol that server and client both know.
    #[must_use]
    pub fn features(&self) -> &[String] {
        &self.features
    }

    /// Which life of a server this session is with.
    #[must_use]
    pub fn server_epoch(&self) -> u64 {
        self.session.epoch
    }

    /// Identity of the segment's inode, hex.
    #[must_use]
    pub fn segment_id(&self) -> &str {
        &self.session.segment_id
    }

    /// Why the session answers no more, if a hang-up or a missed bound has been seen. A look, never a wait.
    #[must_use]
    pub fn lost(&self) -> Option<LostWhy> {
        if self.session.check_process().is_err() { Some(LostWhy::Closed) } else { self.session.lost_now() }
    }

    /// Microseconds that this client's calls have waited, all together.
    #[must_use]
    pub fn waited_us(&self) -> u64 {
        self.session.waited_us()
    }

    /// Requests not answered and taken yet, those given up included.
    pub fn open_requests(&self) -> Result<usize, ClientError> {
        self.session.check_process()?;
        Ok(self.session.open_requests())
    }

    /// Round trip; an answer ends a loss by a missed bound.
    pub fn ping(&self, bound: &Bound<'_>) -> Result<Duration, ClientError> {
        self.session.ping(bound)
    }

    /// Opens a namespace (scheduler, tool).
    pub fn open(&self, spec: &NamespaceSpec, bound: &Bound<'_>) -> Result<Namespace, ClientError> {
        self.name_space(&ClientMessage::Open { spec: spec.clone() }, bound)
    }

    /// Joins a namespace that the scheduler opened (worker, reader): refused unless it has this digest and this part's layout.
    pub fn join(
        &self,
        namespace: u16,
        digest: &str,
        layout: &Value,
        bound: &Bound<'_>,
    ) -> Result<Namespace, ClientError> {
        let join = ClientMessage::Join { namespace, digest: digest.to_owned(), layout: layout.clone() };
        let joined = self.name_space(&join, bound)?;
        if joined.digest() == digest {
            return Ok(joined);
        }
        Err(ClientError::Namespace(format!("namespace {namespace} has the digest {}, not {digest}", joined.digest())))
    }

    /// The namespaces that the segment has, whoever opened them, by id. No message: a look at the server's table, also
    /// when the session is lost. One that the server is just writing is left out.
    pub fn namespaces(&self) -> Result<Vec<ListedNamespace>, ClientError> {
        self.session.check_process()?;
        Ok(listed(&self.session.table))
    }

    fn name_space(&self, message: &ClientMessage, bound: &Bound<'_>) -> Result<Namespace, ClientError> {
        self.session.check_usable()?;
        match self.session.control.exchange(message, bound) {
            Ok(ServerMessage::Opened(opened)) => self.opened(opened),
            Ok(ServerMessage::Refused { refusal, message }) => Err(self.refused(refusal, message)),
            Ok(other) => Err(ClientError::Protocol(format!("an open was answered with {other:?}"))),
            Err(ExchangeError::Interrupted) => Err(ClientError::Interrupted),
            Err(ExchangeError::Socket(error)) => Err(self.socket_failed(error, bound)),
        }
    }

    fn opened(&self, opened: Opened) -> Result<Namespace, ClientError> {
        let namespace = Namespace::new(opened, &self.session)?;
        self.opened.add(&namespace);
        Ok(namespace)
    }

    fn refused(&self, refusal: Refusal, message: String) -> ClientError {
        match refusal {
            Refusal::Namespace | Refusal::Full => ClientError::Namespace(message),
            Refusal::ShuttingDown => ClientError::Lost(LostWhy::ShuttingDown),
            _ => ClientError::Refused { endpoint: self.endpoint.clone(), refusal, message },
        }
    }

    fn socket_failed(&self, error: SocketError, bound: &Bound<'_>) -> ClientError {
        match error {
            SocketError::TimedOut => ClientError::BoundExceeded { op: "open", limit_ms: bound.limit_ms() },
            SocketError::HangUp => {
                self.session.end(LostWhy::HungUp(None));
                ClientError::Lost(LostWhy::HungUp(None))
            }
            other => ClientError::Protocol(other.to_string()),
        }
    }

    /// Asks for the longest hit of a hash list; never waits.
    pub fn submit_lookup(&self, namespace: &Namespace, hashes: &[[u8; 32]]) -> Result<PendingLookup, ClientError> {
        PendingLookup::submit(&self.session, self.keys_max, namespace, hashes)
    }

    /// The longest hit of a hash list, within the bound.
    pub fn lookup(
        &self,
        namespace: &Namespace,
        hashes: &[[u8; 32]],
        bound: &Bound<'_>,
    ) -> Result<ReadLease, ClientError> {
        self.submit_lookup(namespace, hashes)?.wait(bound)
    }

    /// Asks for slots to write; never waits.
    pub fn submit_reserve(&self, namespace: &Namespace, list: &ReserveList<'_>) -> Result<PendingReserve, ClientError> {
        PendingReserve::submit(&self.session, self.keys_max, namespace, list)
    }

    /// Slots to write, within the bound.
    pub fn reserve(
        &self,
        namespace: &Namespace,
        list: &ReserveList<'_>,
        bound: &Bound<'_>,
    ) -> Result<WriteLease, ClientError> {
        self.submit_reserve(namespace, list)?.wait(bound)
    }

    /// Says that this client's part of the slots is written; how many the server took.
    pub fn commit(
        &self,
        lease: u64,
        slots: &[u32],
        words: &[u64],
        sums: Option<&[PartSum]>,
        bound: &Bound<'_>,
    ) -> Result<u32, ClientError> {
        let list = PartList { lease, part: self.written_part()?, slots, words, sums };
        close_parts(&self.session, self.keys_max, Op::Commit, &list, bound)
    }

    /// Sums of this client's part of some slots for [`Self::commit`]: `xxh3` of each part, with the part's length.
    ///
    /// # Errors
    /// No part, not a sum a slot, or a slot that is of no namespace opened or joined here.
    pub fn part_sums(&self, slots: &[u32], xxh3: &[u64]) -> Result<Vec<PartSum>, ClientError> {
        self.session.check_process()?;
        self.opened.part_sums(&self.session.table, self.own_part()?, slots, xxh3)
    }

    /// xxh3-64 of each part as it lies in the arena: of a writer's part, once its copy has ended.
    #[must_use]
    pub fn xxh3_of(&self, at: &PartsAt) -> Vec<u64> {
        sums::xxh3_of(at)
    }

    /// Compares this client's part of each slot with the sum that its commit brought, and the slot with its word.
    ///
    /// # Errors
    /// No part, or not a word a slot.
    pub fn check_sums(&self, at: &PartsAt, slots: &[u32], words: &[u64]) -> Result<Vec<PartCheck>, ClientError> {
        if words.len() != slots.len() || slots.len() != at.offsets.len() {
            return Err(input("words", format!("{} words for {} slots", words.len(), slots.len())));
        }
        Ok(sums::check(&self.session.table, at, self.own_part()?, slots, words))
    }

    /// Says that the bytes of these blocks are wrong: the server evicts them; how many it still had.
    pub fn distrust(&self, slots: &[u32], words: &[u64], bound: &Bound<'_>) -> Result<u32, ClientError> {
        let list = PartList { lease: 0, part: self.own_part()?, slots, words, sums: None };
        close_parts(&self.session, self.keys_max, Op::Distrust, &list, bound)
    }

    /// Gives up this client's part of the slots; how many the server took.
    pub fn abort(&self, lease: u64, slots: &[u32], words: &[u64], bound: &Bound<'_>) -> Result<u32, ClientError> {
        let list = PartList { lease, part: self.written_part()?, slots, words, sums: None };
        close_parts(&self.session, self.keys_max, Op::Abort, &list, bound)
    }

    fn own_part(&self) -> Result<u16, ClientError> {
        self.part.ok_or_else(|| input("part", "this client has none: only a worker commits, aborts or copies"))
    }

    /// Refuses a reader: its part is another's to write.
    ///
    /// # Errors
    /// It is one, or has no part at all.
    pub fn check_writes(&self) -> Result<(), ClientError> {
        self.written_part().map(|_| ())
    }

    fn written_part(&self) -> Result<u16, ClientError> {
        match (self.role, self.own_part()?) {
            (Role::Reader, part) => Err(input("part", format!("this client only loads part {part}: it is a reader"))),
            (_, part) => Ok(part),
        }
    }

    /// Whether each slot still has its leased word; after a load's copy has ended. No message.
    pub fn check(&self, slots: &[u32], words: &[u64]) -> Result<Vec<bool>, ClientError> {
        if slots.len() != words.len() {
            return Err(input("words", format!("{} words for {} slots", words.len(), slots.len())));
        }
        Ok(lease::check(&self.session.table, slots, words))
    }

    /// Counters, as JSON.
    pub fn stats(&self, bound: &Bound<'_>) -> Result<String, ClientError> {
        stats::stats(&self.session, bound)
    }

    /// Evicts what is Ready and not pinned; how many blocks.
    pub fn clear(&self, bound: &Bound<'_>) -> Result<u32, ClientError> {
        stats::clear(&self.session, bound)
    }

    /// The arena, mapped at the first ask.
    pub fn arena(&self) -> Result<Mapping, ClientError> {
        self.arena.mapping()
    }

    /// This client's mapping of the arena with what is populated of it, for the next client of the same segment
    /// ([`ConnectOptions::keep`]); also after [`Self::close`]. `None` where nothing was mapped, and in a forked child.
    #[must_use]
    pub fn keep_arena(&self) -> Option<KeptArena> {
        self.session.check_process().ok().and_then(|()| self.arena.keep())
    }

    /// Makes the arena's page-table entries in a thread of its own, so that first copies do not wait for them. Ended by
    /// [`Self::close`]; once is enough.
    ///
    /// # Errors
    /// The arena cannot be mapped, or the client was closed.
    pub fn prefault(&self) -> Result<(), ClientError> {
        self.session.check_process()?;
        self.arena.prefault()
    }

    /// Copies blocks of the engine's memory into this client's part of the slots; returns when all bytes are there.
    ///
    /// # Errors
    /// As [`Self::parts_at`]; a reader; a layout that is not of the part's size; or a copy out of bounds. No byte has
    /// moved then.
    ///
    /// # Safety
    /// Until this returns, the memory that `layout` names is mapped and readable and nobody writes the blocks named,
    /// and an open write lease of this server epoch covers the slots.
    pub unsafe fn store_blocks(
        &self,
        layout: &BlockLayout,
        at: &PartsAt,
        blocks: &[u32],
        threads: Option<usize>,
    ) -> Result<(), ClientError> {
        self.check_writes()?;
        let pairs = at.pairs(layout, blocks)?;
        // SAFETY: the arena is this process's own mapping, apart from the engine's memory, and `parts_at` found the
        // slots' chunks backed; the caller vouches for the rest.
        unsafe { copy::store(layout, at.view(), &pairs, threads) }?;
        Ok(())
    }

    /// Copies this client's part of the slots into blocks, then says of each whether its slot was the one leased until
    /// the copy had ended; where not, the block holds garbage.
    ///
    /// # Errors
    /// As [`Self::store_blocks`].
    ///
    /// # Safety
    /// Until this returns, the memory that `layout` names is mapped and writable and nobody else touches the blocks
    /// named.
    pub unsafe fn load_blocks(
        &self,
        layout: &BlockLayout,
        at: &PartsAt,
        blocks: &[u32],
        slots: &[u32],
        words: &[u64],
        threads: Option<usize>,
    ) -> Result<Vec<bool>, ClientError> {
        if words.len() != blocks.len() || slots.len() != blocks.len() {
            return Err(input("words", format!("{} words for {} blocks", words.len(), blocks.len())));
        }
        let pairs = at.pairs(layout, blocks)?;
        // SAFETY: as in `store_blocks`.
        unsafe { copy::load(layout, at.view(), &pairs, threads) }?;
        self.check(slots, words)
    }

    /// Places of this client's part in some slots, and a guard to hold until the copy has ended.
    ///
    /// # Errors
    /// No part, another session's namespace, a slot that is not of the group's size, or a session that was closed.
    pub fn parts_at(&self, namespace: &Namespace, group: u16, slots: &[u32]) -> Result<PartsAt, ClientError> {
        self.session.check_process()?;
        namespace.check_session(&self.session)?;
        let (offsets, bytes) = part_offsets(&self.session.table, namespace, group, self.own_part()?, slots)?;
        let guard = self.session.holder.guard().ok_or(ClientError::Lost(LostWhy::Closed))?;
        Ok(PartsAt { offsets, bytes, arena: self.arena.mapping()?, guard })
    }

    /// Refuses a write lease of another life of the server: nothing may be stored under it.
    pub fn check_epoch(&self, lease_epoch: u64) -> Result<(), ClientError> {
        let session = self.session.epoch;
        if lease_epoch == session { Ok(()) } else { Err(ClientError::Epoch { lease: lease_epoch, session }) }
    }

    /// Hangs up. Requests under way fail; the holder entry is freed with the last copy; mappings stay until the drop.
    pub fn close(&self) {
        if self.session.check_process().is_ok() {
            self.session.end(LostWhy::Closed);
            self.session.control.shut();
            self.session.holder.give_up();
            self.arena.close();
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.close();
    }
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client").field("endpoint", &self.endpoint).field("epoch", &self.session.epoch).finish()
    }
}
