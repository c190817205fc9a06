//! The table of open requests.
//!
//! `Waiting -> Answered -> taken`, or `Waiting -> GivenUp -> settled`. A request keeps its scratch range until it is
//! taken or settled: until then the server may write there.

use std::collections::{HashMap, VecDeque};

use kvmp_core::ring::{RING_ENTRIES, Ring};
use kvmp_core::wire::{Code, Completion, Op, Submission};

use crate::ClientError;
use crate::scratch::{Range, Scratch};

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

#[derive(Debug, Clone, Copy)]
enum State {
    Waiting,
    GivenUp,
    Answered(Completion),
}

#[derive(Debug)]
struct Open {
    op: Op,
    input: Range,
    output: Range,
    state: State,
}

/// The requests of a session, and the lease ends it still owes the server.
#[derive(Debug)]
pub(crate) struct Requests {
    open: HashMap<u64, Open>,
    scratch: Scratch,
    owed: VecDeque<(Op, u64)>,
    last: u64,
}

/// A completion that no request of ours asked for, or that claims more than was given.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Unasked(pub String);

impl Requests {
    pub fn new() -> Self {
        Self { open: HashMap::new(), scratch: Scratch::new(), owed: VecDeque::new(), last: 0 }
    }

    /// Sets a request up: its id and ranges are in the entry returned, its input lies in the scratch area.
    pub fn begin(&mut self, ring: &Ring, ask: &Ask<'_>) -> Result<Submission, ClientError> {
        let busy = |open| ClientError::Busy { op: name(ask.op), open, bytes: ask.in_bytes() + ask.out_bytes };
        if self.open.len() as u64 >= RING_ENTRIES {
            return Err(busy(self.open.len()));
        }
        let (input, output) = self.ranges(ask.in_bytes(), ask.out_bytes).ok_or_else(|| busy(self.open.len()))?;
        let mut at = input.offset;
        for piece in ask.input {
            ring.write_scratch(at, piece);
            at += piece.len() as u32;
        }
        self.last += 1;
        self.open.insert(self.last, Open { op: ask.op, input, output, state: State::Waiting });
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

    /// Notes a completion; a late one is settled at once.
    pub fn answer(&mut self, completion: Completion) -> Result<(), Unasked> {
        let id = completion.request;
        let open = self.open.get_mut(&id).ok_or_else(|| Unasked(format!("a reply to request {id}, never made")))?;
        if completion.out_bytes > open.output.len {
            return Err(Unasked(format!("a reply of {} bytes where {} fit", completion.out_bytes, open.output.len)));
        }
        match open.state {
            State::Waiting => open.state = State::Answered(completion),
            State::GivenUp => self.settle(id, completion),
            State::Answered(_) => return Err(Unasked(format!("a second reply to request {id}"))),
        }
        Ok(())
    }

    /// Takes a reply that has come; its ranges are free afterwards.
    pub fn take(&mut self, ring: &Ring, id: u64) -> Option<Reply> {
        let State::Answered(completion) = self.open.get(&id)?.state else { return None };
        let open = self.close(id)?;
        let mut out = vec![0; completion.out_bytes as usize];
        ring.read_scratch(open.output.offset, &mut out);
        Some(Reply { completion, out })
    }

    /// Nobody wants the reply any more.
    pub fn give_up(&mut self, id: u64) {
        match self.open.get_mut(&id) {
            Some(Open { state: State::Answered(completion), .. }) => {
                let completion = *completion;
                self.settle(id, completion);
            }
            Some(open) => open.state = State::GivenUp,
            None => {}
        }
    }

    /// Wants a reply after all, if it has not come yet.
    pub fn adopt(&mut self, id: u64) -> bool {
        match self.open.get_mut(&id) {
            Some(open) => {
                open.state = State::Waiting;
                true
            }
            None => false,
        }
    }

    /// Ends the lease that a reply nobody wants granted, and frees its ranges.
    fn settle(&mut self, id: u64, completion: Completion) {
        let Some(open) = self.close(id) else { return };
        let granted = completion.code == Code::Ok as u16 && completion.lease != 0;
        match open.op {
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
        if self.open.len() as u64 >= RING_ENTRIES {
            return None;
        }
        let (op, lease) = self.owed.pop_front()?;
        self.last += 1;
        let none = Range::default();
        self.open.insert(self.last, Open { op, input: none, output: none, state: State::GivenUp });
        Some(Submission { request: self.last, op: op as u8, lease, ..Submission::default() })
    }

    /// Requests not taken or settled.
    pub fn len(&self) -> usize {
        self.open.len()
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
    }
}
