//! `--upgrade`: a new server takes over from one that runs, of whatever version.
//!
//! `its socket answers -> it holds the lock -> SIGTERM -> byte 0 is free -> claimed`. Nothing is taken by force, and
//! nothing is passed but the file. Who is told to stop is the process at the other end of the socket, which the kernel
//! names; the file's word alone is never taken for it.

use std::fs::File;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use kvmp_core::geometry::Geometry;

use crate::config::{ServerConfig, Upgrade, default_socket};
use crate::error::{Context, ServerError};
use crate::listen::{BoundSocket, Rendezvous, canonical, is_full, who_listens};
use crate::process::{Unwatchable, WatchedProcess};
use crate::segment::{Claim, holds, name_taken, named, segment_path};

/// Between two looks at the lock.
const GLANCE: Duration = Duration::from_millis(10);
/// How long a server that has the lock may take to answer at its socket: it may just be starting.
const ANSWERS: Duration = Duration::from_secs(1);
/// How long one that has let go may take to end, and with that to leave its port.
const ENDS: Duration = Duration::from_secs(1);

/// Looked at while another server is waited for: why this start is to be given up, once it is.
pub(crate) type GivenUp<'a> = dyn FnMut() -> Option<String> + 'a;

/// An error where the start is to be given up; `left` says what that leaves behind.
fn go_on(given_up: &mut GivenUp<'_>, left: impl FnOnce() -> String) -> Result<(), ServerError> {
    given_up().map_or(Ok(()), |why| Err(ServerError::GivenUp { why, left: left() }))
}

fn not_asked(config: &ServerConfig) -> String {
    format!("the server that has the name '{}' was not asked to stop and stays", config.name)
}

/// The claim to a name, taken over where a server has it.
pub(crate) fn claim(
    config: &ServerConfig,
    geometry: Geometry,
    upgrade: &Upgrade,
    given_up: &mut GivenUp<'_>,
) -> Result<Claim, ServerError> {
    match Claim::try_new(config, geometry)? {
        Ok(claim) => {
            say_why_as_usual(config, upgrade);
            Ok(claim)
        }
        Err(_) => take_over(config, geometry, upgrade, given_up),
    }
}

/// Nobody has the file. A server may answer all the same: one whose file was removed, or another name's.
fn say_why_as_usual(config: &ServerConfig, upgrade: &Upgrade) {
    let path = segment_path(&config.arena_dir, &config.name);
    match who_answers(&sockets(config, upgrade)) {
        None => tracing::info!("--upgrade: no server runs under the name '{}'; starting as usual", config.name),
        Some((socket, (_, pid))) => tracing::warn!(
            "--upgrade: {} answers at {}, but no server has {}: that one's file was removed, or is another; it is not asked \
             to stop, and this start goes on as usual",
            whose(pid),
            socket.display(),
            path.display()
        ),
    }
}

/// Where the server to take over from may listen.
fn sockets(config: &ServerConfig, upgrade: &Upgrade) -> Vec<PathBuf> {
    match &upgrade.from {
        Some(from) => vec![from.clone()],
        None => vec![config.socket.clone(), default_socket(&config.name)],
    }
}

/// The first socket that somebody listens at, and his uid and pid.
fn who_answers(sockets: &[PathBuf]) -> Option<(&PathBuf, (u32, i32))> {
    sockets.iter().find_map(|socket| who_listens(socket).map(|who| (socket, who)))
}

fn whose(pid: i32) -> String {
    // The kernel's word for a process that has no pid here.
    if pid == 0 { "a process of another pid namespace".into() } else { format!("pid {pid}") }
}

fn take_over(
    config: &ServerConfig,
    geometry: Geometry,
    upgrade: &Upgrade,
    given_up: &mut GivenUp<'_>,
) -> Result<Claim, ServerError> {
    let answers_until = Instant::now() + ANSWERS;
    loop {
        go_on(given_up, || not_asked(config))?;
        let file = match Claim::try_new(config, geometry)? {
            Ok(claim) => return Ok(claim),
            Err(file) => file,
        };
        match OldServer::find(config, upgrade, &file) {
            Ok(old) => {
                old.check_room_beside(config)?;
                old.wait_until_it_runs(config, upgrade, given_up)?;
                old.ask_to_stop()?;
                return old.wait(config, geometry, upgrade, given_up);
            }
            Err(why) if Instant::now() >= answers_until => return Err(why),
            Err(_) => std::thread::sleep(GLANCE),
        }
    }
}

fn refused(why: String) -> ServerError {
    ServerError::Upgrade(why)
}

/// The server that has the lock, found by its socket.
struct OldServer {
    process: WatchedProcess,
    socket: PathBuf,
}

impl OldServer {
    /// Whoever listens at one of the sockets that it may have, if it is the one that has `file`.
    fn find(config: &ServerConfig, upgrade: &Upgrade, file: &File) -> Result<Self, ServerError> {
        let sockets = sockets(config, upgrade);
        let Some((socket, (uid, pid))) = who_answers(&sockets) else {
            return Err(not_found(config, &sockets, file));
        };
        let socket = canonical(socket).doing(|| format!("finding {}", socket.display()))?;
        check_uid(uid, pid, &socket)?;
        // Held before the look at its locks: SIGTERM goes through it, so if it still names a living process then, the pid
        // meant that one all along.
        let process =
            WatchedProcess::watch(u32::try_from(pid).unwrap_or(0)).map_err(|why| unseen(pid, &socket, why))?;
        check_holder(config, &process, &socket, file)?;
        Ok(Self { process, socket })
    }

    /// Refuses now what would be refused once the old server is gone: then there would be none.
    fn check_room_beside(&self, config: &ServerConfig) -> Result<(), ServerError> {
        if canonical(&config.socket).ok().as_ref() != Some(&self.socket) {
            BoundSocket::check(&config.socket, config.doors())?;
        }
        Rendezvous::check(config, &self.socket)
    }

    /// One that a signal has stopped is not asked: it would act on that long after this start has given up.
    fn wait_until_it_runs(
        &self,
        config: &ServerConfig,
        upgrade: &Upgrade,
        given_up: &mut GivenUp<'_>,
    ) -> Result<(), ServerError> {
        let until = Instant::now() + upgrade.drain_timeout;
        if self.process.is_stopped() {
            tracing::info!("--upgrade: a signal has stopped pid {}; waiting for it to go on", self.process.pid());
        }
        while self.process.is_stopped() {
            if Instant::now() >= until {
                return Err(self.is_stopped(upgrade));
            }
            std::thread::sleep(GLANCE);
            go_on(given_up, || not_asked(config))?;
        }
        Ok(())
    }

    fn is_stopped(&self, upgrade: &Upgrade) -> ServerError {
        let pid = self.process.pid();
        refused(format!(
            "a signal has stopped pid {pid}, the server at {}, and nothing let it go on within {:?}; it was left as it is; \
             let it go on with `kill -CONT {pid}` and try again",
            self.socket.display(),
            upgrade.drain_timeout
        ))
    }

    fn ask_to_stop(&self) -> Result<(), ServerError> {
        let pid = self.process.pid();
        tracing::info!("--upgrade: asking pid {pid}, the server at {}, to stop", self.socket.display());
        self.process.terminate().doing(|| format!("--upgrade: sending SIGTERM to pid {pid}"))
    }

    /// After SIGTERM: its time to let go begins now.
    fn wait(
        &self,
        config: &ServerConfig,
        geometry: Geometry,
        upgrade: &Upgrade,
        given_up: &mut GivenUp<'_>,
    ) -> Result<Claim, ServerError> {
        let (pid, until) = (self.process.pid(), Instant::now() + upgrade.drain_timeout);
        loop {
            // In this order: one that ended let go of the lock before that.
            let ended = self.process.ends_within(GLANCE);
            match Claim::try_new(config, geometry)? {
                Ok(claim) => {
                    // Not for ever: a program that embeds a server goes on without it.
                    let _ = self.process.ends_within(ENDS);
                    tracing::info!("--upgrade: pid {pid} has let go of the segment");
                    return Ok(claim);
                }
                // Another start was faster.
                Err(file) if ended => return Err(name_taken(config, &file)),
                Err(_) if Instant::now() >= until => return Err(self.still_there(config, upgrade)),
                Err(_) => go_on(given_up, || self.asked(config))?,
            }
        }
    }

    /// What is left where this start ends between SIGTERM and the end of the other server.
    fn asked(&self, config: &ServerConfig) -> String {
        format!(
            "pid {}, the server at {}, was asked to stop before that (SIGTERM): once it has, no server has the name '{}'; \
             what it leaves in {} is for the next start",
            self.process.pid(),
            self.socket.display(),
            config.name,
            segment_path(&config.arena_dir, &config.name).display()
        )
    }

    fn still_there(&self, config: &ServerConfig, upgrade: &Upgrade) -> ServerError {
        let pid = self.process.pid();
        refused(format!(
            "pid {pid}, the server at {}, was asked to stop (SIGTERM) and still has {} after {:?}; nothing was taken from \
             it; start again once it has ended, with a longer --drain-timeout, or end it with `kill -9 {pid}`",
            self.socket.display(),
            segment_path(&config.arena_dir, &config.name).display(),
            upgrade.drain_timeout
        ))
    }
}

/// Why the process that listens at the socket cannot be asked to stop.
fn unseen(pid: i32, socket: &std::path::Path, why: Unwatchable) -> ServerError {
    let socket = socket.display();
    refused(match why {
        Unwatchable::NoPid => {
            format!("the server at {socket} is not to be seen from this pid namespace; stop it there")
        }
        Unwatchable::NoSuch => format!(
            "pid {pid}, which opened the socket at {socket}, has ended, and another process goes on with it; stop that one \
             yourself (`lsof {socket}` names it)"
        ),
        Unwatchable::Itself => format!("the server at {socket} is this very process; stop it first"),
        Unwatchable::System(e) => {
            format!("pid {pid}, the server at {socket}, cannot be watched: {e}; stop it yourself")
        }
    })
}

/// Nobody's pid is to be had from a socket: nobody listens there, or he takes no connection.
fn not_found(config: &ServerConfig, sockets: &[PathBuf], file: &File) -> ServerError {
    let path = segment_path(&config.arena_dir, &config.name);
    let pid = named(file).map_or_else(String::new, |pid| format!(" (pid {pid}, says its header)"));
    if let Some(busy) = sockets.iter().find(|socket| is_full(socket)) {
        return refused(format!(
            "the server at {} leaves so many connections waiting that it is not to be asked for its pid; let the one that has \
             {}{pid} go on, if a signal has stopped it, or stop it yourself",
            busy.display(),
            path.display()
        ));
    }
    refused(format!(
        "no server answers at {}, but one has {}{pid}; name its socket with --upgrade-from, or stop it yourself",
        sockets.iter().map(|socket| socket.display().to_string()).collect::<Vec<_>>().join(" or "),
        path.display()
    ))
}

fn check_uid(uid: u32, pid: i32, socket: &std::path::Path) -> Result<(), ServerError> {
    let own = rustix::process::geteuid().as_raw();
    if uid == own {
        return Ok(());
    }
    Err(refused(format!(
        "pid {pid}, which answers at {}, runs as uid {uid}, this process as {own}; only its own user may take over from a \
         server",
        socket.display()
    )))
}

/// The kernel's word that the process has the lock; where its descriptors may not be looked at, the header's.
fn check_holder(
    config: &ServerConfig,
    process: &WatchedProcess,
    socket: &std::path::Path,
    file: &File,
) -> Result<(), ServerError> {
    let pid = process.pid();
    if holds(pid, file).unwrap_or_else(|| named(file) == Some(pid)) {
        return Ok(());
    }
    Err(refused(format!(
        "pid {pid}, which answers at {}, is not the server that has {}{}; name that one's socket with --upgrade-from",
        socket.display(),
        segment_path(&config.arena_dir, &config.name).display(),
        named(file).map_or_else(String::new, |pid| format!(" (pid {pid}, says its header)")),
    )))
}
