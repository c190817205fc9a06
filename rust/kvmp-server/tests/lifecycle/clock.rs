//! Clocks that jump: the time of day under a server that runs, the boot-time clock between two servers of one file. The
//! machine's own clocks are left alone.

use std::process::Command;

use crate::attached::Attached;
use crate::served::{House, Served};
use crate::support::refused::Need;
use crate::support::{chain, patience, spec, until};

/// A `clock_gettime` that has another year at every look at the time of day; the other clocks are as they are.
const SHIM: &str = r"
#define _GNU_SOURCE
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
int clock_gettime(clockid_t id, struct timespec *at) {
    static unsigned looks;
    long done = syscall(SYS_clock_gettime, id, at);
    if (done == 0 && id == CLOCK_REALTIME) at->tv_sec += __atomic_fetch_add(&looks, 1, 5) % 2 ? 1000000000 : -1000000000;
    return (int)done;
}";

/// The shim as a library; `None` without a C compiler.
fn shim(house: &House) -> Option<String> {
    let (source, library) = (house.path("shim.c"), house.path("shim.so").display().to_string());
    std::fs::write(&source, SHIM).unwrap();
    let made = Command::new("cc").args(["-shared", "-fPIC", "-o", &library]).arg(&source).status();
    if !made.as_ref().is_ok_and(std::process::ExitStatus::success) {
        Need::Compiler.refused(format!("{made:?}"));
        return None;
    }
    Some(library)
}

/// The year of each line of a log.
fn years(log: &str) -> Vec<u32> {
    log.lines().filter_map(|line| line.split_once('-')?.0.parse().ok()).collect()
}

#[test]
fn the_time_of_day_plays_no_part() {
    let house = House::new();
    let Some(library) = shim(&house) else { return };
    let start = || {
        let mut command = house.command(&[]);
        command.env("LD_PRELOAD", &library);
        let served = Served::spawn(command);
        served.says("ready:");
        served
    };
    let mut served = start();
    let engine = Attached::new(&house.endpoint(), &spec("m", &[9000]), None).unwrap();
    until("the arena is backed", || engine.stats()["warming"] == false);
    assert_eq!(engine.store(&chain(1, 50)).unwrap(), 50);
    let pinned = engine.scheduler.lookup(&engine.namespace, &chain(1, 50), &patience()).unwrap();
    // Over two looks for expired leases and more: decades pass, and the pins stay.
    until("two seconds have passed", || engine.stat("uptime_s") >= 2);
    assert_eq!((engine.stat("read_leases"), engine.stat("pins")), (1, 1));
    drop(pinned);
    until("they go when they are released", || engine.stat("pins") == 0);
    let jumps = years(&served.log());
    assert!(jumps.iter().max().unwrap() - jumps.iter().min().unwrap() > 50, "it saw no jump: {}", served.log());
    served.kill();
    let mut served = start();
    let again = engine.again(&house.endpoint());
    assert_eq!(again.hit(&chain(1, 50)).unwrap(), 50);
    assert!(served.stop().contains("SIGTERM: stopping"));
}

/// `kvmp serve` in a time namespace whose boot-time clock is ten days ahead.
fn ten_days_ahead(house: &House) -> Served {
    let serve = house.command(&[]);
    let mut command = Command::new("unshare");
    command.args(["-rT", "--boottime", "864000", "-f", "--kill-child"]);
    command.arg(serve.get_program()).args(serve.get_args());
    Served::spawn(command)
}

#[test]
fn the_boot_clock_may_jump_from_one_server_to_the_next() {
    let house = House::new();
    let can = Command::new("unshare").args(["-rT", "--boottime", "864000", "-f", "true"]).status();
    if !can.as_ref().is_ok_and(std::process::ExitStatus::success) {
        return Need::BootClock.refused(format!("{can:?}"));
    }
    let mut served = ten_days_ahead(&house);
    served.says("are backed");
    let engine = Attached::new(&house.endpoint(), &spec("m", &[9000]), None).unwrap();
    assert_eq!(engine.store(&chain(1, 50)).unwrap(), 50);
    for back in [true, false] {
        served.kill();
        served = if back { house.spawn(&[]) } else { ten_days_ahead(&house) };
        served.says("50 blocks kept");
        let again = engine.again(&house.endpoint());
        assert_eq!(again.hit(&chain(1, 50)).unwrap(), 50);
        // What is new outlives what is old, whatever the clock says of either.
        (2..40).for_each(|seed| assert_eq!(again.store(&chain(seed, 50)).unwrap(), 50));
        assert!(again.stat("evictions") > 0);
        assert_eq!((again.hit(&chain(39, 50)).unwrap(), again.hit(&chain(2, 50)).unwrap()), (50, 0));
        again.scheduler.clear(&patience()).unwrap();
        assert_eq!(again.store(&chain(1, 50)).unwrap(), 50);
    }
}
