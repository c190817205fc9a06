//! Sessions and namespaces: attach, open, join, end.

use std::sync::Arc;
use std::time::Instant;

use kvmp_core::ids::{EngineToken, NamespaceId, PartId};
use kvmp_core::namespace::NamespaceSpec;
use kvmp_core::segment::NAMESPACES;
use kvmp_core::wire::{Hello, Opened, Refusal, Role};
use rustix::event::epoll;

use super::command::{Attach, Refused, SessionId, refused};
use super::run::Plane;
use super::session::Session;

/// Namespaces that one session may have open: adapters and resets each take one.
const SESSION_NAMESPACES: usize = NAMESPACES as usize / 4;

fn joined(token: EngineToken, joined: Result<(), &'static str>) -> Result<EngineToken, Refused> {
    let say = |why| refused(Refusal::Engine, format!("engine {:016x} cannot be joined: {why}", token.0));
    joined.map(|()| token).map_err(say)
}

impl Plane {
    fn mint(&mut self) -> EngineToken {
        // Weyl sequence from a random start: no token comes twice, and none of an earlier epoch's is likely.
        self.tokens = self.tokens.wrapping_add(0x9e37_79b9_7f4a_7c15).max(1);
        EngineToken(self.tokens)
    }

    fn engine_of(&mut self, hello: &Hello, holder: u32) -> Result<EngineToken, Refused> {
        match (hello.role, hello.engine_token, hello.part) {
            (Role::Tool, ..) => Ok(EngineToken(0)),
            (Role::Scheduler, ..) => {
                let token = self.mint();
                self.engines.add(token, holder, hello.dma);
                Ok(token)
            }
            (Role::Worker, Some(token), Some(part)) => {
                let token = EngineToken(token);
                joined(token, self.engines.join(token, PartId(part), holder, hello.dma))
            }
            (Role::Reader, Some(token), Some(_)) => {
                let token = EngineToken(token);
                joined(token, self.engines.may_read(token))
            }
            (Role::Worker | Role::Reader, ..) => {
                Err(refused(Refusal::Protocol, "a worker's or reader's hello needs engine_token and part"))
            }
        }
    }

    pub(super) fn attach(&mut self, attach: Attach) -> Result<EngineToken, Refused> {
        let (id, holder) = (attach.session, attach.holder);
        let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
        epoll::add(&self.epoll, &attach.doorbell, epoll::EventData::new_u64(id.0), flags)
            .map_err(|e| refused(Refusal::Full, format!("the doorbell cannot be watched: {e}")))?;
        let token = self.engine_of(&attach.hello, holder)?;
        self.sessions.insert(id, Session::new(attach, token));
        self.holder_of.insert(id, holder);
        self.turns.push_back(id);
        Ok(token)
    }

    /// Ends a session: its reads at once, its writes when its holder entry says so.
    pub(super) fn end(&mut self, mut session: Session) {
        if let Some(running) = session.running.take() {
            running.abandon(&mut self.store, session.engine);
        }
        let _ = epoll::delete(&self.epoll, &session.doorbell);
        self.turns.retain(|&id| id != session.id);
        if session.role == Role::Scheduler {
            self.store.reads_gone(session.engine);
        }
        if let Some(holder) = self.holder_of.remove(&session.id) {
            self.engines.ended(session.engine, holder);
            self.next_watch = Instant::now();
            self.watched_since = None;
        }
    }

    pub(super) fn open(&mut self, session: SessionId, spec: NamespaceSpec) -> Result<Box<Opened>, Refused> {
        spec.check().map_err(|e| refused(Refusal::Namespace, e.to_string()))?;
        match self.sessions.get(&session).map(|s| s.role) {
            Some(Role::Scheduler) => {}
            Some(_) => return Err(refused(Refusal::Namespace, "only a scheduler opens namespaces")),
            None => return Err(refused(Refusal::Protocol, "the session was ended")),
        }
        let found = self.namespaces.find(&spec.digest());
        self.check_share(session, found)?;
        let id = match found {
            Some(id) => id,
            None => self.open_new(session, spec)?,
        };
        self.opened(session, id)
    }

    /// One session does not take the whole table: an entry stays as long as a session has it.
    fn check_share(&self, session: SessionId, found: Option<NamespaceId>) -> Result<(), Refused> {
        let Some(session) = self.sessions.get(&session) else { return Ok(()) };
        let again = found.is_some_and(|id| session.namespaces.contains(&id.0));
        if again || session.namespaces.len() < SESSION_NAMESPACES {
            return Ok(());
        }
        Err(refused(
            Refusal::Full,
            format!(
                "this session has {SESSION_NAMESPACES} namespaces open, as many as one may (all engines together have \
                 {NAMESPACES}); connect again to let go of them"
            ),
        ))
    }

    fn open_new(&mut self, session: SessionId, spec: NamespaceSpec) -> Result<NamespaceId, Refused> {
        if let Some((other, differences)) = self.namespaces.nearest(&spec) {
            tracing::info!(
                "session {}: shares nothing with namespace {} of the same model, which differs in {}",
                session.0,
                other.0,
                differences.join("; ")
            );
        }
        let (store, sessions) = (&self.store, &self.sessions);
        let unused =
            |id: NamespaceId| store.slots_of(id) == 0 && !sessions.values().any(|s| s.namespaces.contains(&id.0));
        let id = self.namespaces.free_id(unused)?;
        if self.namespaces.spec(id).is_some() {
            self.namespaces.remove(id);
            self.store.remove_namespace(id).map_err(|e| refused(Refusal::Namespace, e.to_string()))?;
        }
        self.store.add_namespace(id, &spec).map_err(|e| refused(Refusal::Namespace, e.to_string()))?;
        if let Err(e) = self.namespaces.insert(id, Arc::new(spec)) {
            // It was added a line ago and has no slots.
            let _ = self.store.remove_namespace(id);
            return Err(e);
        }
        Ok(id)
    }

    fn opened(&mut self, session: SessionId, id: NamespaceId) -> Result<Box<Opened>, Refused> {
        let missing = || refused(Refusal::Namespace, format!("there is no namespace {}", id.0));
        let spec = self.namespaces.spec(id).ok_or_else(missing)?;
        let digest = self.namespaces.digest(id).ok_or_else(missing)?;
        if let Some(session) = self.sessions.get_mut(&session) {
            session.namespaces.insert(id.0);
        }
        Ok(Box::new(Opened { namespace: id.0, digest, spec: (*spec).clone() }))
    }

    pub(super) fn join(
        &mut self,
        session: SessionId,
        id: NamespaceId,
        digest: &str,
        layout: &serde_json::Value,
    ) -> Result<Box<Opened>, Refused> {
        let no = |why: String| refused(Refusal::Namespace, why);
        let part = self
            .sessions
            .get(&session)
            .and_then(|s| s.part)
            .ok_or_else(|| no("only a worker or reader joins a namespace".into()))?;
        let spec = self.namespaces.spec(id).ok_or_else(|| no(format!("there is no namespace {}", id.0)))?;
        if self.namespaces.digest(id).as_deref() != Some(digest) {
            return Err(no(format!(
                "namespace {} has another digest than the worker's scheduler says ({digest})",
                id.0
            )));
        }
        let own = spec
            .parts
            .get(usize::from(part.0))
            .ok_or_else(|| no(format!("namespace {} has no part {}", id.0, part.0)))?;
        if own.layout != *layout {
            return Err(no(format!(
                "part {} of namespace {} has layout {}, the worker's is {layout}",
                part.0, id.0, own.layout
            )));
        }
        self.opened(session, id)
    }
}
