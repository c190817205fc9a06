//! Stats and clear, and what a reply's code means.

use std::sync::Arc;

use kvmp_core::wire::{Code, Completion, Op};

use crate::error::LostWhy;
use crate::request::{Ask, name};
use crate::session::Session;
use crate::{Bound, ClientError};

/// Room for the counters, then for as many as there may ever be.
const STATS_BYTES: [usize; 2] = [16 << 10, 1 << 20];

/// The server's counters as JSON.
pub(crate) fn stats(session: &Arc<Session>, bound: &Bound<'_>) -> Result<String, ClientError> {
    for out_bytes in STATS_BYTES {
        let reply = session.submit(&Ask { out_bytes, ..Ask::plain(Op::Stats) })?.wait(bound)?;
        if reply.completion.code == Code::OutTooSmall as u16 {
            continue;
        }
        expect_ok(Op::Stats, &reply.completion)?;
        return String::from_utf8(reply.out).map_err(|e| ClientError::Protocol(format!("stats: {e}")));
    }
    Err(ClientError::Protocol(format!("stats do not fit {} bytes", STATS_BYTES[1])))
}

/// Evicts what is Ready and not pinned; how many blocks.
pub(crate) fn clear(session: &Arc<Session>, bound: &Bound<'_>) -> Result<u32, ClientError> {
    let reply = session.submit(&Ask::plain(Op::Clear))?.wait(bound)?;
    expect_ok(Op::Clear, &reply.completion)?;
    Ok(reply.completion.count)
}

/// Turns a code that is not `Ok` into what a caller can tell apart.
pub(crate) fn expect_ok(op: Op, completion: &Completion) -> Result<(), ClientError> {
    let op = name(op);
    let Some(code) = Code::from_u16(completion.code) else {
        return Err(ClientError::Protocol(format!("{op} was answered with the unknown code {}", completion.code)));
    };
    match code {
        Code::Ok => Ok(()),
        Code::UnknownNamespace => {
            Err(ClientError::Namespace(format!("{op}: the session has not opened or joined that namespace")))
        }
        Code::UnknownGroup => Err(crate::error::input("group", format!("{op}: the namespace has no such group"))),
        Code::UnknownLease | Code::Forbidden => Err(ClientError::Lease { op, code }),
        Code::ShuttingDown => Err(ClientError::Lost(LostWhy::ShuttingDown)),
        Code::Unsupported | Code::OutTooSmall => Err(ClientError::Protocol(format!("{op} was answered with {code:?}"))),
    }
}
