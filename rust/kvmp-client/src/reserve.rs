//! Reserve: consecutive hashes in, one answer a hash and a write lease out.

use std::sync::Arc;

use kvmp_core::namespace::GroupRule;
use kvmp_core::wire::{Answer, GrantOut, Op, Submission};
use zerocopy::FromBytes;

use crate::error::input;
use crate::lease::WriteLease;
use crate::request::{Ask, Reply};
use crate::session::{Session, Ticket};
use crate::stats::expect_ok;
use crate::{Bound, ClientError, Namespace};

/// What to reserve: blocks `first_block..` of one chain and group.
#[derive(Debug, Clone, Copy)]
pub struct ReserveList<'a> {
    /// Hashes of consecutive blocks. Beyond the server's most a request, the answer is "no space".
    pub hashes: &'a [[u8; 32]],
    /// Index of the first of them in its chain.
    pub first_block: u32,
    /// Hash before the first one; none for block 0.
    pub parent: Option<&'a [u8; 32]>,
    /// The group.
    pub group: u16,
}

impl ReserveList<'_> {
    fn check(&self, namespace: &Namespace) -> Result<(), ClientError> {
        namespace.slot_layout(self.group)?;
        if self.hashes.is_empty() {
            return Err(input("hashes", "the list is empty"));
        }
        if u64::from(self.first_block) + self.hashes.len() as u64 > u64::from(u32::MAX) {
            return Err(input("first_block", "the last block's index is over 32 bits"));
        }
        let rule = namespace.spec().groups.get(usize::from(self.group)).map(|group| group.rule);
        match (self.parent, self.first_block) {
            // Only in a prefix group does a block hang on the one before it.
            _ if rule != Some(GroupRule::Prefix) => Ok(()),
            (Some(_), 0) => Err(input("parent", "block 0 has none")),
            (None, 1..) => Err(input("parent", "the hash before hashes[0] is needed when first_block > 0")),
            _ => Ok(()),
        }
    }
}

/// A reserve under way. Dropped, its reply is settled when it comes: the lease is cancelled.
pub struct PendingReserve {
    session: Arc<Session>,
    ticket: Ticket,
    asked: usize,
    wanted: usize,
}

impl PendingReserve {
    pub(crate) fn submit(
        session: &Arc<Session>,
        keys_max: u32,
        namespace: &Namespace,
        list: &ReserveList<'_>,
    ) -> Result<Self, ClientError> {
        namespace.check_session(session)?;
        list.check(namespace)?;
        let hashes = &list.hashes[..list.hashes.len().min(keys_max as usize)];
        let parent: &[u8] = list.parent.map_or(&[], |key| key);
        let ticket = session.submit(&Ask {
            op: Op::Reserve,
            entry: Submission {
                namespace: namespace.id(),
                group: list.group,
                flags: if parent.is_empty() { 0 } else { Submission::HAS_PARENT },
                count: hashes.len() as u32,
                first_block: list.first_block,
                ..Submission::default()
            },
            input: &[parent, hashes.as_flattened()],
            out_bytes: size_of_val(hashes) / 32 * size_of::<GrantOut>(),
        })?;
        Ok(Self { session: session.clone(), ticket, asked: hashes.len(), wanted: list.hashes.len() })
    }

    /// The lease, once the answer is there; never waits. `None` also after it was given out.
    ///
    /// # Errors
    /// The session is lost, the namespace is not open, or the server broke the protocol.
    pub fn poll(&mut self) -> Result<Option<WriteLease>, ClientError> {
        match self.ticket.poll()? {
            Some(reply) => self.lease(&reply).map(Some),
            None => Ok(None),
        }
    }

    /// The lease, within the bound.
    ///
    /// # Errors
    /// As [`Self::poll`], and when the bound passes: then the session is lost.
    pub fn wait(mut self, bound: &Bound<'_>) -> Result<WriteLease, ClientError> {
        let reply = self.ticket.wait(bound)?;
        self.lease(&reply)
    }

    fn lease(&self, reply: &Reply) -> Result<WriteLease, ClientError> {
        expect_ok(Op::Reserve, &reply.completion)?;
        let mut lease = WriteLease::new(self.session.clone(), reply.completion.lease, self.wanted);
        if reply.out.len() != self.asked * size_of::<GrantOut>() {
            return Err(ClientError::Protocol("a reserve's answer does not add up".into()));
        }
        for grant in reply.out.chunks_exact(size_of::<GrantOut>()) {
            let grant = GrantOut::read_from_bytes(grant).unwrap_or_default();
            lease.answers.push(u8::try_from(grant.answer).unwrap_or(Answer::NoSpace as u8));
            lease.slots.push(grant.slot);
            lease.words.push(grant.word);
        }
        lease.answers.resize(self.wanted, Answer::NoSpace as u8);
        lease.slots.resize(self.wanted, u32::MAX);
        lease.words.resize(self.wanted, 0);
        Ok(lease)
    }
}
