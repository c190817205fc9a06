//! Settings of a server that a program embeds: `built -> started`.

use std::path::Path;

use crate::config::ConfigSource;
use crate::error::ServerError;
use crate::server::Server;

/// Settings for a server to be, by name; what is not set has its default.
#[derive(Clone, Debug, Default)]
pub struct ServerBuilder {
    source: ConfigSource,
}

impl ServerBuilder {
    /// Bytes of the arena; must be set.
    #[must_use]
    pub fn size(mut self, bytes: u64) -> Self {
        self.source.size = Some(bytes.to_string());
        self
    }

    /// Name of the server, its segment and its socket; `kvmp` unless set.
    #[must_use]
    pub fn name(mut self, name: &str) -> Self {
        self.source.name = Some(name.into());
        self
    }

    /// Folder of the segment; `/dev/shm` unless set.
    #[must_use]
    pub fn arena_dir(mut self, dir: &Path) -> Self {
        self.source.arena_dir = Some(dir.into());
        self
    }

    /// Path of the unix socket.
    #[must_use]
    pub fn socket(mut self, path: &Path) -> Self {
        self.source.socket = Some(path.into());
        self
    }

    /// TCP rendezvous `HOST:PORT`, or `off`.
    #[must_use]
    pub fn tcp(mut self, address: &str) -> Self {
        self.source.tcp = Some(address.into());
        self
    }

    /// Eviction policy; `lru` unless set.
    #[must_use]
    pub fn policy(mut self, name: &str) -> Self {
        self.source.policy = Some(name.into());
        self
    }

    /// Bytes of a chunk: a power of two from 2 MiB to 1 GiB.
    #[must_use]
    pub fn chunk(mut self, bytes: u64) -> Self {
        self.source.chunk = Some(bytes.to_string());
        self
    }

    /// Unlink the segment when the server stops.
    #[must_use]
    pub fn ephemeral(mut self, yes: bool) -> Self {
        self.source.ephemeral = Some(yes);
        self
    }

    /// Start empty, on a new file.
    #[must_use]
    pub fn fresh(mut self, yes: bool) -> Self {
        self.source.fresh = Some(yes);
        self
    }

    /// Watch a process, whose end is to end the server: [`Server::watched`] tells of it.
    #[must_use]
    pub fn until_pid(mut self, pid: u32) -> Self {
        self.source.until_pid = Some(pid);
        self
    }

    /// Checks the settings and starts the server's threads; answers clients when this returns.
    pub fn start(self) -> Result<Server, ServerError> {
        Server::start(self.source.resolve()?)
    }
}
