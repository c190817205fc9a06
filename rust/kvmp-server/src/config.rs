//! The server's settings: defaults < TOML file < command line, parsed once into one frozen struct.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

use crate::error::ServerError;
use crate::listen::Doors;
use crate::size::parse_size;
use crate::span::parse_span;

/// Name of a server, and with it of its segment file and socket.
pub const DEFAULT_NAME: &str = "kvmp";
/// Where the segment lies.
pub const DEFAULT_ARENA_DIR: &str = "/dev/shm";
/// Rendezvous address for clients that are given a host and a port.
pub const DEFAULT_TCP: &str = "127.0.0.1:5555";

/// How long a server that is taken over from may take to let go of its segment.
const DEFAULT_DRAIN: Duration = Duration::from_secs(10);

/// How to take over from a running server.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Upgrade {
    /// Its socket, where that is not the new server's.
    pub from: Option<PathBuf>,
    /// How long it may take to let go of the segment.
    pub drain_timeout: Duration,
}

/// Settings of one server.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ServerConfig {
    /// Bytes of the arena.
    pub size: u64,
    /// Name: `[A-Za-z0-9._-]`, at most 64 characters.
    pub name: String,
    /// Folder of the segment file: tmpfs or hugetlbfs.
    pub arena_dir: PathBuf,
    /// Path of the unix socket.
    pub socket: PathBuf,
    /// TCP rendezvous; `None` is off.
    pub tcp: Option<SocketAddr>,
    /// Whether `tcp` was asked for: then a taken port is an error.
    pub tcp_required: bool,
    /// Name of the eviction policy.
    pub policy: String,
    /// Bytes of a chunk; `None` takes 1/64 of the arena.
    pub chunk: Option<u64>,
    /// Unlink the segment at a clean exit.
    pub ephemeral: bool,
    /// Start on a new, empty file whatever is there.
    pub fresh: bool,
    /// Other uids that may connect, beside the server's own and root.
    pub allow_uids: Vec<u32>,
    /// Process whose end ends `kvmp serve`.
    pub until_pid: Option<u32>,
    /// Take over from a server that runs under the name; `None`: refuse to start while one does.
    pub upgrade: Option<Upgrade>,
}

impl ServerConfig {
    /// Whom the socket's mode lets through.
    pub(crate) fn doors(&self) -> Doors {
        if self.allow_uids.is_empty() { Doors::Own } else { Doors::Open }
    }
}

/// The same settings, each of which may be missing: one source of them.
#[derive(Clone, Default, PartialEq, Eq, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct ConfigSource {
    /// As `--size`.
    pub size: Option<String>,
    /// As `--name`.
    pub name: Option<String>,
    /// As `--arena-dir`.
    pub arena_dir: Option<PathBuf>,
    /// As `--socket`.
    pub socket: Option<PathBuf>,
    /// As `--tcp`; `off` switches it off.
    pub tcp: Option<String>,
    /// As `--policy`.
    pub policy: Option<String>,
    /// As `--chunk`.
    pub chunk: Option<String>,
    /// As `--ephemeral`.
    pub ephemeral: Option<bool>,
    /// As `--fresh`.
    pub fresh: Option<bool>,
    /// As `--allow-uid`.
    pub allow_uid: Option<Vec<u32>>,
    /// As `--until-pid`.
    pub until_pid: Option<u32>,
    /// As `--upgrade`.
    pub upgrade: Option<bool>,
    /// As `--upgrade-from`.
    pub upgrade_from: Option<PathBuf>,
    /// As `--drain-timeout`.
    pub drain_timeout: Option<String>,
}

fn config_error(key: &str, why: impl std::fmt::Display) -> ServerError {
    ServerError::Config { key: key.to_owned(), why: why.to_string() }
}

impl ConfigSource {
    /// Reads a TOML file; unknown keys are refused by name.
    pub fn from_file(path: &Path) -> Result<Self, ServerError> {
        // A pipe would be waited for, a device has no end.
        if std::fs::metadata(path).is_ok_and(|found| !found.is_file()) {
            return Err(config_error("--config", format!("{} is no regular file", path.display())));
        }
        let text = std::fs::read_to_string(path)
            .map_err(|e| config_error("--config", format!("{} cannot be read: {e}", path.display())))?;
        toml::from_str(&text).map_err(|e| config_error("--config", format!("{}: {e}", path.display())))
    }

    /// This source's settings, and `below`'s where it has none.
    #[must_use]
    pub fn over(self, below: Self) -> Self {
        Self {
            size: self.size.or(below.size),
            name: self.name.or(below.name),
            arena_dir: self.arena_dir.or(below.arena_dir),
            socket: self.socket.or(below.socket),
            tcp: self.tcp.or(below.tcp),
            policy: self.policy.or(below.policy),
            chunk: self.chunk.or(below.chunk),
            ephemeral: self.ephemeral.or(below.ephemeral),
            fresh: self.fresh.or(below.fresh),
            allow_uid: self.allow_uid.or(below.allow_uid),
            until_pid: self.until_pid.or(below.until_pid),
            upgrade: self.upgrade.or(below.upgrade),
            upgrade_from: self.upgrade_from.or(below.upgrade_from),
            drain_timeout: self.drain_timeout.or(below.drain_timeout),
        }
    }

    /// Checks everything and fills in the defaults.
    pub fn resolve(self) -> Result<ServerConfig, ServerError> {
        let upgrade = self.upgrade()?;
        let size = self
            .size
            .ok_or_else(|| config_error("--size", "is missing; say how much memory to use, as in --size 4GiB"))?;
        let size = parse_size(&size).map_err(|e| config_error("--size", e))?;
        if size == 0 {
            return Err(config_error("--size", "must be more than 0"));
        }
        let chunk = self.chunk.map(|c| parse_size(&c)).transpose().map_err(|e| config_error("--chunk", e))?;
        let name = checked_name(self.name.unwrap_or_else(|| DEFAULT_NAME.into()))?;
        let tcp_required = self.tcp.is_some();
        let policy = self.policy.unwrap_or_else(|| "lru".into());
        kvmp_core::policy::factory(&policy).map_err(|e| config_error("--policy", e))?;
        Ok(ServerConfig {
            size,
            socket: self.socket.unwrap_or_else(|| default_socket(&name)),
            name,
            arena_dir: self.arena_dir.unwrap_or_else(|| DEFAULT_ARENA_DIR.into()),
            tcp: parse_tcp(self.tcp.as_deref().unwrap_or(DEFAULT_TCP))?,
            tcp_required,
            policy,
            chunk,
            ephemeral: self.ephemeral.unwrap_or(false),
            fresh: self.fresh.unwrap_or(false),
            allow_uids: self.allow_uid.unwrap_or_default(),
            until_pid: self.until_pid,
            upgrade,
        })
    }

    /// Naming a socket to take over from asks for it.
    fn upgrade(&self) -> Result<Option<Upgrade>, ServerError> {
        let given = self.drain_timeout.as_deref().map(parse_span).transpose();
        let drain_timeout = given.map_err(|e| config_error("--drain-timeout", e))?.unwrap_or(DEFAULT_DRAIN);
        let wanted = self.upgrade.unwrap_or(false) || self.upgrade_from.is_some();
        Ok(wanted.then(|| Upgrade { from: self.upgrade_from.clone(), drain_timeout }))
    }
}

/// Checks a server's name, which becomes part of file names.
pub fn checked_name(name: String) -> Result<String, ServerError> {
    let fine = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    if name.is_empty() || name.len() > 64 || name.starts_with('.') || !name.chars().all(fine) {
        return Err(config_error(
            "--name",
            format!("'{name}' must be 1 to 64 of A-Z a-z 0-9 . _ - and not begin with a dot"),
        ));
    }
    Ok(name)
}

/// `host:port` of a loopback address, or `off`.
fn parse_tcp(given: &str) -> Result<Option<SocketAddr>, ServerError> {
    if given == "off" {
        return Ok(None);
    }
    let text = given.strip_prefix("tcp://").unwrap_or(given).replace("localhost:", "127.0.0.1:");
    let address: SocketAddr = text.parse().map_err(|_| {
        config_error("--tcp", format!("'{given}' is no HOST:PORT of this machine, as in 127.0.0.1:5555"))
    })?;
    if !address.ip().is_loopback() {
        return Err(config_error(
            "--tcp",
            format!("'{given}' is not a loopback address; the cache is shared on one node only"),
        ));
    }
    Ok(Some(address))
}

/// `$XDG_RUNTIME_DIR/kvmp/NAME.sock`, else `/tmp/kvmp-UID/NAME.sock`.
#[must_use]
pub fn default_socket(name: &str) -> PathBuf {
    let dir = match std::env::var_os("XDG_RUNTIME_DIR").filter(|dir| Path::new(dir).is_dir()) {
        Some(dir) => Path::new(&dir).join("kvmp"),
        None => PathBuf::from(format!("/tmp/kvmp-{}", rustix::process::geteuid().as_raw())),
    };
    dir.join(format!("{name}.sock"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(text: &str) -> ConfigSource {
        toml::from_str(text).unwrap()
    }

    #[test]
    fn the_command_line_goes_over_the_file() {
        let cli = source("size = '1GiB'");
        let file = source("size = '2GiB'\nname = 'other'\nallow-uid = [7]");
        let config = cli.over(file).resolve().unwrap();
        assert_eq!((config.size, config.name.as_str(), config.allow_uids), (1 << 30, "other", vec![7]));
        assert!(!config.tcp_required);
    }

    #[test]
    fn taking_over_is_asked_for() {
        let upgrade = |text: &str| source(text).resolve().unwrap().upgrade;
        assert_eq!(upgrade("size = '1G'\ndrain-timeout = '3s'"), None);
        let given = upgrade("size = '1G'\nupgrade = true\ndrain-timeout = '3s'").unwrap();
        assert_eq!((given.from, given.drain_timeout), (None, Duration::from_secs(3)));
        let given = upgrade("size = '1G'\nupgrade-from = '/x'").unwrap();
        assert_eq!((given.from, given.drain_timeout), (Some("/x".into()), DEFAULT_DRAIN));
    }

    #[test]
    fn bad_values_name_their_key() {
        for (text, key) in [
            ("", "--size"),
            ("size = '0'", "--size"),
            ("size = 'much'", "--size"),
            ("size = '1G'\nchunk = 'x'", "--chunk"),
            ("size = '1G'\nname = '../x'", "--name"),
            ("size = '1G'\ntcp = '8.8.8.8:1'", "--tcp"),
            ("size = '1G'\ntcp = 'here'", "--tcp"),
            ("size = '1G'\npolicy = 'lur'", "--policy"),
            ("size = '1G'\ndrain-timeout = 'soon'", "--drain-timeout"),
        ] {
            let error = source(text).resolve().unwrap_err().to_string();
            assert!(error.contains(key), "{text}: {error}");
        }
        let unknown = toml::from_str::<ConfigSource>("sise = '1G'").unwrap_err().to_string();
        assert!(unknown.contains("sise"), "{unknown}");
    }
}
