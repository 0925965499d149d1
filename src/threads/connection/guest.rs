//! The user's session, contained: an error or a panic in it is an [`Error`].

use std::time::Duration;

use super::SessionFactory;
use super::ids::{IdSource, Ids};
use crate::error::{BoxError, Error, ErrorKind};
use crate::handler::{Acts, Data, Link, MAX_SENDS, Origin, Resume, Session, Sink};
use crate::io::websocket::Websocket;
use crate::logic::layout::Layouts;
use crate::logic::pointer::Pointer;
use crate::message::{BlockBuilder, MessageId, Payload};
use crate::threads::contained;

/// One epoch's session; without one, every message is passed on.
pub(super) struct Guest {
    session: Option<Box<dyn Session>>,
}

/// What a hook did: its acts, and how it failed, if it did.
pub(super) struct Outcome {
    pub(super) acts: Acts,
    pub(super) failure: Option<Failure>,
}

/// How a hook failed.
pub(super) struct Failure {
    pub(super) error: Error,
    /// The hook's name and the panic's message, if it was a panic.
    pub(super) panic: Option<(&'static str, String)>,
}

/// Where a turn's messages gather, each with its sequence and id.
pub(super) struct Gather<'a> {
    pub(super) block: BlockBuilder,
    pub(super) ids: &'a Ids,
    /// Messages read, and those of them that the session made nothing of.
    pub(super) messages: u64,
    pub(super) skipped: u64,
    /// Sequence of the last message.
    pub(super) sequence: u64,
    /// The last message's id as the server wrote it; empty if it had none.
    pub(super) raw_id: Vec<u8>,
    /// A panic of the id function, to be told once.
    pub(super) panic: Option<String>,
    /// What texts looked like in which a JSON pointer found an id.
    pub(super) layouts: Layouts,
}

impl Guest {
    pub(super) fn new(factory: Option<&SessionFactory>) -> Result<Self, Failure> {
        let Some(factory) = factory else { return Ok(Self { session: None }) };
        match contained(|| factory()) {
            Ok(session) => Ok(Self { session: Some(session) }),
            Err(message) => Err(panicked("session factory", message)),
        }
    }

    /// Whether messages need not be shown to anybody.
    pub(super) fn passes_on(&self) -> bool {
        self.session.is_none()
    }

    pub(super) fn heartbeat_interval(&self) -> Result<Option<Duration>, Failure> {
        let Some(session) = &self.session else { return Ok(None) };
        match contained(|| session.heartbeat_interval()) {
            Ok(interval) => Ok(interval.filter(|interval| !interval.is_zero())),
            Err(message) => Err(panicked("Session::heartbeat_interval", message)),
        }
    }

    /// Drops the session, which is user code too; a panic comes back.
    pub(super) fn dismiss(self) -> Result<(), String> {
        contained(|| drop(self.session))
    }

    pub(super) fn on_open(
        &mut self,
        origin: Origin<'_>,
        resume: Option<&Resume>,
        sink: &mut dyn Sink,
    ) -> Outcome {
        let mut acts = Acts::default();
        let open = |session: &mut dyn Session, link: &mut Link<'_>| session.on_open(link);
        let failure = self.call("Session::on_open", origin, resume, sink, &mut acts, open);
        Outcome { acts, failure }
    }

    /// What it asks for comes to `acts`, behind what earlier messages did; nothing
    /// does when it fails.
    #[inline]
    pub(super) fn on_message(
        &mut self,
        data: Data<'_>,
        origin: Origin<'_>,
        resume: Option<&Resume>,
        gather: &mut Gather<'_>,
        acts: &mut Acts,
    ) -> Option<Failure> {
        let before = gather.sequence;
        let call = "Session::on_message";
        let failure = self.call(call, origin, resume, gather, acts, |session, link| {
            session.on_message(data, link)
        });
        gather.messages += 1;
        gather.skipped += u64::from(gather.sequence == before);
        failure
    }

    pub(super) fn on_heartbeat(
        &mut self,
        origin: Origin<'_>,
        resume: Option<&Resume>,
        sink: &mut dyn Sink,
    ) -> Outcome {
        let mut acts = Acts::default();
        let beat = |session: &mut dyn Session, link: &mut Link<'_>| session.on_heartbeat(link);
        let failure = self.call("Session::on_heartbeat", origin, resume, sink, &mut acts, beat);
        Outcome { acts, failure }
    }

    #[inline]
    fn call(
        &mut self,
        hook: &'static str,
        origin: Origin<'_>,
        resume: Option<&Resume>,
        sink: &mut dyn Sink,
        acts: &mut Acts,
        run: impl FnOnce(&mut dyn Session, &mut Link<'_>) -> Result<(), BoxError>,
    ) -> Option<Failure> {
        let session = self.session.as_mut()?;
        let before = acts.begin();
        let mut link = Link { origin, resume, acts, sink };
        let result = contained(|| run(&mut **session, &mut link));
        if matches!(result, Ok(Ok(()))) && !acts.are_too_many() {
            return None;
        }
        acts.go_back(before);
        Some(match result {
            Ok(Ok(())) => failed(hook, format!("it sent more than {MAX_SENDS} messages at once")),
            Ok(Err(error)) => failed(hook, error),
            Err(message) => panicked(hook, message),
        })
    }
}

fn failed(hook: &'static str, error: impl Into<BoxError>) -> Failure {
    let error = Error::caused(ErrorKind::Session, format!("{hook} failed"), error);
    Failure { error, panic: None }
}

fn panicked(hook: &'static str, message: String) -> Failure {
    let error = Error::new(ErrorKind::Session, format!("{hook} panicked: {message}"));
    Failure { error, panic: Some((hook, message)) }
}

impl Gather<'_> {
    /// Takes a message as it was read.
    #[inline]
    pub(super) fn take(&mut self, payload: Payload<'_>) {
        let id = self.find(payload.data());
        self.push(payload, id);
        self.messages += 1;
    }

    /// Takes the whole messages that lie ready; `false` when the socket has no
    /// more. Nothing is taken of what needs a closer look.
    pub(super) fn take_run(&mut self, ws: &mut Websocket, most: usize) -> Result<bool, Error> {
        let more = ws.read_run(most, &mut self.block, self.sequence + 1);
        let taken = self.block.len() as u64;
        self.messages += taken;
        self.sequence += taken;
        match &self.ids.source {
            IdSource::Off => {}
            IdSource::Content => {
                let ids = self.ids;
                self.block.identify_bytes(move |text, bytes| Some(ids.content(text, bytes)));
            }
            IdSource::Pointer(pointer) => self.find_pointed(pointer),
            _ => self.find_all(),
        }
        more
    }

    fn find_pointed(&mut self, pointer: &Pointer) {
        let Self { block, ids, layouts, raw_id, .. } = self;
        block.identify_bytes(|_, bytes| {
            layouts.find(pointer, bytes).map(|found| ids.pointed(found))
        });
        // Only the last one's is asked for.
        raw_id.clear();
        if let Some(found) = block.last().and_then(|bytes| pointer.find(bytes)) {
            raw_id.extend_from_slice(found.raw);
        }
    }

    fn find_all(&mut self) {
        let Self { block, ids, raw_id, panic, layouts, .. } = self;
        block.identify(|data| {
            let found = ids.find(data, raw_id, layouts);
            if panic.is_none() {
                *panic = found.panic;
            }
            found.id
        });
    }

    #[inline]
    fn find(&mut self, data: Data<'_>) -> Option<MessageId> {
        self.raw_id.clear();
        match self.ids.source {
            IdSource::Off => None,
            IdSource::Content => Some(self.ids.content_of(data)),
            _ => self.find_somehow(data),
        }
    }

    fn find_somehow(&mut self, data: Data<'_>) -> Option<MessageId> {
        let found = self.ids.find(data, &mut self.raw_id, &mut self.layouts);
        self.panic = self.panic.take().or(found.panic);
        found.id
    }

    fn push(&mut self, payload: Payload<'_>, id: Option<MessageId>) {
        self.sequence += 1;
        self.block.push(payload, self.sequence, id);
    }
}

impl Sink for Gather<'_> {
    fn emit(&mut self, payload: Payload<'_>, id: Option<&[u8]>) {
        let id = match (id, &payload) {
            (Some(id), _) => {
                self.raw_id.clear();
                self.raw_id.extend_from_slice(id);
                self.ids.explicit(id)
            }
            (None, payload) => self.find(payload.data()),
        };
        self.push(payload, id);
    }
}
