//! SIGSTOP: for its clients the server is gone within their bound; when it goes on, nothing of what they gave up is left.

use kvmp_client::{Bound, Client, ClientError, ConnectOptions, ReserveList, WriteLease};
use kvmp_core::wire::Role;
use rustix::process::Signal;

use crate::attached::Attached;
use crate::load::filled;
use crate::served::{House, NAME};
use crate::support::{Engine, Hash, chain, patience, spec, until};

/// `kvmp.timeout_ms`, as it is unless set.
const BOUND_MS: u64 = 100;

fn bound() -> Bound<'static> {
    Bound::ms(BOUND_MS)
}

fn engine(house: &House) -> Attached {
    Attached::new(&house.endpoint(), &spec("m", &[9000]), None).unwrap()
}

fn reserve(engine: &Attached, hashes: &[Hash], bound: &Bound<'_>) -> Result<WriteLease, ClientError> {
    let list = ReserveList { hashes, first_block: 0, parent: None, group: 0 };
    engine.scheduler.reserve(&engine.namespace, &list, bound)
}

/// The first call waits its bound and is given up; whatever is asked after that waits for nothing.
fn gives_up<T>(client: &Client, call: impl Fn(&Bound<'_>) -> Result<T, ClientError>) {
    let before = client.waited_us();
    let first = call(&bound()).err().unwrap();
    assert!(matches!(first, ClientError::BoundExceeded { limit_ms: BOUND_MS, .. }), "{first}");
    let waited = client.waited_us();
    assert!(waited > before, "kvmp counts its own waits");
    for _ in 0..5 {
        let again = call(&bound()).err().unwrap();
        assert!(matches!(again, ClientError::Lost(_)), "{again}");
    }
    // A ping is the background thread's: it alone waits, and keeps its own bound.
    assert_eq!(client.waited_us(), waited);
    assert!(matches!(client.ping(&bound()), Err(ClientError::BoundExceeded { .. })));
}

#[test]
fn what_clients_gave_up_is_undone_when_the_server_goes_on() {
    let house = House::new();
    let (mut served, watcher) = filled(&house, &[]);
    let [looks, reserves, leaves, commits] = [(); 4].map(|()| engine(&house));
    let stored = chain(20, 10);
    let mut lease = reserve(&commits, &stored, &patience()).unwrap();
    lease.hand_over();
    let granted = Engine::granted(&lease);
    let (slots, words): (Vec<u32>, Vec<u64>) = granted.iter().map(|g| (g.1, g.2)).unzip();
    let places = commits.worker.parts_at(&commits.joined, 0, &slots).unwrap();
    for (hash, offset) in stored.iter().zip(&places.offsets) {
        places.arena.write(*offset, &vec![crate::support::fill(hash, 0); places.bytes as usize]);
    }
    drop(places);
    let pinned = leaves.scheduler.lookup(&leaves.namespace, &chain(1, 50), &patience()).unwrap();
    let before = ["lookups", "granted", "committed_blocks"].map(|name| watcher.stat(name));

    served.freeze();
    gives_up(&looks.scheduler, |bound| looks.scheduler.lookup(&looks.namespace, &chain(1, 50), bound));
    gives_up(&reserves.scheduler, |bound| reserve(&reserves, &chain(30, 10), bound));
    gives_up(&commits.worker, |bound| commits.worker.commit(lease.lease_id(), &slots, &words, None, bound));
    // One leaves with a pin and with both questions open.
    let _ = leaves.scheduler.submit_lookup(&leaves.namespace, &chain(1, 50)).unwrap();
    let list = ReserveList { hashes: &chain(40, 10), first_block: 0, parent: None, group: 0 };
    let _ = leaves.scheduler.submit_reserve(&leaves.namespace, &list).unwrap();
    drop((pinned, leaves));
    // One comes: it is not let in, within its bound.
    let late = Client::connect(&house.endpoint(), &ConnectOptions::new(Role::Scheduler), &bound());
    assert!(matches!(late, Err(ClientError::Hello { .. })), "{late:?}");
    drop(late);

    served.signal(Signal::CONT);
    for client in [&looks.scheduler, &reserves.scheduler, &commits.worker] {
        client.ping(&patience()).unwrap();
        assert!(client.lost().is_none(), "an answered ping ends the loss");
    }
    until("what was asked has been answered", || {
        let now = ["lookups", "granted", "committed_blocks"].map(|name| watcher.stat(name));
        now[0] > before[0] && now[1] >= before[1] + 10 && now[2] == before[2] + 10
    });
    for gauge in ["read_leases", "pins", "write_leases", "blocks_writing", "blocks_quarantined"] {
        until(&format!("{gauge} is 0"), || {
            // Late replies are taken in by whichever call comes next.
            [&looks, &reserves, &commits].iter().for_each(|e| drop(e.scheduler.ping(&patience())));
            watcher.stat(gauge) == 0
        });
    }
    until("those who left are gone", || watcher.stat("sessions") == 8);
    // All is as before: the old blocks, the late commit's, and room for what was given up.
    assert_eq!(looks.hit(&chain(1, 50)).unwrap() + commits.hit(&stored).unwrap(), 60);
    assert_eq!(reserves.hit(&chain(30, 10)).unwrap(), 0);
    assert_eq!(reserves.store(&chain(30, 10)).unwrap(), 10);
    assert!(served.stop().contains("SIGTERM: stopping"));
}

#[test]
fn a_second_start_says_who_has_the_name_and_takes_nothing() {
    let house = House::new();
    let (mut served, engine) = filled(&house, &[]);
    let (pid, inode) = (served.pid(), house.inode());
    served.freeze();
    let taken = format!("(pid {pid}, which a signal has stopped) already runs under the name '{NAME}'");
    for more in [&[][..], &["--fresh"], &["--size", "32MiB"]] {
        let (code, log) = house.fails(more);
        assert!(code == 1 && log.contains(&taken) && log.contains(&format!("`kill -CONT {pid}`")), "{log}");
    }
    let mut rm = std::process::Command::new(env!("CARGO_BIN_EXE_kvmp"));
    let rm = rm.args(["rm", NAME, "--arena-dir"]).arg(house.path("")).output().unwrap();
    let said = String::from_utf8_lossy(&rm.stderr);
    assert!(rm.status.code() == Some(1) && said.contains(&format!("a kvmp server (pid {pid}")), "{said}");
    served.signal(Signal::CONT);
    assert_eq!((house.inode(), engine.hit(&chain(1, 50)).unwrap()), (inode, 50));
    assert!(engine.scheduler.lost().is_none() && served.is_running());
}
