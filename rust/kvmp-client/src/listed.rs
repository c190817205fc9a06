//! The namespaces that a segment has, whoever opened them: a look at the server's table, no message.

use kvmp_core::ids::NamespaceId;
use kvmp_core::namespace::NamespaceSpec;
use kvmp_core::segment::TableMap;

/// A namespace in the segment's table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListedNamespace {
    /// Number in this segment.
    pub id: u16,
    /// Digest of the spec, 64 hex digits.
    pub digest: String,
    /// The spec as canonical JSON.
    pub spec: String,
}

/// The namespaces of a table, by id.
pub(crate) fn listed(table: &TableMap) -> Vec<ListedNamespace> {
    table.namespaces().into_iter().filter_map(|id| read(table, id)).collect()
}

/// The server may be writing the entry, so what was copied is believed only where spec and digest agree.
fn read(table: &TableMap, id: NamespaceId) -> Option<ListedNamespace> {
    let entry = table.namespace(id)?;
    let spec = NamespaceSpec::from_json(&entry.spec).ok()?;
    (spec.digest() == entry.digest).then(|| ListedNamespace {
        id: id.0,
        digest: entry.digest.iter().map(|byte| format!("{byte:02x}")).collect(),
        spec: spec.canonical_json(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvmp_core::geometry::Geometry;
    use kvmp_core::segment::{Access, Layout, Mapping, NamespaceEntry};

    fn table() -> TableMap {
        let layout = Layout::new(Geometry::new(8 << 20, None).unwrap());
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        file.set_len(layout.file_bytes()).unwrap();
        TableMap::new(Mapping::new(&file, 0, layout.table_bytes(), Access::ReadWrite).unwrap(), layout)
    }

    fn spec(model: &str) -> NamespaceSpec {
        let text = r#"{"model":"MODEL","facts":{},"groups":[{"rule":"prefix","block_tokens":16}],
                       "parts":[{"bytes":[4096],"layout":null}]}"#;
        NamespaceSpec::from_json(&text.replace("MODEL", model)).unwrap()
    }

    fn entry(spec: &NamespaceSpec) -> NamespaceEntry {
        NamespaceEntry { digest: spec.digest(), spec: spec.canonical_json() }
    }

    #[test]
    fn what_the_server_wrote_is_listed_by_id() {
        let table = table();
        assert_eq!(listed(&table), []);
        for (id, model) in [(70, "b"), (3, "a")] {
            table.set_namespace(NamespaceId(id), &entry(&spec(model)));
        }
        let found = listed(&table);
        assert_eq!(found.iter().map(|one| one.id).collect::<Vec<_>>(), [3, 70]);
        assert_eq!(found[0].spec, spec("a").canonical_json());
        assert_eq!(found[0].digest.len(), 64);
        table.clear_namespace(NamespaceId(3));
        assert_eq!(listed(&table), found[1..]);
    }

    #[test]
    fn an_entry_caught_in_mid_change_is_left_out() {
        let table = table();
        let torn = NamespaceEntry { digest: spec("a").digest(), spec: spec("b").canonical_json() };
        table.set_namespace(NamespaceId(0), &torn);
        let unparsable = NamespaceEntry { digest: spec("a").digest(), spec: "{".into() };
        table.set_namespace(NamespaceId(1), &unparsable);
        table.set_namespace(NamespaceId(2), &entry(&spec("b")));
        assert_eq!(listed(&table).iter().map(|one| one.id).collect::<Vec<_>>(), [2]);
    }
}
