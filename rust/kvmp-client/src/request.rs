//! The table of open requests.
//!
//! `open -> answered -> taken`, or `open -> given up -> settled`. A request keeps its id and its scratch ranges until its
//! completion is harvested: until then the server may write there, and from then on the reply lies on the heap, so that
//! an answer nobody has asked for yet takes no room from other requests.

use std::collections::{HashMap, VecDeque};

use kvmp_core::ring::{RING_ENTRIES, Ring};
use kvmp_core::wire::{Code, Completion, Op, Submission};

use crate::ClientError;
use crate::scratch::{Range, Scratch};

/// Ids that only lease ends and pings get, and among them those that only pings get: however many questions wait, leases
/// are ended and a lost server is asked for a sign of life.
const KEPT_FOR_ENDS: u64 = 64;
const KEPT_FOR_PINGS: u64 = 8;

/// How many requests may be open when one of this op is added.
const fn most_open(op: Op) -> usize {
    let kept = match op {
        Op::Ping => 0,
        Op::Release | Op::Cancel => KEPT_FOR_PINGS,
        _ => KEPT_FOR_PINGS + KEPT_FOR_ENDS,
    };
    (RING_ENTRIES - kept) as usize
}

/// What to submit. The input's pieces are laid end to end.
#[derive(Clone, Copy)]
pub(crate) struct Ask<'a> {
    pub op: Op,
    pub entry: Submission,
    pub input: &'a [&'a [u8]],
    pub out_bytes: usize,
}

impl Ask<'_> {
    /// A question without input or output.
    pub fn plain(op: Op) -> Self {
        Self { op, entry: Submission::default(), input: &[], out_bytes: 0 }
    }

    fn in_bytes(&self) -> usize {
        self.input.iter().map(|piece| piece.len()).sum()
    }
}

/// A reply, taken out of shared memory.
#[derive(Debug)]
pub(crate) struct Reply {
    pub completion: Completion,
    pub out: Vec<u8>,
}

#[derive(Debug)]
struct Open {
    op: Op,
    input: Range,
    output: Range,
    given_up: bool,
}

/// The requests of a session, and the lease ends it still owes the server.
#[derive(Debug)]
pub(crate) struct Requests {
    open: HashMap<u64, Open>,
    /// Replies that have come and are not taken.
    answered: HashMap<u64, (Op, Reply)>,
    scratch: Scratch,
    owed: VecDeque<(Op, u64)>,
    last: u64,
}

/// A completion that no request of ours asked for, or that claims more than was given.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Unasked(pub String);

impl Requests {
    pub fn new() -> Self {
        Self { open: HashMap::new(), answered: HashMap::new(), scratch: Scratch::new(), owed: VecDeque::new(), last: 0 }
    }

    /// Sets a request up: its id and ranges are in the entry returned, its input lies in the scratch area.
    pub fn begin(&mut self, ring: &Ring, ask: &Ask<'_>) -> Result<Submission, ClientError> {
        let busy = |open| ClientError::Busy { op: name(ask.op), open, bytes: ask.in_bytes() + ask.out_bytes };
        if self.open.len() >= most_open(ask.op) {
            return Err(busy(self.open.len()));
        }
        let (input, output) = self.ranges(ask.in_bytes(), ask.out_bytes).ok_or_else(|| busy(self.open.len()))?;
        let mut at = input.offset;
        for piece in ask.input {
            ring.write_scratch(at, piece);
            at += piece.len() as u32;
        }
        self.last += 1;
        self.open.insert(self.last, Open { op: ask.op, input, output, given_up: false });
        Ok(Submission {
            request: self.last,
            op: ask.op as u8,
            in_offset: input.offset,
            in_bytes: input.len,
            out_offset: output.offset,
            out_bytes: output.len,
            ..ask.entry
        })
    }

    fn ranges(&mut self, input: usize, output: usize) -> Option<(Range, Range)> {
        let input = self.scratch.take(input)?;
        match self.scratch.take(output) {
            Some(output) => Some((input, output)),
            None => {
                self.scratch.give(input);
                None
            }
        }
    }

    /// Takes a completion in: its bytes are copied out, its id and ranges are free. A late one is settled at once.
    pub fn answer(&mut self, ring: &Ring, completion: Completion) -> Result<(), Unasked> {
        let id = completion.request;
        let open = self.close(id).ok_or_else(|| Unasked(format!("a reply to request {id}, which is not open")))?;
        if completion.out_bytes > open.output.len {
            return Err(Unasked(format!("a reply of {} bytes where {} fit", completion.out_bytes, open.output.len)));
        }
        if open.given_up {
            self.settle(open.op, completion);
        } else {
            let mut out = vec![0; completion.out_bytes as usize];
            ring.read_scratch(open.output.offset, &mut out);
            self.answered.insert(id, (open.op, Reply { completion, out }));
        }
        Ok(())
    }

    /// Takes a reply that has come.
    pub fn take(&mut self, id: u64) -> Option<Reply> {
        self.answered.remove(&id).map(|(_, reply)| reply)
    }

    /// Nobody wants the reply any more.
    pub fn give_up(&mut self, id: u64) {
        if let Some((op, reply)) = self.answered.remove(&id) {
            self.settle(op, reply.completion);
        } else if let Some(open) = self.open.get_mut(&id) {
            open.given_up = true;
        }
    }

    /// Wants a reply after all, if it has not come yet.
    pub fn adopt(&mut self, id: u64) -> bool {
        self.open.get_mut(&id).map(|open| open.given_up = false).is_some()
    }

    /// Ends the lease that a reply nobody wants granted.
    fn settle(&mut self, op: Op, completion: Completion) {
        let granted = completion.code == Code::Ok as u16 && completion.lease != 0;
        match op {
            Op::Lookup if granted => self.owe(Op::Release, completion.lease),
            Op::Reserve if granted => self.owe(Op::Cancel, completion.lease),
            _ => {}
        }
    }

    fn close(&mut self, id: u64) -> Option<Open> {
        let open = self.open.remove(&id)?;
        self.scratch.give(open.input);
        self.scratch.give(open.output);
        Some(open)
    }

    /// Notes that a lease is to be ended as soon as there is room to say so.
    pub fn owe(&mut self, op: Op, lease: u64) {
        self.owed.push_back((op, lease));
    }

    /// The next lease end to submit, as a request whose reply nobody waits for.
    pub fn next_owed(&mut self) -> Option<Submission> {
        if self.open.len() >= most_open(Op::Release) {
            return None;
        }
        let (op, lease) = self.owed.pop_front()?;
        self.last += 1;
        let none = Range::default();
        self.open.insert(self.last, Open { op, input: none, output: none, given_up: true });
        Some(Submission { request: self.last, op: op as u8, lease, ..Submission::default() })
    }

    /// Requests not taken or settled.
    pub fn len(&self) -> usize {
        self.open.len() + self.answered.len()
    }
}

/// Name of an op in messages.
pub(crate) fn name(op: Op) -> &'static str {
    match op {
        Op::Ping => "ping",
        Op::Lookup => "lookup",
        Op::Reserve => "reserve",
        Op::Commit => "commit",
        Op::Abort => "abort",
        Op::Cancel => "cancel",
        Op::Release => "release",
        Op::Stats => "stats",
        Op::Clear => "clear",
        Op::Fetch => "fetch",
        Op::Distrust => "distrust",
    }
}
