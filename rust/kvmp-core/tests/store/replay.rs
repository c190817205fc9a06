//! LRU against the figures of POLICY.md, by replay of its trace. These count partial tails as blocks.

use std::path::PathBuf;

use kvmp_core::clock::Ticks;
use kvmp_core::ids::BlockKey;
use kvmp_core::store::{BlockStore, HeapTable};

use crate::fixture::*;

/// A prompt: when, and its blocks' keys.
struct Prompt {
    now: Ticks,
    keys: Vec<BlockKey>,
}

fn parse(line: &str) -> Prompt {
    let value: serde_json::Value = serde_json::from_str(line).unwrap();
    let keys = value["hash_ids"].as_array().unwrap().iter().map(|id| key(id.as_u64().unwrap())).collect();
    Prompt { now: Ticks::from_millis(value["timestamp"].as_u64().unwrap()), keys }
}

fn trace() -> Option<Vec<Prompt>> {
    let checkout = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../..");
    let places = ["../shared/traces", "shared/traces", "../../shared/traces"];
    let mut files = places.iter().map(|place| checkout.join(place).join("conversation_trace.jsonl"));
    let text = std::fs::read_to_string(files.find(|file| file.exists())?).unwrap();
    Some(text.lines().map(parse).collect())
}

/// One slot a chunk, so that any capacity can be had.
fn store_of(blocks: u64) -> BlockStore<HeapTable> {
    store(blocks, 1, slots_a_chunk(1))
}

/// Percent of the blocks asked for that were hit.
fn replay(trace: &[Prompt], capacity: u64) -> f64 {
    let mut store = store_of(capacity);
    let (mut asked, mut hit) = (0, 0);
    for Prompt { now, keys } in trace {
        let reply = store.lookup(keys, *now);
        let found = (reply.tokens / 16) as usize;
        if found < keys.len() {
            let (parent, first) = (found.checked_sub(1).map(|last| keys[last]), found as u32);
            let mut cursor = store.reserve_begin(ENGINE, NS, G0, parent, first, *now).unwrap();
            let mut answers = Vec::new();
            store.reserve_step(&mut cursor, &keys[found..], &mut answers);
            if let Some(lease) = store.reserve_finish(cursor).lease {
                store.commit_part(lease, 0, &granted(&answers));
            }
        }
        reply.lease.map(|lease| store.release(ENGINE, lease));
        asked += keys.len();
        hit += found;
    }
    store.validate().unwrap();
    100.0 * hit as f64 / asked as f64
}

#[test]
fn lru_hits_what_policy_md_says() {
    let Some(trace) = trace() else {
        eprintln!("skipped: ../shared/traces/conversation_trace.jsonl is not there");
        return;
    };
    for (capacity, expected) in [(3_000, 6.53), (10_000, 21.16)] {
        let percent = replay(&trace, capacity);
        assert!((percent - expected).abs() < 0.02, "{capacity} blocks: {percent:.2} %, POLICY.md says {expected} %");
    }
}

/// Two chats share a first block; a scan passes through; the chats go on.
#[test]
fn lru_on_a_made_trace() {
    let chat = |own: u64, blocks: u64| [vec![key(0)], keys(own..own + blocks - 1)].concat();
    let prompt = |second, keys| Prompt { now: at(second), keys };
    let made = [
        prompt(0, chat(100, 3)),
        prompt(1, chat(200, 3)),
        prompt(2, chat(100, 4)),
        prompt(3, keys(900..903)),
        prompt(4, chat(200, 3)),
        prompt(5, chat(100, 4)),
    ];
    // Everything fits in 9: the chats' next turns hit 1 + 3 + 0 + 3 + 4 of 20 blocks.
    assert_eq!(replay(&made, 9), 100.0 * 11.0 / 20.0);
    // Of 8, the scan takes the coldest tail (201), and its return the next one (102): a miss each.
    assert_eq!(replay(&made, 8), 100.0 * 9.0 / 20.0);
}
