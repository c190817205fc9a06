//! What the native binary says to whom asks it for too much.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop where it is")]

use std::process::{Command, Output};

fn kvmp(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_kvmp")).args(arguments).output().unwrap()
}

#[test]
fn the_commands_of_the_wheel_are_listed() {
    let help = String::from_utf8(kvmp(&["--help"]).stdout).unwrap();
    for command in ["vllm", "doctor"] {
        let line = help.lines().find(|line| line.trim_start().starts_with(command)).unwrap();
        assert!(line.ends_with("(in the Python wheel)"), "{line}");
    }
}

#[test]
fn the_commands_of_the_wheel_say_where_they_are_whatever_follows() {
    for command in ["vllm", "doctor"] {
        for more in
            [&[][..], &["--help"], &["-h"], &["serve", "some/model", "--kvmp-size=1GiB", "-x", "--", "--version"]]
        {
            let answer = kvmp(&[&[command], more].concat());
            let text = String::from_utf8_lossy(&answer.stderr);
            assert_eq!(answer.status.code(), Some(2), "{text}");
            assert!(text.contains("native binary") && text.contains("the wheel is installed in"), "{text}");
            assert!(text.contains(&format!("`kvmp {command}`")) && answer.stdout.is_empty(), "{text}");
        }
    }
}

/// A folder in memory, of a test's own.
fn memory() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").unwrap()
}

fn serve(dir: &str) -> (Option<i32>, String) {
    let answer =
        kvmp(&["serve", "--size", "4MiB", "--tcp", "off", "--name", "x", "--arena-dir", dir, "--socket", SOCKET]);
    (answer.status.code(), String::from_utf8_lossy(&answer.stderr).into_owned())
}

/// Never bound: what these servers are asked fails before.
const SOCKET: &str = "/tmp/kvmp-command-line-test/x.sock";

#[test]
fn an_arena_dir_that_is_no_folder_is_a_wrong_setting() {
    let dir = memory();
    let (missing, file) = (dir.path().join("missing"), dir.path().join("file"));
    std::fs::write(&file, "").unwrap();
    for (place, why) in [
        (missing, "there is no such folder"),
        (file.clone(), "is no folder"),
        (file.join("x"), "there is no such folder"),
    ] {
        let place = place.to_str().unwrap();
        let (code, text) = serve(place);
        assert!(code == Some(2) && text.contains(&format!("--arena-dir {place}: {why}")), "{text}");
        let answer = kvmp(&["rm", "x", "--arena-dir", place]);
        assert_eq!(answer.status.code(), Some(2), "{}", String::from_utf8_lossy(&answer.stderr));
    }
}

#[test]
fn what_is_no_file_in_the_segments_place_is_named_and_left() {
    type Put = fn(&std::path::Path);
    let puts: [(&str, Put); 4] = [
        ("a folder", |path| std::fs::create_dir(path).unwrap()),
        ("a symbolic link", |path| std::os::unix::fs::symlink("/dev/null", path).unwrap()),
        ("a socket", |path| drop(std::os::unix::net::UnixListener::bind(path).unwrap())),
        ("a named pipe", |path| {
            let mode = rustix::fs::Mode::from_raw_mode(0o600);
            rustix::fs::mknodat(rustix::fs::CWD, path, rustix::fs::FileType::Fifo, mode, 0).unwrap();
        }),
    ];
    for (what, put) in puts {
        let dir = memory();
        let path = dir.path().join("x.kvmp");
        put(&path);
        let place = dir.path().to_str().unwrap();
        let (code, text) = serve(place);
        assert_eq!(code, Some(1), "{text}");
        assert!(text.contains(&format!("x.kvmp: {what} is in its place; remove it, or take another --name")), "{text}");
        assert!(std::fs::symlink_metadata(&path).is_ok_and(|found| !found.is_file()));
        assert_eq!(kvmp(&["rm", "x", "--arena-dir", place]).status.code(), Some(1));
    }
}

/// In a mount namespace of its own, where the machine lets us have one.
fn in_full_tmpfs(script: &str) -> Option<Output> {
    let unshare = |script: &str| Command::new("unshare").args(["-rm", "sh", "-c", script]).output();
    let can = unshare("mount -t tmpfs -o size=1m none /mnt").is_ok_and(|answer| answer.status.success());
    can.then(|| {
        unshare(&format!("mount -t tmpfs -o size=16m none /mnt && head -c 16m /dev/zero > /mnt/full; {script}"))
            .unwrap()
    })
}

#[test]
fn a_full_file_system_says_how_much_is_needed_and_the_mend() {
    let script = format!(
        "{} serve --size 4MiB --tcp off --name x --arena-dir /mnt --socket {SOCKET}; code=$?; ls /mnt; exit $code",
        env!("CARGO_BIN_EXE_kvmp")
    );
    let Some(answer) = in_full_tmpfs(&script) else { return };
    let text = String::from_utf8_lossy(&answer.stderr);
    assert_eq!(answer.status.code(), Some(1), "{text}");
    assert_eq!(String::from_utf8_lossy(&answer.stdout), "full\n", "nothing is left behind");
    for part in ["no room for a segment in /mnt", "are needed", "0 B free", "remount,size=", "--arena-dir", "--size"] {
        assert!(text.contains(part), "{part}: {text}");
    }
}

#[test]
fn a_relative_socket_is_one_of_the_folder_we_are_in() {
    let dir = tempfile::tempdir().unwrap();
    let server = kvmp_server::Server::builder()
        .size(4 << 20)
        .name("test-relative")
        .tcp("off")
        .socket(&dir.path().join("x.sock"))
        .ephemeral(true)
        .start()
        .unwrap();
    let ask = |socket: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_kvmp"));
        command.args(["ping", "--socket", socket]).current_dir(dir.path()).output().unwrap()
    };
    assert!(ask("x.sock").status.success());
    let text = String::from_utf8(ask("y.sock").stderr).unwrap();
    assert!(text.contains(&format!("unix:{}/y.sock", dir.path().display())) && text.contains("kvmp serve"), "{text}");
    server.stop();
}
