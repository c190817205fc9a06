//! `kvmp serve`: starts, says so in one line, waits for a signal, drains, says what it leaves.

use std::path::PathBuf;
use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use super::bus;
use super::log::Log;
use crate::config::ConfigSource;
use crate::error::{Context, ServerError};
use crate::server::Server;
use crate::size::Bytes;

/// How often the main thread looks whether the server's own threads still run.
const GLANCE: Duration = Duration::from_millis(100);

#[derive(clap::Args, Debug)]
pub(super) struct ServeArgs {
    /// Memory for KV blocks, as in 64GiB or 500MB
    #[arg(long)]
    pub size: Option<String>,
    /// Path of the unix socket [default: $XDG_RUNTIME_DIR/kvmp/NAME.sock, else /tmp/kvmp-UID/NAME.sock]
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// Loopback address that tells clients the socket's path, or `off` [default: 127.0.0.1:5555]
    #[arg(long, value_name = "HOST:PORT")]
    pub tcp: Option<String>,
    /// Eviction policy [default: lru]
    #[arg(long)]
    pub policy: Option<String>,
    /// Name of the server, its segment file and its socket [default: kvmp]
    #[arg(long)]
    pub name: Option<String>,
    /// Folder of the segment file, a tmpfs or hugetlbfs [default: /dev/shm]
    #[arg(long, value_name = "DIR")]
    pub arena_dir: Option<PathBuf>,
    /// Size of a chunk, a power of two from 2MiB to 1GiB [default: 1/64 of the size]
    #[arg(long, value_name = "SIZE")]
    pub chunk: Option<String>,
    /// Remove the segment at a clean exit
    #[arg(long)]
    pub ephemeral: bool,
    /// Start empty, on a new segment, whatever an earlier server left
    #[arg(long)]
    pub fresh: bool,
    /// Another uid that may connect (may be given more than once)
    #[arg(long, value_name = "UID")]
    pub allow_uid: Vec<u32>,
    /// Stop, as at SIGTERM, when the process with this id ends
    #[arg(long, value_name = "PID")]
    pub until_pid: Option<u32>,
    /// Take over from the server that runs under the name: SIGTERM to it, wait for its segment, go on with its blocks
    #[arg(long)]
    pub upgrade: bool,
    /// Socket of the server to take over from, where that is not --socket's; asks for --upgrade [default: --socket's,
    /// then the default one of --name]
    #[arg(long, value_name = "PATH")]
    pub upgrade_from: Option<PathBuf>,
    /// With --upgrade: how long the other may take to let go, as in 10s or 500ms; then it is left alone, and this start
    /// fails [default: 10s]
    #[arg(long, value_name = "TIME")]
    pub drain_timeout: Option<String>,
    /// TOML file with the same settings; flags go over it
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

pub(super) fn run(args: ServeArgs) -> Result<(), ServerError> {
    let _log = Log::start().doing(|| "starting the log".into())?;
    let file = args.config.as_deref().map(ConfigSource::from_file).transpose()?.unwrap_or_default();
    let config = ConfigSource::from(args).over(file).resolve()?;
    // Before the first client: a signal must never find the default action between start and wait.
    let mut signals = Signals::new([SIGTERM, SIGINT]).doing(|| "handling signals".into())?;
    raise_file_limit();
    bus::explain()?;
    let server = match Server::start_unless(config, &mut || told_to_stop(&mut signals)) {
        Err(given_up @ ServerError::GivenUp { .. }) => {
            tracing::info!("{given_up}");
            return Ok(());
        }
        started => started?,
    };
    say_ready(&server);
    let outcome = wait(&server, &mut signals);
    finish(server);
    outcome
}

/// Each session takes a few descriptors: as many as the system allows.
fn raise_file_limit() {
    let limit = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
}

fn say_ready(server: &Server) {
    let config = server.config();
    let tcp = server.tcp().map_or_else(String::new, |address| format!(" (tcp://{address} tells its path)"));
    tracing::info!(
        "ready: {}{tcp}, {} in {}, policy {}",
        server.endpoint(),
        Bytes(config.size),
        server.segment_path().display(),
        config.policy
    );
}

fn wait(server: &Server, signals: &mut Signals) -> Result<(), ServerError> {
    loop {
        if let Some(why) = told_to_stop(signals) {
            tracing::info!("{why}: stopping");
            return Ok(());
        }
        // In this order: a thread that ends for a reason has told it before.
        let is_serving = server.is_serving();
        if let Some(error) = server.failure() {
            return Err(error);
        }
        if !is_serving {
            return Err(ServerError::Os {
                what: "a thread of the server ended".into(),
                source: std::io::Error::other("see above"),
            });
        }
        if let Some(why) = watched_process_ended(server) {
            tracing::info!("{why}: stopping");
            return Ok(());
        }
    }
}

/// The signal that came, if one did.
fn told_to_stop(signals: &mut Signals) -> Option<String> {
    let signal = signals.pending().next()?;
    Some(if signal == SIGTERM { "SIGTERM" } else { "SIGINT" }.into())
}

/// Says so once the process of `--until-pid` has ended; lets a glance's time pass otherwise.
fn watched_process_ended(server: &Server) -> Option<String> {
    let Some(watched) = server.watched() else {
        std::thread::sleep(GLANCE);
        return None;
    };
    // Sooner than that if it ends.
    let _ = watched.ends_within(GLANCE);
    watched.has_ended()
}

fn finish(server: Server) {
    let (name, path) = (server.config().name.clone(), server.segment_path().to_owned());
    let (ephemeral, leaves, bytes) = (server.config().ephemeral, server.leaves_segment(), server.resident_bytes());
    server.stop();
    if ephemeral {
        tracing::info!("stopped; the segment is removed");
    } else if !leaves {
        tracing::info!("stopped; nothing is left for the next start");
    } else {
        let dir = path.parent().map(|dir| dir.display().to_string()).unwrap_or_default();
        let flag = if dir == crate::config::DEFAULT_ARENA_DIR { String::new() } else { format!(" --arena-dir {dir}") };
        tracing::info!(
            "stopped; {} keeps {} of memory for the next start; free it with `kvmp rm {name}{flag}`",
            path.display(),
            Bytes(bytes)
        );
    }
}
