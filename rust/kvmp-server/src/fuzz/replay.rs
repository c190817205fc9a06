//! The corpora, without a fuzzer: every entry of `fuzz/corpus/TARGET` is run, and those whose names say what must come of
//! them are held to it, so that a replay which ran nothing could not pass.

use std::path::{Path, PathBuf};

use super::{Door, Quarry, Seen};

/// Entries of a target: name and bytes.
fn corpus(target: &str) -> Vec<(String, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus").join(target);
    let mut paths: Vec<PathBuf> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    assert!(paths.len() > 5, "{target} has {} entries", paths.len());
    let entry =
        |path: PathBuf| (path.file_name().unwrap().to_string_lossy().into_owned(), std::fs::read(path).unwrap());
    paths.into_iter().map(entry).collect()
}

/// Runs each; `refused` says whether the body refused it. Those named `refused-*` must be, those named `accepted-*` not.
fn replay(target: &str, mut refused: impl FnMut(&[u8]) -> bool) {
    let mut controls = [0; 2];
    for (name, bytes) in corpus(target) {
        let was = refused(&bytes);
        for (i, (front, must)) in [("refused-", true), ("accepted-", false)].into_iter().enumerate() {
            if name.starts_with(front) {
                controls[i] += 1;
                assert_eq!(was, must, "{target}/{name}");
            }
        }
    }
    assert!(controls.iter().all(|&count| count > 0), "{target} has controls of both kinds: {controls:?}");
}

#[test]
fn configs() {
    replay("config", |bytes| super::config(bytes).is_err());
}

#[test]
fn handshakes() {
    let door = Door::new();
    replay("handshake", |bytes| super::handshake(&door, bytes).iter().any(|said| said.starts_with("refused")));
}

#[test]
fn rings() {
    replay("ring", |bytes| super::ring(bytes).ended > 0);
    // The target reaches where it is to reach.
    let (_, bytes) = corpus("ring").into_iter().find(|(name, _)| name == "accepted-store-and-hit").unwrap();
    assert_eq!(super::ring(&bytes), Seen { ended: 0, committed_blocks: 16, hit_blocks: 16 });
}

#[test]
fn segments() {
    let quarry = Quarry::new();
    replay("segment", |bytes| super::segment(&quarry, bytes).replaced);
    // What was stored and is whole is kept; what was being written is held back.
    let whole = super::segment(&quarry, &[]);
    assert_eq!((whole.replaced, whole.kept, whole.quarantined), (false, 4 * 24 - 8, 8));
}
