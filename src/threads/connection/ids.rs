//! Where a message's id comes from.

use std::fmt;
use std::sync::Arc;

use crate::handler::Data;
use crate::logic::identity::Identity;
use crate::logic::layout::Layouts;
use crate::logic::pointer::{self, Pointer, TokenKind};
use crate::message::MessageId;
use crate::threads::contained;

/// A user's function that writes a message's id, if it has one.
pub(crate) type IdFunction = Arc<dyn Fn(Data<'_>, &mut Vec<u8>) -> bool + Send + Sync>;

/// How ids are found.
#[derive(Clone)]
pub(crate) enum IdSource {
    /// Dedup is off.
    Off,
    /// The whole message is its id.
    Content,
    /// The value at a place in a JSON text.
    Pointer(Pointer),
    /// A function of the message.
    Function(IdFunction),
    /// The session says so as it emits.
    Session,
}

/// Finds ids and turns them into identities.
#[derive(Debug, Clone)]
pub(crate) struct Ids {
    pub(crate) source: IdSource,
    pub(crate) identity: Identity,
}

/// The kinds of id that must never be taken for each other.
const EXPLICIT: u8 = 0;
const TEXT: u8 = 1;
const BINARY: u8 = 2;
const JSON_STRING: u8 = 3;
const JSON_OTHER: u8 = 4;

/// What a search for an id gave.
pub(crate) struct Found {
    pub(crate) id: Option<MessageId>,
    /// The user's function panicked.
    pub(crate) panic: Option<String>,
}

impl Ids {
    /// The identity for an id that the session gave.
    pub(crate) fn explicit(&self, id: &[u8]) -> Option<MessageId> {
        match self.source {
            IdSource::Off => None,
            _ => Some(self.identity.of(EXPLICIT, id)),
        }
    }

    /// Finds a message's id; `raw` receives it as the server wrote it, unless
    /// it is the whole content. `layouts` are the connection's own.
    pub(crate) fn find(&self, data: Data<'_>, raw: &mut Vec<u8>, layouts: &mut Layouts) -> Found {
        raw.clear();
        let mut panic = None;
        let id = match &self.source {
            IdSource::Off | IdSource::Session => None,
            IdSource::Content => Some(self.content_of(data)),
            IdSource::Pointer(pointer) => layouts.find(pointer, data.as_bytes()).map(|found| {
                raw.extend_from_slice(found.raw);
                self.pointed(found)
            }),
            IdSource::Function(function) => match contained(|| function(data, raw)) {
                Ok(found) => found.then(|| self.identity.of(EXPLICIT, raw)),
                Err(message) => {
                    panic = Some(message);
                    None
                }
            },
        };
        Found { id, panic }
    }

    /// The identity for what a JSON pointer found.
    #[inline]
    pub(crate) fn pointed(&self, found: pointer::Found<'_>) -> MessageId {
        let string = found.kind == TokenKind::String;
        self.identity.of(if string { JSON_STRING } else { JSON_OTHER }, found.raw)
    }

    /// The identity of a message that is its own id.
    pub(crate) fn content_of(&self, data: Data<'_>) -> MessageId {
        self.content(matches!(data, Data::Text(_)), data.as_bytes())
    }

    /// The same, of its kind and its bytes.
    #[inline]
    pub(crate) fn content(&self, text: bool, bytes: &[u8]) -> MessageId {
        self.identity.of(if text { TEXT } else { BINARY }, bytes)
    }
}

impl fmt::Debug for IdSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            IdSource::Off => "Off",
            IdSource::Content => "Content",
            IdSource::Pointer(_) => "Pointer",
            IdSource::Function(_) => "Function",
            IdSource::Session => "Session",
        })
    }
}
