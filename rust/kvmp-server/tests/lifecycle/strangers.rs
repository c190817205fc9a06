//! Processes of another user: refused by either side, and both say whose they are. Only root can make them: without it,
//! the tests say so and pass (`support/refused.rs`).

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use kvmp_client::{Bound, Client, ClientError, ConnectOptions};
use kvmp_core::wire::Role;

use crate::served::{House, Served};
use crate::support::patience;
use crate::support::refused::Need;

/// A user that is neither this one nor root.
const STRANGER: u32 = 65_534;

/// A house that every user may come into, with a copy of the binary.
struct OpenHouse {
    house: House,
    programs: tempfile::TempDir,
}

fn allow(path: &Path, mode: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

impl OpenHouse {
    fn new() -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            Need::Users.refused("this is not root");
            return None;
        }
        let this = Self { house: House::new(), programs: tempfile::tempdir().unwrap() };
        allow(&this.house.path(""), 0o777);
        allow(this.programs.path(), 0o755);
        fs::copy(env!("CARGO_BIN_EXE_kvmp"), this.program()).unwrap();
        Some(this)
    }

    fn program(&self) -> PathBuf {
        self.programs.path().join("kvmp")
    }

    /// A command of `kvmp`, run by the stranger.
    fn stranger(&self, args: &[&str]) -> Served {
        let mut command = Command::new(self.program());
        command.args(args).uid(STRANGER).gid(STRANGER).stdin(Stdio::null());
        Served::spawn(command)
    }

    /// Its exit status and words.
    fn stranger_pings(&self) -> (i32, String, u32) {
        let mut ping = self.stranger(&["ping", "--socket", self.house.socket().to_str().unwrap()]);
        (ping.wait().code().unwrap(), ping.log(), ping.pid())
    }
}

#[test]
fn another_users_client_is_refused_and_both_say_whose_it_is() {
    let Some(open) = OpenHouse::new() else { return };
    let mut served = open.house.start(&[]);
    // The socket's mode is the first door.
    let (code, said, _) = open.stranger_pings();
    assert!(code == 1 && said.contains("Permission denied"), "{said}");
    // Somebody has opened that: the kernel says who comes, and the server asks.
    allow(&open.house.socket(), 0o666);
    let (code, said, pid) = open.stranger_pings();
    let refusal = format!("uid {STRANGER} may not use the kvmp server of uid 0; start it with --allow-uid {STRANGER}");
    assert!(code == 1 && said.contains(&refusal), "{said}");
    served.says(&format!("pid {pid} of uid {STRANGER} refused: this server serves uid 0"));
    assert!(served.is_running());
}

#[test]
fn a_user_that_is_allowed_comes_in() {
    let Some(open) = OpenHouse::new() else { return };
    let served = open.house.start(&["--allow-uid", &STRANGER.to_string()]);
    let (code, said, _) = open.stranger_pings();
    assert_eq!((code, said.as_str()), (0, ""), "{}", served.log());
    // Nobody else does: 65533 is not 65534.
    let mut other = Command::new(open.program());
    other.args(["ping", "--socket"]).arg(open.house.socket()).uid(STRANGER - 1).gid(STRANGER - 1);
    let mut other = Served::spawn(other);
    assert_eq!(other.wait().code(), Some(1));
    assert!(other.log().contains(&format!("uid {} may not use", STRANGER - 1)), "{}", other.log());
    // A folder that keeps them out is named.
    let closed = open.house.path("closed");
    fs::create_dir(&closed).unwrap();
    allow(&closed, 0o700);
    let socket = closed.join("kvmp.sock");
    let more = ["--name", "closed", "--allow-uid", "65534", "--socket", socket.to_str().unwrap()];
    let log = open.house.start(&more).log();
    assert!(log.contains(&format!("{} keeps other users out", closed.display())) && log.contains("chmod o+x"), "{log}");
}

#[test]
fn another_users_server_is_refused_on_its_socket_and_behind_a_port() {
    let Some(open) = OpenHouse::new() else { return };
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let (tcp, house) = (format!("127.0.0.1:{port}"), &open.house);
    let (dir, socket) = (house.path(""), house.socket());
    let (dir, socket) = (dir.to_str().unwrap(), socket.to_str().unwrap());
    let until = std::process::id().to_string();
    let args = ["serve", "--size", "4MiB", "--name", "x", "--tcp", &tcp, "--arena-dir", dir, "--until-pid", &until];
    let args = [&args[..], &["--socket", socket]].concat();
    let mut served = open.stranger(&args);
    served.says("ready:");
    let mut options = ConnectOptions::new(Role::Scheduler);
    for endpoint in [house.endpoint(), format!("tcp://{tcp}")] {
        let refused = Client::connect(&endpoint, &options, &patience()).unwrap_err();
        assert!(matches!(&refused, ClientError::PeerUid { uid: STRANGER, own: 0, .. }), "{refused}");
        assert!(refused.to_string().contains(&format!("runs as uid {STRANGER}, this process as 0")), "{refused}");
    }
    served.says("a connection ends before its hello");
    // Root may come to it, and does where it is told that this user's server may be trusted.
    options.allow_uids = vec![STRANGER];
    Client::connect(&format!("tcp://{tcp}"), &options, &patience()).unwrap().ping(&Bound::ms(5000)).unwrap();
    // Nor is it taken over from.
    let (code, log) = house.fails(&["--name", "x", "--upgrade"]);
    assert!(
        code == 1 && log.contains(&format!("runs as uid {STRANGER}, this process as 0; only its own user")),
        "{log}"
    );
    assert!(served.is_running());
}
