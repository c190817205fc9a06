//! An open namespace, as requests and copies need it.

use std::sync::Arc;

use kvmp_core::ids::GroupId;
use kvmp_core::namespace::{GroupRule, NamespaceSpec, SlotLayout};
use kvmp_core::wire::Opened;

use crate::ClientError;
use crate::error::input;
use crate::session::Session;

/// A namespace that a session opened or joined.
#[derive(Debug, Clone)]
pub struct Namespace {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    id: u16,
    digest: String,
    spec: NamespaceSpec,
    slots: Vec<SlotLayout>,
    session: u64,
    epoch: u64,
}

impl Namespace {
    pub(crate) fn new(opened: Opened, session: &Session) -> Result<Self, ClientError> {
        let hex: String = opened.spec.digest().iter().map(|byte| format!("{byte:02x}")).collect();
        if hex != opened.digest {
            return Err(ClientError::Protocol(format!(
                "a spec with the digest {hex} came back as {}: client and server differ",
                opened.digest
            )));
        }
        let slots = (0..opened.spec.groups.len()).map(|g| opened.spec.slot_layout(GroupId(g as u16))).collect();
        let Opened { namespace: id, digest, spec } = opened;
        let inner = Inner { id, digest, spec, slots, session: session.number, epoch: session.epoch };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Number of the namespace in this segment.
    #[must_use]
    pub fn id(&self) -> u16 {
        self.inner.id
    }

    /// Digest of the spec, 64 hex digits.
    #[must_use]
    pub fn digest(&self) -> &str {
        &self.inner.digest
    }

    /// The spec.
    #[must_use]
    pub fn spec(&self) -> &NamespaceSpec {
        &self.inner.spec
    }

    /// Life of the server that this holds for.
    #[must_use]
    pub fn server_epoch(&self) -> u64 {
        self.inner.epoch
    }

    /// Where the parts lie in a slot of a group.
    pub fn slot_layout(&self, group: u16) -> Result<&SlotLayout, ClientError> {
        let groups = self.inner.slots.len();
        self.inner
            .slots
            .get(usize::from(group))
            .ok_or_else(|| input("group", format!("{group} is out of range: the namespace has {groups}")))
    }

    /// Whether a hash list may be cut in pieces: only where a hit is a prefix of one list.
    pub(crate) fn is_one_prefix(&self) -> bool {
        matches!(self.inner.spec.groups.as_slice(), [group] if group.rule == GroupRule::Prefix)
    }

    /// Refuses a namespace of another session: its id may mean something else there.
    pub(crate) fn check_session(&self, session: &Session) -> Result<(), ClientError> {
        if (self.inner.session, self.inner.epoch) == (session.number, session.epoch) {
            return Ok(());
        }
        Err(ClientError::Namespace(format!(
            "namespace {} was opened by another session; open or join it with this client",
            self.inner.id
        )))
    }
}
