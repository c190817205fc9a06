//! Where a server is: `unix:PATH`, or `tcp://HOST:PORT`, which only tells the path.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use kvmp_core::wire::{ClientMessage, FRAME_BYTES, Frame, ServerMessage, SocketError};

use crate::error::not_connected;
use crate::{Bound, ClientError};

/// A parsed endpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Endpoint {
    /// The server's socket.
    Unix(PathBuf),
    /// A rendezvous: host and port.
    Tcp(String, u16),
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(host, port) => write!(f, "tcp://{host}:{port}"),
        }
    }
}

impl FromStr for Endpoint {
    type Err = ClientError;

    fn from_str(text: &str) -> Result<Self, ClientError> {
        let bad = |why| ClientError::Endpoint { endpoint: text.to_owned(), why };
        if let Some(path) = text.strip_prefix("unix:") {
            let path = path.strip_prefix("//").unwrap_or(path);
            return match path {
                "" => Err(bad("the path is missing")),
                _ if !path.starts_with('/') => Err(bad("the path must be absolute")),
                _ => Ok(Self::Unix(path.into())),
            };
        }
        let place = text.strip_prefix("tcp://").ok_or_else(|| bad("unknown scheme"))?;
        let (host, port) = place.rsplit_once(':').ok_or_else(|| bad("the port is missing"))?;
        match port.parse() {
            _ if host.is_empty() => Err(bad("the host is missing")),
            Err(_) | Ok(0) => Err(bad("the port is no number from 1 to 65535")),
            Ok(port) => Ok(Self::Tcp(host.trim_matches(['[', ']']).to_owned(), port)),
        }
    }
}

impl Endpoint {
    /// Path of the server's socket: asked for over TCP where needed, in `socket_dir` where that is given.
    pub(crate) fn socket_path(&self, socket_dir: Option<&Path>, bound: &Bound<'_>) -> Result<PathBuf, ClientError> {
        let path = match self {
            Self::Unix(path) => path.clone(),
            Self::Tcp(host, port) => self.locate(host, *port, bound)?,
        };
        match (socket_dir, path.file_name()) {
            (Some(dir), Some(name)) => Ok(dir.join(name)),
            _ => Ok(path),
        }
    }

    fn locate(&self, host: &str, port: u16, bound: &Bound<'_>) -> Result<PathBuf, ClientError> {
        let stream = connect(host, port, bound).map_err(|source| not_connected(self.to_string(), source))?;
        let hello = |source| ClientError::Hello { endpoint: self.to_string(), source };
        match ask(stream, bound).map_err(hello)? {
            ServerMessage::Located(located) => Ok(located.socket.into()),
            ServerMessage::Refused { refusal, message } => {
                Err(ClientError::Refused { endpoint: self.to_string(), refusal, message })
            }
            other => Err(ClientError::Protocol(format!("{self} answered a locate with {other:?}"))),
        }
    }
}

fn connect(host: &str, port: u16, bound: &Bound<'_>) -> io::Result<TcpStream> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the host name has no address");
    for address in (host, port).to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, at_least_1ms(bound)) {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// The standard library refuses a time-out of zero.
fn at_least_1ms(bound: &Bound<'_>) -> std::time::Duration {
    bound.left().max(std::time::Duration::from_millis(1))
}

fn ask(mut stream: TcpStream, bound: &Bound<'_>) -> Result<ServerMessage, SocketError> {
    stream.set_write_timeout(Some(at_least_1ms(bound))).map_err(from_io)?;
    stream.write_all(&Frame::encode(&ClientMessage::Locate)?).map_err(from_io)?;
    let mut bytes = vec![0; FRAME_BYTES];
    read_exact(&mut stream, &mut bytes, bound)?;
    let body = Frame::parse(&bytes)?.body_bytes as usize;
    bytes.resize(FRAME_BYTES + body, 0);
    read_exact(&mut stream, &mut bytes[FRAME_BYTES..], bound)?;
    Ok(Frame::decode(&bytes)?)
}

/// Like `Read::read_exact`, with one bound over all pieces: a peer that drips bytes cannot hold us longer.
fn read_exact(stream: &mut TcpStream, mut into: &mut [u8], bound: &Bound<'_>) -> Result<(), SocketError> {
    while !into.is_empty() {
        if bound.left().is_zero() {
            return Err(SocketError::TimedOut);
        }
        stream.set_read_timeout(Some(at_least_1ms(bound))).map_err(from_io)?;
        match stream.read(into) {
            Ok(0) => return Err(SocketError::HangUp),
            Ok(n) => into = &mut into[n..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(from_io(error)),
        }
    }
    Ok(())
}

fn from_io(error: io::Error) -> SocketError {
    rustix::io::Errno::from_io_error(&error).unwrap_or(rustix::io::Errno::IO).into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn endpoints_parse_and_print() {
        for text in ["unix:/tmp/a.sock", "tcp://localhost:5555"] {
            assert_eq!(text.parse::<Endpoint>().unwrap().to_string(), text);
        }
        assert_eq!("tcp://[::1]:7".parse::<Endpoint>().unwrap(), Endpoint::Tcp("::1".into(), 7));
    }

    #[test]
    fn what_is_no_endpoint_is_refused_with_the_reason() {
        for (text, why) in [
            ("unix:", "path is missing"),
            ("unix:a.sock", "absolute"),
            ("http://localhost:1", "unknown scheme"),
            ("tcp://localhost", "port is missing"),
            ("tcp://:5555", "host is missing"),
            ("tcp://localhost:port", "port is no number"),
            ("tcp://localhost:0", "port is no number"),
            ("", "unknown scheme"),
        ] {
            let error = text.parse::<Endpoint>().unwrap_err().to_string();
            assert!(error.contains(why) && error.contains("unix:PATH or tcp://HOST:PORT"), "{text}: {error}");
        }
    }

    fn answer_with(bytes: Vec<u8>) -> Endpoint {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut ask = vec![0; Frame::encode(&ClientMessage::Locate).unwrap().len()];
            stream.read_exact(&mut ask).unwrap();
            stream.write_all(&bytes).unwrap();
        });
        Endpoint::Tcp("127.0.0.1".into(), port)
    }

    #[test]
    fn a_rendezvous_names_the_socket_and_a_folder_replaces_its_own() {
        let located = ServerMessage::Located(kvmp_core::wire::Located { socket: "/run/kvmp/k.sock".into() });
        let bytes = Frame::encode(&located).unwrap();
        let path = answer_with(bytes.clone()).socket_path(None, &Bound::ms(5000)).unwrap();
        assert_eq!(path, Path::new("/run/kvmp/k.sock"));
        let path = answer_with(bytes).socket_path(Some(Path::new("/mnt")), &Bound::ms(5000)).unwrap();
        assert_eq!(path, Path::new("/mnt/k.sock"));
    }

    #[test]
    fn who_is_no_kvmp_server_is_told() {
        let error = answer_with(b"HTTP/1.1 400 Bad Request\r\n".repeat(4)).socket_path(None, &Bound::ms(5000));
        assert!(matches!(error, Err(ClientError::Hello { source: SocketError::Frame(_), .. })), "{error:?}");
        let error = answer_with(vec![]).socket_path(None, &Bound::ms(5000));
        assert!(matches!(error, Err(ClientError::Hello { source: SocketError::HangUp, .. })), "{error:?}");
    }

    #[test]
    fn a_port_that_refuses_has_no_server_and_a_name_that_is_none_is_another_matter() {
        use rustix::net::{AddressFamily, SocketType, bind, getsockname, socket};
        // Bound and not listening: nobody else gets the port while we ask.
        let held = socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
        bind(&held, &std::net::SocketAddrV4::new(std::net::Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = std::net::SocketAddr::try_from(getsockname(&held).unwrap()).unwrap().port();
        let ask = |host: &str| Endpoint::Tcp(host.into(), port).socket_path(None, &Bound::ms(5000));
        let error = ask("127.0.0.1");
        assert!(matches!(error, Err(ClientError::NoServer { .. })), "{error:?}");
        let error = ask("no such host");
        assert!(matches!(error, Err(ClientError::Unreachable { .. })), "{error:?}");
    }
}
