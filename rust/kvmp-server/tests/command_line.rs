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
            assert!(text.contains("native binary") && text.contains("pip install kvmp"), "{text}");
            assert!(text.contains(&format!("`kvmp {command}`")) && answer.stdout.is_empty(), "{text}");
        }
    }
}
