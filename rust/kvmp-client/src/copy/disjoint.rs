//! Proof that no two blocks and no two runs of a layout share a byte of memory.
//!
//! A load writes from several threads, so an overlap would be a race, and its outcome chance. Runs whose spans
//! (all blocks together) meet must have one block stride between them; then they are disjoint just if their
//! bytes are, taken modulo that stride. Runs that interleave with different strides are refused unseen: no paged
//! KV cache is laid out so, and telling would cost a sort over all blocks.

use super::{CopyError, Run};

/// All blocks of one run, as the range of addresses they span.
struct Span {
    start: usize,
    end: usize,
    run: Run,
}

pub(super) fn check_disjoint(runs: &[Run], num_blocks: u32) -> Result<(), CopyError> {
    if num_blocks > 1 {
        check_blocks(runs)?;
    }
    let mut spans = spans(runs, num_blocks);
    spans.sort_unstable_by_key(|span| span.start);
    for cluster in clusters(&spans) {
        check_cluster(cluster, num_blocks)?;
    }
    Ok(())
}

fn check_blocks(runs: &[Run]) -> Result<(), CopyError> {
    match runs.iter().find(|run| run.block_stride.unsigned_abs() < run.len) {
        Some(&run) => Err(CopyError::BlocksOverlap { run }),
        None => Ok(()),
    }
}

fn spans(runs: &[Run], num_blocks: u32) -> Vec<Span> {
    let span = |run: &Run| run.span(num_blocks).map(|(start, end)| Span { start, end, run: *run });
    runs.iter().filter_map(span).collect()
}

/// Splits sorted spans wherever one starts behind the end of all before it.
fn clusters(spans: &[Span]) -> Vec<&[Span]> {
    let mut out = Vec::new();
    let (mut first, mut end) = (0, 0);
    for (at, span) in spans.iter().enumerate() {
        if span.start >= end && at > first {
            out.push(&spans[first..at]);
            first = at;
        }
        end = end.max(span.end);
    }
    out.push(&spans[first..]);
    out
}

fn check_cluster(cluster: &[Span], num_blocks: u32) -> Result<(), CopyError> {
    let [first, others @ ..] = cluster else {
        return Ok(());
    };
    let stride = first.run.block_stride.unsigned_abs();
    let stranger = others.iter().find(|other| num_blocks == 1 || other.run.block_stride.unsigned_abs() != stride);
    match stranger {
        Some(other) => Err(CopyError::RunsOverlap { first: first.run, second: other.run }),
        None if others.is_empty() => Ok(()),
        None => check_residues(cluster, stride),
    }
}

/// Runs of one `stride` are disjoint for any number of blocks if they are on a ring of `stride` bytes.
fn check_residues(cluster: &[Span], stride: usize) -> Result<(), CopyError> {
    let mut on_ring: Vec<(usize, Run)> = cluster.iter().map(|span| (span.start % stride, span.run)).collect();
    on_ring.sort_unstable_by_key(|&(at, _)| at);
    let next = on_ring.iter().skip(1).copied().chain(on_ring.first().map(|&(at, run)| (at + stride, run)));
    for (&(at, first), (next_at, second)) in on_ring.iter().zip(next) {
        if at + first.len > next_at {
            return Err(CopyError::RunsOverlap { first, second });
        }
    }
    Ok(())
}
