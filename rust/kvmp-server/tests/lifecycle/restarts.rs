//! SIGKILL and a start, again and again: engines under load come back each time, to the old bytes.

use std::sync::atomic::{AtomicBool, Ordering};

use kvmp_client::{Bound, Client, ClientError, ConnectOptions};
use kvmp_core::wire::Role;

use crate::attached::Attached;
use crate::load::{Load, filled, more_rounds};
use crate::served::House;
use crate::support::{chain, spec, until};

const RESTARTS: usize = 10;

/// Waits until an engine that looks for a server has found none.
fn nobody_is_there(endpoint: &str) {
    let options = ConnectOptions::new(Role::Tool);
    let found = Client::connect(endpoint, &options, &Bound::ms(100)).map(drop);
    assert!(matches!(found, Err(ClientError::NoServer { .. })), "{found:?}");
}

#[test]
fn engines_come_back_to_the_old_bytes_each_time_fast_or_slow() {
    let house = House::new();
    let (mut served, engine) = filled(&house, &[]);
    let over = AtomicBool::new(false);
    let loads = [Load::new(&house, &over), Load::new(&house, &over)];
    let _last = std::thread::scope(|scope| {
        for (seed, load) in [100, 150].into_iter().zip(&loads) {
            scope.spawn(move || load.run(seed));
        }
        for restart in 1..=RESTARTS {
            more_rounds(&loads, 3);
            served.kill();
            // Every other time the engines find nobody for a while.
            (0..restart % 2 * 20).for_each(|_| nobody_is_there(&house.endpoint()));
            served = house.start(&[]);
            assert!(served.log().contains("recovered"), "{}", served.log());
            until("both attach again", || loads.iter().all(|load| load.attaches() == restart));
        }
        more_rounds(&loads, 3);
        over.store(true, Ordering::Relaxed);
        served
    });
    let again = engine.again(&house.endpoint());
    assert_eq!(again.hit(&chain(1, 50)).unwrap(), 50);
    // As long as this one may be storing, what the last kill caught in mid-store is held back.
    drop(engine);
    until("nothing is held back", || again.stat("blocks_quarantined") + again.stat("blocks_writing") == 0);
    assert_eq!(again.stat("read_leases") + again.stat("pins"), 0);
}

#[test]
fn more_namespaces_than_have_memory_from_the_start_come_back() {
    let house = House::new();
    let (mut served, engine) = filled(&house, &[]);
    let long = "x".repeat(9000);
    let specs: Vec<_> = (0..20).map(|i| spec(&format!("model {i} {long}"), &[9000])).collect();
    for spec in &specs {
        let other = Attached::new(&house.endpoint(), spec, None).unwrap();
        assert_eq!(other.store(&chain(3, 5)).unwrap(), 5);
    }
    served.kill();
    served = house.start(&[]);
    assert!(served.log().contains("150 blocks kept, 0 dropped"), "{}", served.log());
    for spec in &specs {
        assert_eq!(Attached::new(&house.endpoint(), spec, None).unwrap().hit(&chain(3, 5)).unwrap(), 5);
    }
    assert_eq!(engine.again(&house.endpoint()).hit(&chain(1, 50)).unwrap(), 50);
}
