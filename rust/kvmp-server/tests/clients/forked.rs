//! A client that forks: the child may not use it, and does not keep the parent's slots when the parent dies.

use std::path::PathBuf;

use crate::puppet::{Answer, Ask, Puppet};
use crate::support::{chain, until};
use crate::theatre::{Cast, Theatre};

/// A child of a puppet, which lives as long as the puppet's standard input is open.
struct Child(u32);

impl Child {
    fn of(puppet: &mut Puppet) -> Self {
        let Answer::Forked(pid, tried) = puppet.ask(&Ask::Fork) else { panic!("no fork") };
        assert!(tried.contains("a client does not pass through fork(): connect in the child"), "{tried}");
        Self(pid)
    }

    /// Descriptors that lead to the server or its memory.
    fn kept(&self) -> Vec<PathBuf> {
        let fds = std::fs::read_dir(format!("/proc/{}/fd", self.0)).unwrap();
        let targets = fds.filter_map(|fd| std::fs::read_link(fd.unwrap().path()).ok());
        targets.filter(|target| target.to_string_lossy().starts_with("socket:")).collect()
    }

    fn lives(&self) -> bool {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.0)).unwrap_or_default();
        stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with(['Z', 'X']))
    }
}

#[test]
fn a_dead_parents_slots_come_back_while_its_forked_child_lives() {
    let theatre = Theatre::open("forked");
    theatre.bystanders[0].store(&chain(1, 20));
    let mut cast = Cast::new(&theatre);
    let grant = cast.store_in_part(10);
    cast.copy(&theatre, &grant);
    cast.scheduler.count(&Ask::Lookup(1, 20));
    assert_eq!((theatre.unsettled(), theatre.stat("pins")), (8, 1));
    let mut everyone: Vec<Puppet> = cast.workers.drain(..).chain([cast.scheduler]).collect();
    let children: Vec<Child> = everyone.iter_mut().map(Child::of).collect();
    everyone.iter_mut().for_each(Puppet::kill);
    until("its sessions are gone", || theatre.stat("sessions") == 6);
    until("its slots come back", || theatre.unsettled() + theatre.stat("pins") == 0);
    assert!(children.iter().all(|child| child.lives() && child.kept().is_empty()));
    assert_eq!(theatre.hit(10, 12), 4);
    // The end of its standard input ends the child.
    drop(everyone);
    until("the children end", || children.iter().all(|child| !child.lives()));
}
