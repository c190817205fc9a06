//! Two servers on one name, on one socket, on one port: each is told what is taken, by whom, and the mend.

use crate::load::filled;
use crate::served::{House, NAME};
use crate::support::{chain, until};

#[test]
fn a_name_a_socket_and_a_port_have_one_server_each() {
    let house = House::new();
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let (mut first, engine) = filled(&house, &["--tcp", &port]);
    let (pid, other) = (first.pid(), house.path("other.sock"));
    let other = ["--name", "other", "--socket", other.to_str().unwrap()];
    for (more, what, mends) in [
        (&[][..], format!("(pid {pid}) already runs under the name '{NAME}'"), ["--upgrade", "another --name"]),
        (&other[..2], format!("kvmp.sock: another server answers there (pid {pid}, uid "), ["--socket", "--name"]),
        (
            &[&other[..], &["--tcp", &port]].concat(),
            format!("--tcp {port}: the kvmp server at {} has that port", house.endpoint()),
            ["another port", "--tcp off"],
        ),
    ] {
        let (code, log) = house.fails(more);
        assert!(code == 1 && log.contains(&what) && mends.iter().all(|mend| log.contains(mend)), "{what}: {log}");
    }
    let kill = format!("`kill {pid}`");
    assert!(house.fails(&[]).1.contains(&kill));
    // Nothing of the others is left, and the first has not noticed.
    let left = std::fs::read_dir(house.path("")).unwrap().map(|entry| entry.unwrap().file_name());
    let mut left: Vec<String> = left.map(|name| name.into_string().unwrap()).collect();
    left.sort();
    assert_eq!(left, ["kvmp.sock", &format!("{NAME}.kvmp")]);
    assert!(first.is_running() && engine.scheduler.lost().is_none());
    assert_eq!(engine.hit(&chain(1, 50)).unwrap(), 50);
}

#[test]
fn of_many_that_start_at_once_one_has_the_name() {
    let house = House::new();
    // On no file, and on the file that the last one left.
    for _ in 0..2 {
        let mut all: Vec<_> = (0..4).map(|_| house.spawn(&[])).collect();
        until("all but one give up", || all.iter_mut().filter_map(|one| one.is_running().then_some(())).count() == 1);
        let winner = all.iter_mut().position(|one| one.is_running()).unwrap();
        let mut winner = all.swap_remove(winner);
        winner.says("ready:");
        for mut loser in all {
            let (code, log) = (loser.wait().code(), loser.log());
            assert!(code == Some(1) && log.contains(&format!("(pid {}) already runs", winner.pid())), "{log}");
        }
        winner.kill();
    }
}
