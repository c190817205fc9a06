//! The TCP rendezvous: answers "where is the unix socket?", and nothing else.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use kvmp_core::wire::{ClientMessage, FRAME_BYTES, Frame, FrameError, Located, Refusal, ServerMessage};
use serde::Deserialize;

use crate::config::ServerConfig;
use crate::error::ServerError;

/// How long a caller may take over its one question.
const PATIENCE: Duration = Duration::from_millis(500);
/// Callers answered at the same time.
const CALLERS: usize = 64;
/// How often the thread looks whether it should stop.
const GLANCE: Duration = Duration::from_millis(50);

/// The thread that answers.
#[derive(Debug)]
pub(crate) struct Rendezvous {
    pub address: SocketAddr,
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Rendezvous {
    /// Starts it as configured. A taken port is an error only where the port was asked for.
    pub fn start(config: &ServerConfig, socket: &Path) -> Result<Option<Self>, ServerError> {
        let Some(address) = config.tcp else { return Ok(None) };
        match Self::serve(address, socket) {
            Ok(this) => Ok(Some(this)),
            Err(e) if config.tcp_required => Err(taken(address, &e)),
            Err(e) => {
                let why = why_taken(address, &e);
                tracing::warn!("tcp {address}: {why}; serving on the unix socket only (name another port with --tcp)");
                Ok(None)
            }
        }
    }

    /// Refuses a port that `start` would refuse, unless the server at `socket`, which is going to leave it, has it.
    pub fn check(config: &ServerConfig, socket: &Path) -> Result<(), ServerError> {
        let Some(address) = config.tcp.filter(|_| config.tcp_required) else { return Ok(()) };
        match TcpListener::bind(address) {
            Err(e) if located(address).as_deref() != Some(socket) => Err(taken(address, &e)),
            _ => Ok(()),
        }
    }

    fn serve(address: SocketAddr, socket: &Path) -> io::Result<Self> {
        let listener = TcpListener::bind(address)?;
        // A caller that went between poll and accept must not make the accept wait.
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let stop = Arc::new(AtomicBool::new(false));
        let located = ServerMessage::Located(Located { socket: socket.to_string_lossy().into_owned() });
        let (stopped, callers) = (Arc::clone(&stop), Arc::new(()));
        let thread = std::thread::Builder::new().name("kvmp-tcp".into()).spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                if wait_readable(&listener) {
                    match listener.accept() {
                        Ok((stream, _)) => answer_aside(stream, &located, &callers),
                        // No descriptors left, say: it stays readable, so look again later.
                        Err(_) => std::thread::sleep(GLANCE),
                    }
                }
            }
        })?;
        Ok(Self { address, stop, thread: Some(thread) })
    }
}

fn taken(address: SocketAddr, error: &io::Error) -> ServerError {
    ServerError::Tcp { address: address.to_string(), why: why_taken(address, error) }
}

/// Why a port cannot be had, and by whom it is taken where that is another of ours.
fn why_taken(address: SocketAddr, error: &io::Error) -> String {
    match located(address).filter(|_| error.kind() == io::ErrorKind::AddrInUse) {
        Some(socket) => format!("the kvmp server at unix:{} has that port", socket.display()),
        None => error.to_string(),
    }
}

/// What a server at an address says of its socket, if one answers there.
fn located(address: SocketAddr) -> Option<PathBuf> {
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE).ok()?;
    stream.set_write_timeout(Some(PATIENCE)).ok()?;
    stream.write_all(&Frame::encode(&ClientMessage::Locate).ok()?).ok()?;
    match one_message(&mut stream).ok()?.ok()? {
        ServerMessage::Located(located) => Some(located.socket.into()),
        _ => None,
    }
}

impl Drop for Rendezvous {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// On a thread of its own, so that a caller who says nothing keeps nobody else waiting; too many are turned away.
fn answer_aside(stream: TcpStream, located: &ServerMessage, callers: &Arc<()>) {
    if Arc::strong_count(callers) > CALLERS {
        return;
    }
    let (located, ticket) = (located.clone(), Arc::clone(callers));
    let answering = move || {
        // A caller that hangs up or stalls has had its chance.
        let _ = answer(stream, &located);
        drop(ticket);
    };
    // No thread to be had: the caller sees a hang-up and tries again.
    let _ = std::thread::Builder::new().name("kvmp-tcp-caller".into()).spawn(answering);
}

fn wait_readable(listener: &TcpListener) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let glance = Timespec { tv_sec: 0, tv_nsec: GLANCE.as_nanos() as _ };
    poll(&mut [PollFd::new(listener, PollFlags::IN)], Some(&glance)).is_ok_and(|ready| ready > 0)
}

fn answer(mut stream: TcpStream, located: &ServerMessage) -> io::Result<()> {
    stream.set_write_timeout(Some(PATIENCE))?;
    let reply = match one_message(&mut stream)? {
        Ok(ClientMessage::Locate) => located.clone(),
        Ok(_) => refused(Refusal::Protocol, "over TCP only the socket's path is told; use the unix socket"),
        Err(e @ FrameError::Version { .. }) => refused(Refusal::Version, &e.to_string()),
        Err(e) => refused(Refusal::Protocol, &e.to_string()),
    };
    stream.write_all(&Frame::encode(&reply).map_err(io::Error::other)?)
}

fn refused(refusal: Refusal, message: &str) -> ServerMessage {
    ServerMessage::Refused { refusal, message: message.into() }
}

/// Reads exactly so many bytes before `until`, however slowly they drip.
fn read_until(stream: &mut TcpStream, mut into: &mut [u8], until: Instant) -> io::Result<()> {
    while !into.is_empty() {
        let left = until.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        stream.set_read_timeout(Some(left))?;
        match stream.read(into)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            n => into = &mut into[n..],
        }
        if Instant::now() >= until && !into.is_empty() {
            return Err(io::ErrorKind::TimedOut.into());
        }
    }
    Ok(())
}

fn one_message<M: for<'de> Deserialize<'de>>(stream: &mut TcpStream) -> io::Result<Result<M, FrameError>> {
    let until = Instant::now() + PATIENCE;
    let mut bytes = vec![0; FRAME_BYTES];
    read_until(stream, &mut bytes, until)?;
    let frame = match Frame::parse(&bytes) {
        Ok(frame) => frame,
        Err(e) => return Ok(Err(e)),
    };
    bytes.resize(FRAME_BYTES + frame.body_bytes as usize, 0);
    read_until(stream, &mut bytes[FRAME_BYTES..], until)?;
    Ok(Frame::decode(&bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(address: SocketAddr, bytes: &[u8]) -> Result<ServerMessage, FrameError> {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.write_all(bytes).unwrap();
        let mut reply = Vec::new();
        stream.read_to_end(&mut reply).unwrap();
        Frame::decode(&reply)
    }

    #[test]
    fn it_tells_the_path_and_shrugs_off_rubbish() {
        let rendezvous = Rendezvous::serve("127.0.0.1:0".parse().unwrap(), Path::new("/x/y.sock")).unwrap();
        assert!(matches!(ask(rendezvous.address, &[b'G'; 64]), Ok(ServerMessage::Refused { .. })));
        let hung_up = TcpStream::connect(rendezvous.address).unwrap();
        drop(hung_up);
        let located = ask(rendezvous.address, &Frame::encode(&ClientMessage::Locate).unwrap()).unwrap();
        assert_eq!(located, ServerMessage::Located(Located { socket: "/x/y.sock".into() }));
    }

    #[test]
    fn a_taken_port_is_refused_where_it_was_asked_for_and_else_done_without() {
        let first = Rendezvous::serve("127.0.0.1:0".parse().unwrap(), Path::new("/x/y.sock")).unwrap();
        let source = crate::ConfigSource { size: Some("4MiB".into()), ..Default::default() };
        let config = source.resolve().unwrap();
        let config = ServerConfig { tcp: Some(first.address), ..config };
        assert!(Rendezvous::start(&config, Path::new("/z")).unwrap().is_none());
        let config = ServerConfig { tcp_required: true, ..config };
        let error = Rendezvous::start(&config, Path::new("/z")).unwrap_err().to_string();
        assert!(error.contains("unix:/x/y.sock has that port") && error.contains("--tcp off"), "{error}");
        assert!(Rendezvous::check(&config, Path::new("/z")).is_err());
        Rendezvous::check(&config, Path::new("/x/y.sock")).unwrap();
    }
}
