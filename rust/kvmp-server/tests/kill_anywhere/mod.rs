//! SIGKILL at any instruction leaves a segment that recovers, and never a block with another block's bytes.
//!
//! A process (this test binary again) runs an engine's calls on a real store over a real segment file and is killed at a
//! random instant. Then every raw record is checked, the file is recovered as a server recovers it, every byte of every
//! block kept is compared with what its key says, and the next process goes on from there. The process notes what it is
//! doing in a page that outlives it: so a run counts how many kills fell into a grant, a commit and an evict.
//!
//! `KVMP_KILLS` makes it more (or fewer) kills, `KVMP_SEED` the same calls and delays again; kills come by the clock, so a
//! seed repeats the odds of a run and not the run.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on should stop where it is")]

mod blocks;
mod kills;
mod life;
mod page;
#[allow(dead_code, reason = "each test binary uses its share of it")]
#[path = "../support/refused.rs"]
mod refused;
mod stepping;
mod table;
mod witness;

use std::path::PathBuf;

use kills::{Kills, Tally};
use page::Call;
use refused::Need;
use table::Order;

const KILLS: u64 = 2000;
const STEPPED_ROUNDS: usize = 3;
/// Kills between the same two stores.
const HELD_ROUNDS: usize = 3;
const SLOW_KILLS: u64 = 100;
/// Kills within which a wrong order must have shown itself.
const CONTROL_KILLS: u64 = 500;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
}

fn seed() -> u64 {
    let seed = number("KVMP_SEED").unwrap_or_else(crate::segment::boot_clock_ns);
    println!("KVMP_SEED={seed}");
    seed
}

/// Not a test: what the tests below start and kill.
#[test]
#[ignore = "started by the tests of this module"]
fn a_life() {
    let Some(dir) = std::env::var_os("KVMP_LIFE_DIR").map(PathBuf::from) else { return };
    // Whoever was to kill it may be killed itself.
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL)).unwrap();
    let page = page::Page::open(&dir);
    if page.will_stop() {
        let thread = stepping::be_traced().then(|| rustix::thread::gettid().as_raw_nonzero().get() as u64);
        page.set_thread(thread.unwrap_or(stepping::NOT_TRACED));
    }
    let order = Order::named(&std::env::var("KVMP_LIFE_ORDER").unwrap());
    life::live(&dir, order, number("KVMP_LIFE_SEED").unwrap());
}

#[test]
fn a_kill_at_any_instruction_leaves_what_recovers() {
    let (mut kills, wanted) = (Kills::new(Order::Right, seed()), number("KVMP_KILLS").unwrap_or(KILLS));
    for kill in 1..=wanted {
        let verdict = kills.one();
        let whole = verdict.raw.and(verdict.served);
        whole.unwrap_or_else(|why| panic!("kill {kill}, in {:?}: {why}", kills.tally.in_work));
    }
    report(&kills);
    for call in [Call::Grant, Call::Commit, Call::Evict] {
        assert!(kills.tally.inside(call) > 0, "no kill fell into a {call:?}");
    }
    assert!(kills.tally.quarantined > 0 && kills.tally.blocks_checked > wanted);
}

/// Kills a life after each change that one call of each kind makes, in turn; what the checker objected to, if it did.
/// `None` where a process may not be traced.
fn kill_after_each_change(kills: &mut Kills) -> Option<Result<(), String>> {
    for call in [Call::Grant, Call::Commit, Call::Evict].repeat(STEPPED_ROUNDS) {
        let mut last = None;
        for changes in 0.. {
            let (verdict, stepped) = kills.stepped(call, changes)?;
            if let Err(why) = verdict.raw.and(verdict.served) {
                return Some(Err(format!("after change {changes} of a {call:?}: {why}")));
            }
            last = Some(stepped);
            if stepped.finished {
                break;
            }
        }
        println!("{call:?}: {last:?}");
    }
    Some(Ok(()))
}

#[test]
fn a_kill_after_any_change_that_a_call_makes_leaves_what_recovers() {
    let mut kills = Kills::new(Order::Right, seed());
    match kill_after_each_change(&mut kills) {
        None => not_traced(),
        Some(outcome) => {
            outcome.unwrap();
            report(&kills);
            assert!(kills.tally.torn > 0 && kills.tally.sealed > 0);
        }
    }
}

#[test]
fn control_a_wrong_order_is_caught_by_the_kill_between_its_changes() {
    for order in [Order::FieldsBeforeWord, Order::ReadyBeforeCheck, Order::ReadyBeforeSums] {
        match kill_after_each_change(&mut Kills::new(order, seed())) {
            None => return not_traced(),
            Some(outcome) => assert!(outcome.is_err(), "{order:?} went unseen"),
        }
    }
}

fn not_traced() {
    Need::Ptrace.refused("this process may not trace its children");
}

fn report(kills: &Kills) {
    let tally = &kills.tally;
    let percent = |n: u64| 100.0 * n as f64 / tally.kills as f64;
    println!("{} kills; {} blocks checked after them", tally.kills, tally.blocks_checked);
    for (call, n) in &tally.in_call {
        println!("  inside {call:?}: {n} ({:.2} %) of {} such calls", percent(*n), kills.finished(*call));
    }
    for (work, n) in &tally.in_work {
        println!("  during {work:?}: {n} ({:.2} %)", percent(*n));
    }
    println!("  records left half granted: {}, sealed but not Ready: {}", tally.torn, tally.sealed);
}

/// Runs until the checker objects; what it objected to: the raw records, and what recovery served.
fn caught(order: Order) -> (Option<String>, Option<String>) {
    let mut kills = Kills::new(order, seed());
    for kill in 1..=CONTROL_KILLS {
        let verdict = kills.one();
        if verdict.raw.is_err() || verdict.served.is_err() {
            println!("{order:?}: caught after {kill} kills: {:?} {:?}", verdict.raw, verdict.served);
            return (verdict.raw.err(), verdict.served.err());
        }
    }
    panic!("{order:?} went unseen for {CONTROL_KILLS} kills");
}

/// What the controls slow down is not what they are caught for.
#[test]
fn control_of_the_controls_the_right_order_as_slow_as_the_wrong_ones() {
    let mut kills = Kills::new(Order::RightSlowly, seed());
    // All but the last of a grant's stores, and of a commit's.
    let between = (1..8).map(|stores| (Call::Grant, stores)).chain([(Call::Commit, 1)]);
    for (call, stores) in between.flat_map(|held| [held; HELD_ROUNDS]) {
        let verdict = kills.held(call, stores);
        verdict.raw.and(verdict.served).unwrap_or_else(|why| panic!("after {stores} stores of a {call:?}: {why}"));
    }
    let Tally { torn, sealed, .. } = kills.tally;
    assert!(
        torn >= 7 * HELD_ROUNDS as u64 && sealed >= HELD_ROUNDS as u64,
        "{torn} left in a grant, {sealed} in a commit"
    );
    for kill in 1..=SLOW_KILLS {
        let verdict = kills.one();
        verdict.raw.and(verdict.served).unwrap_or_else(|why| panic!("kill {kill}: {why}"));
    }
    report(&kills);
}

#[test]
fn control_fields_before_the_word() {
    let (raw, served) = caught(Order::FieldsBeforeWord);
    assert!(raw.is_some() && served.is_none(), "{raw:?} {served:?}");
}

#[test]
fn control_ready_before_the_check() {
    let (raw, served) = caught(Order::ReadyBeforeCheck);
    // Recovery sees the check missing, and keeps nothing that is wrong.
    assert!(raw.is_some_and(|why| why.contains("check does not fit")) && served.is_none(), "{served:?}");
}

#[test]
fn control_ready_before_the_sums() {
    let (raw, served) = caught(Order::ReadyBeforeSums);
    assert!(raw.is_some_and(|why| why.contains("Ready with Some")) && served.is_none(), "{served:?}");
}

#[test]
fn control_a_commit_before_the_bytes() {
    let (raw, served) = caught(Order::CommitBeforeBytes);
    assert!(raw.is_none() && served.is_some_and(|why| why.contains("has not the bytes of")), "{raw:?}");
}

#[test]
fn control_new_bytes_under_an_old_ready_word() {
    let (raw, served) = caught(Order::BytesUnderOldWord);
    assert!(raw.is_none() && served.is_some_and(|why| why.contains("has not the bytes of")), "{raw:?}");
}
