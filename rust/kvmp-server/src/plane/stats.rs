//! What `kvmp stats` shows.

use std::time::Instant;

use kvmp_core::store::LookupReply;
use serde_json::{Map, Value, json};

use super::run::Plane;

/// Counters of the data-plane thread itself; the store counts its own.
#[derive(Debug)]
pub(crate) struct Counters {
    started: Instant,
    pub protocol_errors: u64,
    lookups: u64,
    lookup_keys: u64,
    lookup_hit_blocks: u64,
    lookup_hit_tokens: u64,
}

impl Counters {
    pub fn new(started: Instant) -> Self {
        Self { started, protocol_errors: 0, lookups: 0, lookup_keys: 0, lookup_hit_blocks: 0, lookup_hit_tokens: 0 }
    }

    pub fn lookup(&mut self, keys: u32, reply: &LookupReply) {
        self.lookups += 1;
        self.lookup_keys += u64::from(keys);
        self.lookup_hit_blocks += reply.groups.iter().map(|group| group.slots.len() as u64).sum::<u64>();
        self.lookup_hit_tokens += u64::from(reply.tokens);
    }
}

impl Plane {
    pub(super) fn stats(&self) -> Value {
        let geometry = self.segment.table.layout().geometry;
        let header = self.segment.table.header();
        let mut all = Map::new();
        let own = json!({
            "version": env!("CARGO_PKG_VERSION"),
            "policy": self.policy,
            "uptime_s": self.counters.started.elapsed().as_secs(),
            "server_epoch": header.map_or(0, |h| h.server_epoch),
            "pid": std::process::id(),
            "segment": self.segment.path().display().to_string(),
            "arena_bytes": geometry.arena_bytes(),
            "chunk_bytes": geometry.chunk_bytes,
            "sessions": self.holder_of.len(),
            "engines": self.engines.len(),
            "namespaces": self.namespaces.len(),
            "lookups": self.counters.lookups,
            "lookup_blocks": self.counters.lookup_keys,
            "lookup_hit_blocks": self.counters.lookup_hit_blocks,
            "lookup_hit_tokens": self.counters.lookup_hit_tokens,
            "protocol_errors": self.counters.protocol_errors,
        });
        for object in [serde_json::to_value(self.store.stats()).unwrap_or_default(), own] {
            if let Value::Object(fields) = object {
                all.extend(fields);
            }
        }
        Value::Object(all)
    }
}
