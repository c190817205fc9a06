//! A minute of SIGSTOP, longer than a read lease's TTL: of a server, while its clients give up on calls; and under a
//! server that runs, of a worker in mid-store and a scheduler with pins. The minutes are the same one, to wait once.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use kvmp_client::{Bound, Client, ClientError, ConnectOptions, ReadLease, ReserveList};
use kvmp_core::wire::Role;
use rustix::process::Signal;

use crate::puppet::{Answer, Ask, Grant};
use crate::serve::is_stopped;
use crate::support::{Engine, chain, patience, spec, until};
use crate::theatre::{Cast, PARTS, Theatre};

/// Longer than the 60 s of a read lease.
const MINUTE: Duration = Duration::from_secs(65);
/// Shorter than that: so long pins are held.
const LESS: Duration = Duration::from_secs(50);
/// `kvmp.timeout_ms`, as it is unless set.
const BOUND_MS: u64 = 100;

fn bound() -> Bound<'static> {
    Bound::ms(BOUND_MS)
}

/// A server that is to be stopped: one client has pins, one a store in mid-way, one asks.
struct Stopped {
    theatre: Theatre,
    pinned: ReadLease,
    cast: Cast,
    grant: Grant,
    asks: Engine,
}

impl Stopped {
    fn set() -> Self {
        let theatre = Theatre::open("minute-stopped");
        assert_eq!(theatre.bystanders[0].store(&chain(1, 20)), 20);
        let pinned = theatre.bystanders[0].lookup(&chain(1, 20));
        let mut cast = Cast::new(&theatre);
        let grant = cast.store_in_part(10);
        let asks = Engine::new(&theatre.server.endpoint(), &spec("m", &PARTS));
        assert!(pinned.pinned());
        assert_eq!((theatre.stat("read_leases"), theatre.stat("pins"), theatre.unsettled()), (1, 1, 8));
        theatre.server.freeze();
        Self { theatre, pinned, cast, grant, asks }
    }

    fn look_up(&self) -> Result<ReadLease, ClientError> {
        self.asks.scheduler.lookup(&self.asks.namespace, &chain(1, 20), &bound())
    }

    /// One call waits its bound and is given up, a hit that will be pinned; then none waits.
    fn is_given_up(&self) {
        let first = self.look_up().err().unwrap();
        assert!(matches!(first, ClientError::BoundExceeded { limit_ms: BOUND_MS, .. }), "{first}");
        // Whoever asks without waiting for an answer may do so: what is granted late is cancelled.
        let list = ReserveList { hashes: &chain(30, 10), first_block: 0, parent: None, group: 0 };
        assert!(self.asks.scheduler.submit_reserve(&self.asks.namespace, &list).is_err(), "it is known to be gone");
        let silent = &self.theatre.bystanders[1];
        drop(silent.scheduler.submit_reserve(&silent.namespace, &list).unwrap());
    }

    /// As if it were gone: calls wait for nothing, and it answers no ping.
    fn is_as_if_gone(&self) {
        assert!(is_stopped(self.theatre.server.pid()));
        let waited = self.asks.scheduler.waited_us();
        assert!((0..5).all(|_| matches!(self.look_up(), Err(ClientError::Lost(_)))));
        assert_eq!(self.asks.scheduler.waited_us(), waited);
        assert!(matches!(self.asks.scheduler.ping(&bound()), Err(ClientError::BoundExceeded { .. })));
        // One that says hello and gives up before the welcome: no fault of its own.
        let options = ConnectOptions::new(Role::Tool);
        assert!(Client::connect(&self.theatre.server.endpoint(), &options, &bound()).is_err());
    }

    fn goes_on(mut self) {
        let theatre = &self.theatre;
        theatre.server.signal(Signal::CONT);
        until("a ping is answered", || self.asks.scheduler.ping(&bound()).is_ok());
        assert!(self.asks.scheduler.lost().is_none() && theatre.stat("uptime_s") >= MINUTE.as_secs());
        until("the lease has ended by its TTL, and what was given up is undone", || {
            self.asks.scheduler.ping(&patience()).unwrap();
            theatre.bystanders[1].scheduler.ping(&patience()).unwrap();
            theatre.stat("read_leases") + theatre.stat("pins") == 0 && theatre.unsettled() == 8
        });
        assert_eq!(self.asks.scheduler.open_requests().unwrap(), 0, "of a minute's pings");
        // The lease that ended is worth what the slots' words say: nothing was evicted.
        let run = self.pinned.group(0).unwrap();
        let (worker, _) = &theatre.bystanders[0].workers[0];
        assert!(worker.check(&run.slots, &run.words).unwrap().into_iter().all(|held| held));
        self.pinned.release();
        until("its release is refused", || theatre.stat("refused_releases") == 1);
        // No TTL closes a part: the store ends as if nothing had been.
        let Cast { workers, .. } = &mut self.cast;
        workers[0].store(&self.grant.of(8..12));
        workers[1].store(&self.grant.of(4..12));
        assert_eq!((theatre.unsettled(), theatre.hit(10, 12), theatre.hit(1, 20)), (0, 12, 20));
        assert_eq!((self.asks.hit(&chain(1, 20)), self.asks.store(&chain(30, 10))), (20, 10));
        nothing_is_held(theatre);
        theatre.goes_on();
    }
}

fn nothing_is_held(theatre: &Theatre) {
    let gauges = ["read_leases", "pins", "write_leases", "blocks_writing", "blocks_quarantined"];
    until("nothing is held", || gauges.iter().all(|gauge| theatre.stat(gauge) == 0));
    assert_eq!(theatre.stat("protocol_errors"), 0);
}

/// A server that runs, with a scheduler that is stopped with pins and a worker that is stopped in mid-store.
struct Running {
    theatre: Theatre,
    cast: Cast,
    grant: Grant,
    /// A slot that the worker was seen to write, and what it holds.
    still: (u32, u64),
}

impl Running {
    fn set() -> Self {
        let theatre = Theatre::open("minute-running");
        assert_eq!(theatre.bystanders[0].store(&chain(1, 20)), 20);
        let mut cast = Cast::new(&theatre);
        let grant = cast.store_in_part(10);
        cast.workers[0].store(&grant.of(8..12));
        cast.workers[1].count(&Ask::Storm(grant.of(4..12)));
        theatre.sees_a_copy(grant.slots[11].1, 1);
        assert_eq!(cast.scheduler.count(&Ask::Lookup(1, 20)), 20);
        cast.workers[1].freeze();
        cast.scheduler.freeze();
        let slot = grant.slots[11].1;
        let still = (slot, theatre.bytes_of(slot, 1));
        assert_eq!((theatre.stat("pins"), theatre.unsettled()), (1, 8));
        Self { theatre, cast, grant, still }
    }

    fn pins(&self) -> u64 {
        self.theatre.stat("read_leases") + self.theatre.stat("pins")
    }

    /// Nobody else gets the slots of a worker that may store into them yet.
    fn keeps_its_slots(&self) {
        let slots: BTreeSet<u32> = self.grant.of(4..12).slots().into_iter().collect();
        assert!(
            self.theatre.all_slots_to_be_had(&[10]).is_disjoint(&slots),
            "slots of a stopped worker were given away"
        );
        assert_eq!((self.theatre.stat("blocks_writing"), self.theatre.bytes_of(self.still.0, 1)), (8, self.still.1));
        assert_eq!(self.theatre.hit(10, 12), 4);
    }

    fn goes_on(mut self) {
        self.keeps_its_slots();
        let Cast { scheduler, workers } = &mut self.cast;
        scheduler.signal(Signal::CONT);
        workers[1].signal(Signal::CONT);
        self.theatre.sees_a_copy(self.still.0, 1);
        workers[1].count(&Ask::Calm);
        workers[1].store(&self.grant.of(4..12));
        assert_eq!((self.theatre.unsettled(), self.theatre.hit(10, 12)), (0, 12));
        assert_eq!(scheduler.count(&Ask::Abandon), 2, "a lease that has ended may be given back");
        assert!(matches!(scheduler.ask(&Ask::Reserve(40, 10)), Answer::Granted(_, granted) if granted.len() == 10));
        scheduler.count(&Ask::Close);
        workers.iter_mut().for_each(|worker| assert_eq!(worker.count(&Ask::Close), 0));
        nothing_is_held(&self.theatre);
        self.theatre.goes_on();
    }
}

#[test]
fn a_minute_of_sigstop_leaves_nothing_pinned_or_writing() {
    let (stopped, running) = (Stopped::set(), Running::set());
    let begun = Instant::now();
    stopped.is_given_up();
    running.keeps_its_slots();
    while begun.elapsed() < MINUTE || running.pins() > 0 {
        stopped.is_as_if_gone();
        assert_eq!(running.theatre.unsettled(), 8);
        assert!(begun.elapsed() > LESS || running.pins() == 2, "a read lease ended before its TTL");
        assert!(begun.elapsed() < MINUTE + LESS / 2, "a read lease had no end");
        std::thread::sleep(Duration::from_secs(1));
    }
    running.goes_on();
    stopped.goes_on();
}
