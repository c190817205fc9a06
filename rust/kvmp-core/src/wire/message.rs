//! Socket messages: a 64-byte front that never changes, and a JSON body.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::namespace::NamespaceSpec;

/// Oldest protocol version this build speaks.
pub const PROTOCOL_MIN: u16 = 1;
/// Newest protocol version this build speaks.
pub const PROTOCOL_MAX: u16 = 1;
/// Bytes of a frame's front.
pub const FRAME_BYTES: usize = 64;
/// Longest body in bytes: a spec at its longest, escaped, with room to spare.
pub const MAX_BODY: usize = 96 << 10;
/// Feature of a server that lets readers in ([`Role::Reader`]); one without it refuses their hello.
pub const FEATURE_READERS: &str = "readers";
const MAGIC: [u8; 8] = *b"KVMPHELO";

/// Front of every message.
#[derive(Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub struct Frame {
    magic: [u8; 8],
    /// Oldest version the sender speaks.
    pub version_min: u16,
    /// Newest version the sender speaks.
    pub version_max: u16,
    /// Bytes of the body.
    pub body_bytes: u32,
    reserved: [u64; 6],
}

/// Why a message is not understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Shorter than a frame's front, or another magic.
    #[error("not a kvmp message ({0} bytes)")]
    NotKvmp(usize),
    /// No version in common.
    #[error(
        "the other side speaks kvmp protocol {min} to {max}, this side {PROTOCOL_MIN} to {PROTOCOL_MAX}; install the same kvmp version on both"
    )]
    Version {
        /// Oldest version there.
        min: u16,
        /// Newest version there.
        max: u16,
    },
    /// The length in the front is not the body's.
    #[error("message front says {said} bytes of body, {found} came (at most {MAX_BODY})")]
    Length {
        /// Length in the front.
        said: usize,
        /// Bytes received.
        found: usize,
    },
    /// The body is no message.
    #[error("message body: {0}")]
    Body(String),
}

impl Frame {
    /// Front for a body.
    #[must_use]
    pub fn new(body_bytes: usize) -> Self {
        Self {
            magic: MAGIC,
            version_min: PROTOCOL_MIN,
            version_max: PROTOCOL_MAX,
            body_bytes: body_bytes as u32,
            reserved: [0; 6],
        }
    }

    /// Checks a front.
    pub fn parse(bytes: &[u8]) -> Result<Self, FrameError> {
        let (frame, _) = Self::read_from_prefix(bytes).map_err(|_| FrameError::NotKvmp(bytes.len()))?;
        if frame.magic != MAGIC {
            return Err(FrameError::NotKvmp(bytes.len()));
        }
        if frame.version_max < PROTOCOL_MIN || frame.version_min > PROTOCOL_MAX {
            return Err(FrameError::Version { min: frame.version_min, max: frame.version_max });
        }
        if frame.body_bytes as usize > MAX_BODY {
            return Err(FrameError::Length { said: frame.body_bytes as usize, found: bytes.len() });
        }
        Ok(frame)
    }

    /// Front and body of a message.
    pub fn encode<M: Serialize>(message: &M) -> Result<Vec<u8>, FrameError> {
        let body = serde_json::to_vec(message).map_err(|e| FrameError::Body(e.to_string()))?;
        if body.len() > MAX_BODY {
            return Err(FrameError::Length { said: body.len(), found: body.len() });
        }
        let mut bytes = Self::new(body.len()).as_bytes().to_vec();
        bytes.extend_from_slice(&body);
        Ok(bytes)
    }

    /// The message in front and body.
    pub fn decode<M: for<'de> Deserialize<'de>>(bytes: &[u8]) -> Result<M, FrameError> {
        let frame = Self::parse(bytes)?;
        let body = &bytes[FRAME_BYTES..];
        if body.len() != frame.body_bytes as usize {
            return Err(FrameError::Length { said: frame.body_bytes as usize, found: body.len() });
        }
        serde_json::from_slice(body).map_err(|e| FrameError::Body(e.to_string()))
    }
}

/// What a client is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// An engine's scheduler: looks up, reserves; mints an engine token.
    Scheduler,
    /// An engine's worker: writes one part.
    Worker,
    /// A command line or a monitor: asks, holds nothing.
    Tool,
    /// An engine's worker whose part another one writes: it only loads it.
    Reader,
}

/// First message of a session.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Hello {
    /// What the client is.
    pub role: Role,
    /// Its process id, for messages only (the kernel's credentials are what counts).
    pub pid: u32,
    /// Engine to join (workers, readers).
    #[serde(default)]
    pub engine_token: Option<u64>,
    /// Part it writes (workers), or loads only (readers).
    #[serde(default)]
    pub part: Option<u16>,
    /// Whether its copies are DMA (their last byte may land after the process is gone).
    #[serde(default)]
    pub dma: bool,
    /// Names of optional features it knows; unknown ones are ignored.
    #[serde(default)]
    pub features: Vec<String>,
}

/// What a client says.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ClientMessage {
    /// Begins a session.
    Hello(Hello),
    /// Opens a namespace (scheduler, tool).
    Open {
        /// Its spec.
        spec: NamespaceSpec,
    },
    /// Joins a namespace that the scheduler opened (worker).
    Join {
        /// Its id.
        namespace: u16,
        /// Its digest as hex.
        digest: String,
        /// Layout of this worker's part.
        layout: Value,
    },
    /// Over TCP: where is the unix socket?
    Locate,
}

/// Sizes a client needs to map the segment.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Geometries {
    /// Bytes of a chunk.
    pub chunk_bytes: u64,
    /// Chunks.
    pub chunks: u32,
}

/// Answer to Hello; comes with the descriptors segment, ring, doorbell, holder entry (in this order).
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Welcome {
    /// Session number.
    pub session: u64,
    /// Life of the server.
    pub server_epoch: u64,
    /// Version of the server's package.
    pub server_version: String,
    /// Engine token: minted for a scheduler, given back to a worker, 0 for a tool.
    pub engine_token: u64,
    /// Identity of the segment, hex.
    pub segment_id: String,
    /// Sizes of the segment.
    pub geometry: Geometries,
    /// Most keys in one request.
    pub keys_max: u32,
    /// Names of optional features that both sides know.
    #[serde(default)]
    pub features: Vec<String>,
}

/// Answer to Open and Join.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Opened {
    /// Id to name in ring entries.
    pub namespace: u16,
    /// Digest of the spec, hex.
    pub digest: String,
    /// The spec.
    pub spec: NamespaceSpec,
}

/// Answer to Locate.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Located {
    /// Path of the unix socket.
    pub socket: String,
}

/// Why something was refused.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Refusal {
    /// No common protocol version.
    Version,
    /// The message makes no sense here.
    Protocol,
    /// The peer's uid is not allowed.
    Uid,
    /// The engine token is unknown, or its engine is closed.
    Engine,
    /// The namespace spec, id, digest or layout does not do.
    Namespace,
    /// A table is full.
    Full,
    /// The server is draining.
    ShuttingDown,
}

/// What the server says.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ServerMessage {
    /// The session stands.
    Welcome(Welcome),
    /// The namespace is open.
    Opened(Opened),
    /// Where the socket is.
    Located(Located),
    /// Not done, and why.
    Refused {
        /// Class of the reason.
        refusal: Refusal,
        /// The reason and the mend, for a person.
        message: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_round_trips() {
        let hello = Hello {
            role: Role::Worker,
            pid: 3,
            engine_token: Some(u64::MAX),
            part: Some(1),
            dma: false,
            features: vec![],
        };
        let bytes = Frame::encode(&ClientMessage::Hello(hello.clone())).unwrap();
        assert_eq!(Frame::decode::<ClientMessage>(&bytes).unwrap(), ClientMessage::Hello(hello));
    }

    #[test]
    fn every_lie_is_named() {
        let good = Frame::encode(&ClientMessage::Locate).unwrap();
        assert_eq!(Frame::decode::<ClientMessage>(&good[..10]), Err(FrameError::NotKvmp(10)));
        let mut other = good.clone();
        other[0] = b'X';
        assert!(matches!(Frame::decode::<ClientMessage>(&other), Err(FrameError::NotKvmp(_))));
        let mut newer = good.clone();
        newer[8..12].copy_from_slice(&[7, 0, 9, 0]);
        assert_eq!(Frame::decode::<ClientMessage>(&newer), Err(FrameError::Version { min: 7, max: 9 }));
        assert!(matches!(Frame::decode::<ClientMessage>(&good[..good.len() - 1]), Err(FrameError::Length { .. })));
        let mut huge = good.clone();
        huge[12..16].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(matches!(Frame::decode::<ClientMessage>(&huge), Err(FrameError::Length { .. })));
        let mut body = good;
        body[FRAME_BYTES] = b'?';
        assert!(matches!(Frame::decode::<ClientMessage>(&body), Err(FrameError::Body(_))));
    }
}
