//! Sessions that open namespaces without end, and specs that no store could work with.

use kvmp_client::{Client, ClientError, ConnectOptions};
use kvmp_core::namespace::{GroupRule, GroupSpec, NamespaceSpec};
use kvmp_core::wire::Role;

use crate::support::{connect, patience, spec, until};
use crate::theatre::{PARTS, Theatre};

const TABLE: usize = 4096;
const SHARE: usize = TABLE / 4;

fn scheduler(theatre: &Theatre) -> Client {
    connect(&theatre.server.endpoint(), &ConnectOptions::new(Role::Scheduler))
}

/// As an engine has them that was reset so often.
fn salted(salt: usize) -> NamespaceSpec {
    NamespaceSpec { salt: salt.to_string(), ..spec("m", &PARTS) }
}

/// Opens until it is refused; how many, and the reason.
fn open_all(client: &Client, salts: std::ops::Range<usize>) -> (usize, String) {
    for (opened, salt) in salts.enumerate() {
        match client.open(&salted(salt), &patience()) {
            Ok(_) => {}
            Err(ClientError::Namespace(why)) => return (opened, why),
            Err(error) => panic!("{error}"),
        }
    }
    panic!("there was no end");
}

#[test]
fn one_session_does_not_take_the_whole_table() {
    let theatre = Theatre::open("table");
    let greedy = scheduler(&theatre);
    let (opened, why) = open_all(&greedy, 0..TABLE);
    assert_eq!(opened, SHARE);
    assert!(why.contains("1024 namespaces open") && why.contains("4096") && why.contains("connect again"), "{why}");
    assert!(greedy.lost().is_none(), "a refused namespace leaves the session as it was");
    greedy.open(&salted(0), &patience()).unwrap();
    // Others find room.
    scheduler(&theatre).open(&salted(TABLE), &patience()).unwrap();
    assert_eq!(open_all(&scheduler(&theatre), TABLE..3 * TABLE).0, SHARE);
    // And so does the greedy one once it comes again, however often: what nobody has is taken back.
    drop(greedy);
    until("its session is gone", || theatre.stat("sessions") == 6);
    for round in 3..6 {
        assert_eq!(open_all(&scheduler(&theatre), round * TABLE..(round + 1) * TABLE).0, SHARE);
    }
    assert_eq!(theatre.stat("namespaces"), TABLE as u64);
}

#[test]
fn a_spec_whose_hits_could_not_be_counted_is_refused() {
    let theatre = Theatre::open("specs");
    let group = |rule, block_tokens, hash_stride| GroupSpec { rule, block_tokens, window_tokens: 0, hash_stride };
    let (prefix, state) = (GroupRule::Prefix, GroupRule::State);
    let two = |a, b| vec![group(prefix, a, a), group(state, b, b)];
    for (groups, named) in [
        (vec![group(prefix, 1 << 31, 1)], "groups[0].block_tokens"),
        (vec![group(prefix, 262_144, 1)], "groups[0].block_tokens"),
        // Primes: their least common multiple is over 64 bits, over 32 bits, and over what a list holds.
        (two(4_294_967_291, 4_294_967_279), "whole blocks of every group"),
        (two(65_537, 65_539), "whole blocks of every group"),
        (two(127, 131), "whole blocks of every group"),
    ] {
        let parts = vec![kvmp_core::namespace::PartSpec { bytes: vec![4096; groups.len()], layout: 0.into() }];
        let bad = NamespaceSpec { groups, parts, ..spec("m", &PARTS) };
        let client = scheduler(&theatre);
        let why = client.open(&bad, &patience()).unwrap_err().to_string();
        assert!(why.contains(named), "{why}");
        client.open(&spec("m", &PARTS), &patience()).unwrap();
    }
}
