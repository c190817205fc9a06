//! Lookup: one hash list in, a read lease out. A list longer than one request takes goes on after a full hit.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kvmp_core::wire::{Completion, GroupOut, LookupOut, Op, Submission, out_bytes_lookup};
use zerocopy::FromBytes;

use crate::error::input;
use crate::lease::{GroupRun, ReadLease};
use crate::request::{Ask, Reply};
use crate::session::{Session, Ticket};
use crate::stats::expect_ok;
use crate::{Bound, ClientError, Namespace};

/// A lookup under way. Dropped, its reply is settled when it comes: the lease is released.
pub struct PendingLookup {
    session: Arc<Session>,
    namespace: Namespace,
    ticket: Ticket,
    /// Hashes of the list's pieces that were not asked for yet.
    rest: Vec<[u8; 32]>,
    /// Most hashes in one piece.
    piece: usize,
    /// Hashes of the piece under way.
    asked: usize,
    /// Block of the chain that the piece under way begins at.
    first_block: u32,
    lease: Option<ReadLease>,
    submitted: Instant,
}

impl PendingLookup {
    pub(crate) fn submit(
        session: &Arc<Session>,
        keys_max: u32,
        namespace: &Namespace,
        hashes: &[[u8; 32]],
    ) -> Result<Self, ClientError> {
        namespace.check_session(session)?;
        let piece = piece_len(keys_max, namespace, hashes.len())?;
        let (first, rest) = hashes.split_at(piece.min(hashes.len()));
        let ticket = submit_piece(session, namespace, first, 0)?;
        let lease = ReadLease::empty(session.clone(), namespace.spec().groups.len());
        Ok(Self {
            session: session.clone(),
            namespace: namespace.clone(),
            ticket,
            rest: rest.to_vec(),
            piece,
            asked: first.len(),
            first_block: 0,
            lease: Some(lease),
            submitted: Instant::now(),
        })
    }

    /// The hit, once it is known; never waits. `None` also after it was given out.
    ///
    /// # Errors
    /// The session is lost, the namespace is not open, or the server broke the protocol.
    pub fn poll(&mut self) -> Result<Option<ReadLease>, ClientError> {
        self.poll_for(Duration::ZERO, Duration::ZERO)
    }

    /// As [`Self::poll`], but waits until the lookup is `moment` old, for `limit` at most: a server that is awake answers
    /// sooner than the caller would come back. One that is not loses no session by it.
    ///
    /// # Errors
    /// As [`Self::poll`].
    pub fn poll_for(&mut self, moment: Duration, limit: Duration) -> Result<Option<ReadLease>, ClientError> {
        let from = Instant::now();
        loop {
            let young = moment.saturating_sub(self.submitted.elapsed());
            let Some(reply) = self.ticket.poll_for(young.min(limit.saturating_sub(from.elapsed())))? else {
                return Ok(None);
            };
            if self.absorb(&reply)? {
                return Ok(self.lease.take());
            }
        }
    }

    /// The hit, within the bound.
    ///
    /// # Errors
    /// As [`Self::poll`], and when the bound passes: then the session is lost.
    pub fn wait(mut self, bound: &Bound<'_>) -> Result<ReadLease, ClientError> {
        loop {
            let reply = self.ticket.wait(bound)?;
            if self.absorb(&reply)?
                && let Some(lease) = self.lease.take()
            {
                return Ok(lease);
            }
        }
    }

    /// Adds a piece's hit; whether that was the last piece.
    fn absorb(&mut self, reply: &Reply) -> Result<bool, ClientError> {
        expect_ok(Op::Lookup, &reply.completion)?;
        let Some(lease) = self.lease.as_mut() else { return Ok(true) };
        let pinned = reply.completion.flags & Completion::UNPINNED == 0;
        lease.add(reply.completion.lease, reply.completion.tokens, pinned);
        let runs = runs(&reply.out, lease.groups.len())
            .ok_or_else(|| ClientError::Protocol("a lookup's answer does not add up".into()))?;
        append(&mut lease.groups, runs, self.first_block);
        let hit = self.asked as u64 * u64::from(self.namespace.spec().hash_tokens());
        if self.rest.is_empty() || u64::from(reply.completion.tokens) < hit {
            return Ok(true);
        }
        Ok(self.next_piece().is_err())
    }

    /// Where the next piece cannot be asked for, what was hit so far is the answer.
    fn next_piece(&mut self) -> Result<(), ClientError> {
        let rest = self.rest.split_off(self.piece.min(self.rest.len()));
        let next = std::mem::replace(&mut self.rest, rest);
        let first_block = self.first_block + (self.asked / stride(&self.namespace)) as u32;
        self.ticket = submit_piece(&self.session, &self.namespace, &next, first_block)?;
        (self.first_block, self.asked) = (first_block, next.len());
        Ok(())
    }
}

fn piece_len(keys_max: u32, namespace: &Namespace, hashes: usize) -> Result<usize, ClientError> {
    let most = keys_max as usize;
    if hashes == 0 {
        return Err(input("hashes", "the list is empty"));
    }
    if hashes <= most {
        return Ok(most);
    }
    let stride = stride(namespace);
    if !namespace.is_one_prefix() || stride > most {
        return Err(input(
            "hashes",
            format!("{hashes} hashes; a namespace of several groups, or of no prefix group, takes {most} at once"),
        ));
    }
    Ok(most / stride * stride)
}

/// Hashes a block of the first group.
fn stride(namespace: &Namespace) -> usize {
    namespace.spec().groups.first().map_or(1, |group| group.hash_stride as usize).max(1)
}

fn submit_piece(
    session: &Arc<Session>,
    namespace: &Namespace,
    hashes: &[[u8; 32]],
    first_block: u32,
) -> Result<Ticket, ClientError> {
    session.submit(&Ask {
        op: Op::Lookup,
        entry: Submission {
            namespace: namespace.id(),
            count: hashes.len() as u32,
            first_block,
            ..Submission::default()
        },
        input: &[hashes.as_flattened()],
        out_bytes: out_bytes_lookup(namespace.spec().groups.len(), hashes.len()),
    })
}

/// Parses an answer; `None` where its lengths do not add up.
fn runs(out: &[u8], groups: usize) -> Option<Vec<GroupRun>> {
    let (fronts, mut blocks) = out.split_at_checked(groups * size_of::<GroupOut>())?;
    let mut runs = Vec::with_capacity(groups);
    for front in fronts.chunks_exact(size_of::<GroupOut>()) {
        let front = GroupOut::read_from_bytes(front).ok()?;
        let (own, others) = blocks.split_at_checked((front.count as usize).checked_mul(size_of::<LookupOut>())?)?;
        runs.push(run(front.first_block, own)?);
        blocks = others;
    }
    blocks.is_empty().then_some(runs)
}

fn run(first_block: u32, blocks: &[u8]) -> Option<GroupRun> {
    let count = blocks.len() / size_of::<LookupOut>();
    let (mut slots, mut words) = (Vec::with_capacity(count), Vec::with_capacity(count));
    for block in blocks.chunks_exact(size_of::<LookupOut>()) {
        let block = LookupOut::read_from_bytes(block).ok()?;
        slots.push(block.slot);
        words.push(block.word);
    }
    Some(GroupRun { first_block, slots, words })
}

fn append(groups: &mut [GroupRun], runs: Vec<GroupRun>, offset: u32) {
    for (group, run) in groups.iter_mut().zip(runs) {
        if group.slots.is_empty() {
            group.first_block = run.first_block + offset;
        }
        group.slots.extend(run.slots);
        group.words.extend(run.words);
    }
}
