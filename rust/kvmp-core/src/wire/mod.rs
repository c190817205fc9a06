//! What crosses between a client and the server: ring entries, socket messages, codes.

mod entry;
mod message;
mod socket;

pub use entry::{
    Answer, Code, Completion, GrantOut, GroupOut, LOOKUP_MAX, LookupOut, Op, PartIn, Submission, out_bytes_lookup,
};
pub use message::{
    ClientMessage, FEATURE_READERS, FRAME_BYTES, Frame, FrameError, Geometries, Hello, Located, MAX_BODY, Opened,
    PROTOCOL_MAX, PROTOCOL_MIN, Refusal, Role, ServerMessage, Welcome,
};
pub use socket::{SocketError, peer_uid, receive, send};
