//! What can go wrong for a client, with the values that show why.

use std::io::ErrorKind;

use kvmp_core::wire::{Code, Refusal, SocketError};

/// Why a session answers no more, for now or for good.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LostWhy {
    /// The server closed the connection; what it said last, if anything.
    #[error("the server closed the session{}; connect again", said(.0))]
    HungUp(Option<String>),
    /// A call passed its bound, and no ping has been answered since.
    #[error("{op} was not answered within {limit_ms} ms, and no ping since")]
    MissedBound {
        /// The call.
        op: &'static str,
        /// Its bound in milliseconds.
        limit_ms: u64,
    },
    /// The server wrote what the protocol does not allow.
    #[error("the session was given up after a protocol error: {0}; connect again")]
    Protocol(String),
    /// The server is draining.
    #[error("the server is shutting down; connect again once it is back")]
    ShuttingDown,
    /// This side closed the client.
    #[error("this client was closed")]
    Closed,
}

fn said(message: &Option<String>) -> String {
    message.as_ref().map(|text| format!(" ({text})")).unwrap_or_default()
}

/// A failed call.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// An endpoint that is neither `unix:PATH` nor `tcp://HOST:PORT`.
    #[error("endpoint {endpoint:?}: {why}; write unix:PATH or tcp://HOST:PORT")]
    Endpoint {
        /// As given.
        endpoint: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// Nobody listens there: the socket does not exist, or it or the port refuses.
    #[error("no kvmp server at {endpoint}: {source}; start one with `kvmp serve`, or name the right endpoint")]
    NoServer {
        /// Where.
        endpoint: String,
        /// The system's reason.
        source: std::io::Error,
    },
    /// Whether anybody listens there cannot be told.
    #[error("{endpoint} cannot be reached: {source}; name the right endpoint, or mend what keeps this process from it")]
    Unreachable {
        /// Where.
        endpoint: String,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A server answers over TCP, but the socket it names is not to be found from here.
    #[error(
        "the kvmp server at {endpoint} has its socket at {}, which is not there: {source}; in a container, map the \
         server's folder and name it as `socket_dir` (kvmp.socket_dir)", path.display()
    )]
    SocketElsewhere {
        /// The rendezvous.
        endpoint: String,
        /// Where the socket was looked for.
        path: std::path::PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The process that listens there runs as another user.
    #[error(
        "the server at {endpoint} runs as uid {uid}, this process as {own}; run both as one user, or allow that uid"
    )]
    PeerUid {
        /// Where.
        endpoint: String,
        /// Its uid.
        uid: u32,
        /// Ours.
        own: u32,
    },
    /// The hello went wrong.
    #[error("hello to {endpoint}: {source}")]
    Hello {
        /// Where.
        endpoint: String,
        /// What happened.
        source: SocketError,
    },
    /// The server refused the session.
    #[error("{endpoint} refused: {message}")]
    Refused {
        /// Where.
        endpoint: String,
        /// Class of the reason.
        refusal: Refusal,
        /// The server's own words.
        message: String,
    },
    /// What the server sent cannot be mapped, or is not what its Welcome says.
    #[error("cannot attach to the server's memory: {0}")]
    Attach(String),
    /// The mapping does not hold what a call names.
    #[error("{0}")]
    Segment(String),
    /// The session answers no more.
    #[error("server lost: {0}")]
    Lost(LostWhy),
    /// This call passed its bound; the session is lost until a ping is answered.
    #[error("{op} was not answered within {limit_ms} ms; the server is taken for lost until it answers a ping")]
    BoundExceeded {
        /// The call.
        op: &'static str,
        /// Its bound in milliseconds.
        limit_ms: u64,
    },
    /// No room for one more request now. Nothing was asked and nothing is lost: ask again once replies have come.
    #[error(
        "no room for {op}: {open} requests are unanswered, and {bytes} bytes in a row of the scratch area are needed; \
         ask again once replies have come"
    )]
    Busy {
        /// The call.
        op: &'static str,
        /// Requests that the server has not answered.
        open: usize,
        /// Bytes the call needs.
        bytes: usize,
    },
    /// The server broke the protocol.
    #[error("the server broke the protocol: {0}")]
    Protocol(String),
    /// A namespace spec, id, digest or layout was refused, or the namespace is another session's.
    #[error("{0}")]
    Namespace(String),
    /// The server refused a request about a lease.
    #[error("{op}: {}", lease_text(.code))]
    Lease {
        /// The call.
        op: &'static str,
        /// The server's code.
        code: Code,
    },
    /// A write lease of another life of the server.
    #[error("the lease is of server epoch {lease}, this session of {session}; nothing may be stored under it")]
    Epoch {
        /// Epoch of the lease.
        lease: u64,
        /// Epoch of this session.
        session: u64,
    },
    /// A bad argument.
    #[error("{name}: {why}")]
    Input {
        /// The argument.
        name: &'static str,
        /// What is wrong with it.
        why: String,
    },
    /// A layout or a copy that cannot be.
    #[error(transparent)]
    Copy(#[from] crate::copy::CopyError),
    /// This process is a fork of the one that connected.
    #[error(
        "this kvmp client belongs to process {parent}, and this is a fork of it; a client does not pass through fork(): \
         connect in the child (with multiprocessing, use the \"spawn\" start method)"
    )]
    Forked {
        /// The process that connected.
        parent: u32,
    },
    /// The caller asked to stop waiting.
    #[error("interrupted")]
    Interrupted,
}

fn lease_text(code: &Code) -> &'static str {
    match code {
        Code::Forbidden => "this session's role or part may not do that",
        _ => "no such lease, or it has ended",
    }
}

/// What a failed connect says of `endpoint`.
pub(crate) fn not_connected(endpoint: String, source: std::io::Error) -> ClientError {
    match source.kind() {
        // Of an address: this machine has none such. A host name without an address has no raw code.
        ErrorKind::NotFound | ErrorKind::ConnectionRefused | ErrorKind::AddrNotAvailable
            if source.raw_os_error().is_some() =>
        {
            ClientError::NoServer { endpoint, source }
        }
        _ => ClientError::Unreachable { endpoint, source },
    }
}

pub(crate) fn input(name: &'static str, why: impl Into<String>) -> ClientError {
    ClientError::Input { name, why: why.into() }
}
