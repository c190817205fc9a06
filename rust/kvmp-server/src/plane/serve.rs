//! One slice of one session's work: a request begun, gone on with, or finished.

use kvmp_core::ids::{BlockKey, EngineToken, GroupId, LeaseId, NamespaceId, PartId, SlotId};
use kvmp_core::ring::Ring;
use kvmp_core::slot::{PartSum, SlotWord};
use kvmp_core::store::{BlockStore, ClearCursor, LookupCursor, LookupReply, ReserveAnswer, ReserveCursor};
use kvmp_core::wire::{Code, Completion, GrantOut, GroupOut, LOOKUP_MAX, LookupOut, Op, PartIn, Role, Submission};
use zerocopy::{FromBytes, IntoBytes};

use super::run::Plane;
use super::session::{Session, SessionFault};
use crate::segment::SegmentTable;

/// Keys or slots worked on before the next session has its turn.
const SLICE: u32 = 1024;

/// A request that takes more than one slice.
pub(crate) enum Running {
    Lookup { submission: Submission, cursor: LookupCursor, done: u32 },
    Reserve { submission: Submission, cursor: ReserveCursor, done: u32 },
    Parts { submission: Submission, done: u32, taken: u32 },
    Clear { submission: Submission, cursor: ClearCursor },
}

impl Running {
    /// The session ended in the middle: what was pinned or granted so far is given back.
    pub fn abandon(self, store: &mut BlockStore<SegmentTable>, engine: EngineToken) {
        match self {
            Self::Lookup { cursor, .. } => store.lookup_abandon(cursor),
            Self::Reserve { cursor, .. } => {
                if let Some(lease) = store.reserve_finish(cursor).lease {
                    store.cancel(engine, lease);
                }
            }
            Self::Parts { .. } | Self::Clear { .. } => {}
        }
    }
}

/// What a slice left behind.
enum Step {
    Done(Completion),
    Go(Running),
}

fn code(submission: &Submission, code: Code) -> Step {
    Step::Done(Completion { request: submission.request, code: code as u16, ..Completion::default() })
}

fn ok(submission: &Submission) -> Completion {
    Completion { request: submission.request, ..Completion::default() }
}

fn malformed(submission: &Submission, why: &'static str) -> SessionFault {
    SessionFault::Malformed { request: submission.request, why }
}

/// Copies `T`s out of a scratch range, once: what the client does to it afterwards changes nothing.
fn read_in<T: FromBytes + IntoBytes + Clone>(ring: &Ring, offset: u32, n: u32) -> Vec<T> {
    let mut items = vec![T::new_zeroed(); n as usize];
    ring.read_scratch(offset, items.as_mut_slice().as_mut_bytes());
    items
}

#[derive(Clone, Copy, FromBytes, IntoBytes)]
#[repr(transparent)]
struct KeyIn([u8; 32]);

fn keys(ring: &Ring, submission: &Submission, front: u32, done: u32, n: u32) -> Vec<BlockKey> {
    let offset = submission.in_offset + front + done * BlockKey::BYTES as u32;
    read_in::<KeyIn>(ring, offset, n).into_iter().map(|key| BlockKey(key.0)).collect()
}

impl Plane {
    /// Works on one session for one slice; whether there was anything to do.
    pub(super) fn slice(&mut self, session: &mut Session) -> Result<bool, SessionFault> {
        let step = match session.running.take() {
            Some(running) => self.go_on(session, running)?,
            None => match session.next()? {
                None => return Ok(false),
                Some(submission) => self.begin(session, &submission)?,
            },
        };
        match step {
            Step::Go(running) => session.running = Some(running),
            // After the work and before the answer: what was begun in the file may have ended in private zeroes.
            Step::Done(_) if self.segment.is_severed() => return Ok(false),
            Step::Done(completion) => session.complete(&completion)?,
        }
        Ok(true)
    }

    fn begin(&mut self, session: &mut Session, submission: &Submission) -> Result<Step, SessionFault> {
        check_ranges(submission)?;
        let Some(op) = Op::from_u8(submission.op) else { return Ok(code(submission, Code::Unsupported)) };
        if !allowed(session, op) {
            return Ok(code(submission, Code::Forbidden));
        }
        if self.draining && matches!(op, Op::Lookup | Op::Reserve | Op::Clear) {
            return Ok(code(submission, Code::ShuttingDown));
        }
        match op {
            Op::Ping => Ok(code(submission, Code::Ok)),
            Op::Lookup => self.begin_lookup(session, submission),
            Op::Reserve => self.begin_reserve(session, submission),
            Op::Commit | Op::Abort | Op::Distrust => self.begin_parts(session, submission),
            Op::Cancel => Ok(self.ended(submission, |store, lease| store.cancel(session.engine, lease))),
            Op::Release => Ok(self.ended(submission, |store, lease| store.release(session.engine, lease))),
            Op::Stats => Ok(self.stats_reply(session, submission)),
            Op::Clear => Ok(self.clear_slice(*submission, ClearCursor::new(None))),
            Op::Fetch => Ok(code(submission, Code::Unsupported)),
        }
    }

    fn go_on(&mut self, session: &mut Session, running: Running) -> Result<Step, SessionFault> {
        match running {
            Running::Lookup { submission, cursor, done } => Ok(self.lookup_slice(session, submission, cursor, done)),
            Running::Reserve { submission, cursor, done } => Ok(self.reserve_slice(session, submission, cursor, done)),
            Running::Clear { submission, cursor } => Ok(self.clear_slice(submission, cursor)),
            Running::Parts { submission, done, taken } => Ok(self.parts_slice(session, submission, done, taken)),
        }
    }

    fn ended(
        &mut self,
        submission: &Submission,
        end: impl FnOnce(&mut BlockStore<SegmentTable>, LeaseId) -> bool,
    ) -> Step {
        let known = end(&mut self.store, LeaseId(submission.lease));
        code(submission, if known { Code::Ok } else { Code::UnknownLease })
    }

    fn begin_lookup(&mut self, session: &mut Session, submission: &Submission) -> Result<Step, SessionFault> {
        expect_input(submission, 0, BlockKey::BYTES as u32)?;
        let namespace = NamespaceId(submission.namespace);
        let Some(spec) = self.namespaces.spec(namespace).filter(|_| session.namespaces.contains(&submission.namespace))
        else {
            return Ok(code(submission, Code::UnknownNamespace));
        };
        if (submission.out_bytes as usize)
            < kvmp_core::wire::out_bytes_lookup(spec.groups.len(), submission.count as usize)
        {
            return Ok(code(submission, Code::OutTooSmall));
        }
        let now = self.now();
        Ok(match self.store.lookup_begin(session.engine, namespace, now) {
            Ok(cursor) => {
                let cursor = cursor.going_on_at(submission.first_block);
                self.lookup_slice(session, *submission, cursor, 0)
            }
            Err(_) => code(submission, Code::UnknownNamespace),
        })
    }

    fn lookup_slice(&mut self, session: &Session, submission: Submission, mut cursor: LookupCursor, done: u32) -> Step {
        let n = SLICE.min(submission.count - done);
        let keys = keys(&session.ring, &submission, 0, done, n);
        let more = self.store.lookup_step(&mut cursor, &keys);
        if more && done + n < submission.count {
            return Step::Go(Running::Lookup { submission, cursor, done: done + n });
        }
        let reply = self.store.lookup_finish(cursor);
        self.counters.lookup(submission.count, &reply);
        Step::Done(write_hit(&session.ring, &submission, &reply))
    }

    fn begin_reserve(&mut self, session: &mut Session, submission: &Submission) -> Result<Step, SessionFault> {
        let front = parent_bytes(submission);
        expect_input(submission, front, BlockKey::BYTES as u32)?;
        if !session.namespaces.contains(&submission.namespace) {
            return Ok(code(submission, Code::UnknownNamespace));
        }
        if (submission.out_bytes as usize) < submission.count as usize * size_of::<GrantOut>() {
            return Ok(code(submission, Code::OutTooSmall));
        }
        let parent = (front > 0).then(|| BlockKey(read_in::<KeyIn>(&session.ring, submission.in_offset, 1)[0].0));
        let (namespace, group) = (NamespaceId(submission.namespace), GroupId(submission.group));
        let now = self.now();
        Ok(match self.store.reserve_begin(session.engine, namespace, group, parent, submission.first_block, now) {
            Ok(cursor) => self.reserve_slice(session, *submission, cursor, 0),
            Err(kvmp_core::store::StoreError::NoGroup { .. }) => code(submission, Code::UnknownGroup),
            Err(kvmp_core::store::StoreError::Parent { .. }) => {
                return Err(malformed(
                    submission,
                    "a reserve names a parent exactly when it does not begin at block 0",
                ));
            }
            Err(_) => code(submission, Code::UnknownNamespace),
        })
    }

    fn reserve_slice(
        &mut self,
        session: &Session,
        submission: Submission,
        mut cursor: ReserveCursor,
        done: u32,
    ) -> Step {
        let n = SLICE.min(submission.count - done);
        let keys = keys(&session.ring, &submission, parent_bytes(&submission), done, n);
        let mut answers = Vec::with_capacity(keys.len());
        self.store.reserve_step(&mut cursor, &keys, &mut answers);
        let out: Vec<GrantOut> = answers.iter().map(grant_out).collect();
        session.ring.write_scratch(submission.out_offset + done * size_of::<GrantOut>() as u32, out.as_bytes());
        if done + n < submission.count {
            return Step::Go(Running::Reserve { submission, cursor, done: done + n });
        }
        let reply = self.store.reserve_finish(cursor);
        Step::Done(Completion {
            lease: reply.lease.map_or(0, |lease| lease.0),
            count: reply.granted,
            out_bytes: submission.count * size_of::<GrantOut>() as u32,
            ..ok(&submission)
        })
    }

    fn begin_parts(&mut self, session: &mut Session, submission: &Submission) -> Result<Step, SessionFault> {
        expect_input(submission, 0, size_of::<PartIn>() as u32)?;
        if session.part.is_none_or(|part| part.0 != submission.part) {
            return Err(malformed(submission, "it names a part that is not the session's"));
        }
        // A worker whose layout is not the part's was refused at the join: it may not write there either.
        let lease = self.store.lease_namespace(LeaseId(submission.lease));
        if lease.is_some_and(|namespace| !session.namespaces.contains(&namespace.0)) {
            return Ok(code(submission, Code::UnknownNamespace));
        }
        Ok(self.parts_slice(session, *submission, 0, 0))
    }

    fn parts_slice(&mut self, session: &Session, submission: Submission, done: u32, taken: u32) -> Step {
        let Some(part) = session.part else { return code(&submission, Code::Forbidden) };
        let n = SLICE.min(submission.count - done);
        let parts: Vec<PartIn> = read_in(&session.ring, submission.in_offset + done * size_of::<PartIn>() as u32, n);
        let (done, taken) = (done + n, taken + self.close_parts(session, &submission, part, &parts));
        if done < submission.count {
            return Step::Go(Running::Parts { submission, done, taken });
        }
        Step::Done(Completion { count: taken, ..ok(&submission) })
    }

    /// How many of these slots were taken.
    fn close_parts(&mut self, session: &Session, submission: &Submission, part: PartId, parts: &[PartIn]) -> u32 {
        let (engine, lease) = (session.engine, LeaseId(submission.lease));
        let slots = parts.iter().map(|p| (SlotId(p.slot), SlotWord(p.word)));
        match Op::from_u8(submission.op) {
            Some(Op::Commit) => {
                let slots: Vec<(SlotId, SlotWord, PartSum)> =
                    slots.zip(parts).map(|((slot, word), p)| (slot, word, p.sum)).collect();
                self.store.commit(engine, lease, part, &slots).committed
            }
            Some(Op::Distrust) => slots.map(|(slot, word)| u32::from(self.distrust(session, slot, word))).sum(),
            _ => self.store.abort(engine, lease, part, &slots.collect::<Vec<_>>()).aborted,
        }
    }

    /// A worker may distrust what it may read: blocks of the namespaces that it joined.
    fn distrust(&mut self, session: &Session, slot: SlotId, word: SlotWord) -> bool {
        let joined = self.store.namespace_of(slot).is_some_and(|namespace| session.namespaces.contains(&namespace.0));
        joined && self.store.distrust(slot, word)
    }

    fn clear_slice(&mut self, submission: Submission, mut cursor: ClearCursor) -> Step {
        if self.store.clear_step(&mut cursor) {
            return Step::Go(Running::Clear { submission, cursor });
        }
        Step::Done(Completion { count: u32::try_from(cursor.cleared).unwrap_or(u32::MAX), ..ok(&submission) })
    }

    fn stats_reply(&mut self, session: &Session, submission: &Submission) -> Step {
        let text = self.stats().to_string();
        if text.len() > submission.out_bytes as usize {
            return code(submission, Code::OutTooSmall);
        }
        session.ring.write_scratch(submission.out_offset, text.as_bytes());
        Step::Done(Completion { out_bytes: text.len() as u32, ..ok(submission) })
    }
}

fn allowed(session: &Session, op: Op) -> bool {
    match op {
        Op::Ping | Op::Stats => true,
        Op::Clear => matches!(session.role, Role::Scheduler | Role::Tool),
        Op::Lookup | Op::Reserve | Op::Cancel | Op::Release | Op::Fetch => session.role == Role::Scheduler,
        Op::Commit | Op::Abort => session.role == Role::Worker,
        Op::Distrust => matches!(session.role, Role::Worker | Role::Reader),
    }
}

fn check_ranges(submission: &Submission) -> Result<(), SessionFault> {
    let fits = Ring::in_scratch(submission.in_offset, submission.in_bytes)
        && Ring::in_scratch(submission.out_offset, submission.out_bytes);
    if !fits {
        return Err(malformed(submission, "a range lies outside the scratch area"));
    }
    if submission.count > LOOKUP_MAX {
        return Err(malformed(submission, "it names more items than one request may"));
    }
    Ok(())
}

fn expect_input(submission: &Submission, front: u32, item: u32) -> Result<(), SessionFault> {
    if submission.in_bytes != front + submission.count * item {
        return Err(malformed(submission, "its input range is not as long as its items"));
    }
    Ok(())
}

fn parent_bytes(submission: &Submission) -> u32 {
    if submission.flags & Submission::HAS_PARENT != 0 { BlockKey::BYTES as u32 } else { 0 }
}

fn grant_out(answer: &ReserveAnswer) -> GrantOut {
    let (slot, word) = match answer {
        ReserveAnswer::Granted(slot, word) => (slot.0, word.0),
        _ => (SlotId::NONE.0, 0),
    };
    GrantOut { slot, answer: u32::from(answer.code()), word }
}

fn write_hit(ring: &Ring, submission: &Submission, reply: &LookupReply) -> Completion {
    let heads: Vec<GroupOut> =
        reply.groups.iter().map(|g| GroupOut { first_block: g.first_block, count: g.slots.len() as u32 }).collect();
    let slots: Vec<LookupOut> = reply
        .groups
        .iter()
        .flat_map(|group| &group.slots)
        .map(|(slot, word)| LookupOut { slot: slot.0, reserved: 0, word: word.0 })
        .collect();
    let (heads, slots_bytes) = (heads.as_bytes(), slots.as_bytes());
    ring.write_scratch(submission.out_offset, heads);
    ring.write_scratch(submission.out_offset + heads.len() as u32, slots_bytes);
    Completion {
        lease: reply.lease.map_or(0, |lease| lease.0),
        tokens: reply.tokens,
        count: slots.len() as u32,
        out_bytes: (heads.len() + slots_bytes.len()) as u32,
        flags: if reply.lease.is_none() && reply.tokens > 0 { Completion::UNPINNED } else { 0 },
        ..ok(submission)
    }
}
