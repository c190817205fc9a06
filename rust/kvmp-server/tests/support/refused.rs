//! What a machine may refuse a test that needs it: said with the reason, or the test's failure where it must not be.

/// By these names `KVMP_MUST_NOT_SKIP` means one of them, in a list with commas; `1` is all.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Need {
    /// Root, to run processes of other users.
    Users,
    /// A mount namespace with a tmpfs of one's own.
    Mounts,
    /// A memory cgroup.
    Cgroup,
    /// A time namespace with a boot-time clock of its own.
    BootClock,
    /// A C compiler.
    Compiler,
    /// `ptrace` of a child.
    Ptrace,
}

impl Need {
    fn name(self) -> &'static str {
        match self {
            Self::Users => "users",
            Self::Mounts => "mounts",
            Self::Cgroup => "cgroup",
            Self::BootClock => "boot-clock",
            Self::Compiler => "compiler",
            Self::Ptrace => "ptrace",
        }
    }

    fn is_in(self, list: &str) -> bool {
        list == "1" || list.split(',').any(|name| name == self.name())
    }

    /// A test passes without it, and says so; it fails where this may not be refused.
    pub fn refused(self, why: impl std::fmt::Display) {
        let said = format!("this machine refuses {}: {why}", self.name());
        let list = std::env::var("KVMP_MUST_NOT_SKIP").unwrap_or_default();
        assert!(!self.is_in(&list), "{said}; KVMP_MUST_NOT_SKIP={list} forbids that");
        eprintln!("SKIPPED: {said}");
    }
}
