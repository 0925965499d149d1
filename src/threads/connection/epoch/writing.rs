//! The writing half of a turn: the session's messages, the outbox, the goodbye.

use std::time::Instant;

use super::{BUDGET, Epoch, EpochEnd, Leaving, MAX_BACKLOG};
use crate::error::{Error, ErrorKind};
use crate::handler::Outgoing;
use crate::io::websocket::Sent;

impl Epoch<'_> {
    pub(super) fn write(&mut self, now: Instant) -> Result<(), EpochEnd> {
        self.write_backlog()?;
        if self.may_send() {
            self.write_outbox(now)?;
        }
        self.flush(now)?;
        self.say_goodbye(now)
    }

    /// Writes what is queued, and tells the heartbeat how far that went.
    pub(super) fn flush(&mut self, now: Instant) -> Result<(), EpochEnd> {
        let clear = self.ws.flush()?;
        self.count_traffic();
        // Reading writes too, where pongs wait: so this is since the last turn.
        let progress = std::mem::replace(&mut self.written, self.traffic.1) != self.traffic.1;
        if clear {
            self.live.on_write_clear();
        } else {
            self.live.on_write_blocked(now);
            if progress {
                self.live.on_write_progress(now);
            }
        }
        Ok(())
    }

    pub(super) fn write_backlog(&mut self) -> Result<(), EpochEnd> {
        if matches!(self.leaving, Leaving::Sent { .. }) {
            return Ok(());
        }
        while let Some(message) = self.backlog.front() {
            if !self.ws.has_room() || self.ws.send_once(message)? == Sent::Full {
                break;
            }
            self.backlog.pop_front();
            self.connection.peer().metrics.messages_sent.add(1);
        }
        Ok(())
    }

    pub(super) fn write_outbox(&mut self, now: Instant) -> Result<(), EpochEnd> {
        for _ in 0..BUDGET {
            if !self.ws.has_room() {
                break;
            }
            let Some(message) = self.connection.peer().inbox.pop() else { break };
            self.sent_at = Some(now);
            match self.ws.send(&message) {
                Ok(Sent::Queued) => self.connection.peer().metrics.messages_sent.add(1),
                Ok(Sent::Full) => {
                    self.connection.peer().inbox.put_back(vec![message]);
                    break;
                }
                Err(error) => {
                    // It may be half written, so the server cannot have seen it.
                    self.connection.peer().inbox.put_back(vec![message]);
                    return Err(error.into());
                }
            }
        }
        Ok(())
    }

    /// Whether messages of the outbox may leave now.
    pub(super) fn may_send(&self) -> bool {
        self.opening.is_none()
            && self.backlog.is_empty()
            && self.ws.has_room()
            && !matches!(self.leaving, Leaving::Sent { .. })
    }

    /// Sends the close frame once what was queued before it is out.
    pub(super) fn say_goodbye(&mut self, now: Instant) -> Result<(), EpochEnd> {
        let Leaving::Draining { until, end } = self.leaving else { return Ok(()) };
        let inbox = &self.connection.peer().inbox;
        let empty = self.backlog.is_empty() && !inbox.posted_message();
        if empty || now >= until {
            self.leaving = Leaving::Sent { end };
            self.connection.release_held();
            self.blocked = false;
            self.ws.close(1000, "")?;
        }
        Ok(())
    }

    /// Takes what a session sends; nothing follows a close frame.
    pub(super) fn queue_sends(&mut self, sends: Vec<Outgoing>) -> Result<(), EpochEnd> {
        if sends.is_empty() {
            return Ok(());
        }
        let limit = self.connection.shared.policy.limits.max_message;
        let phrase = if sends.iter().any(|message| message.len() > limit) {
            "the session sends a message larger than max_message_size".to_owned()
        } else if self.backlog.len() + sends.len() > MAX_BACKLOG {
            format!("more than {MAX_BACKLOG} messages of the session wait for the server to read")
        } else {
            if !matches!(self.leaving, Leaving::Sent { .. }) {
                self.backlog.extend(sends);
            }
            return Ok(());
        };
        Err(Error::new(ErrorKind::Session, phrase).into())
    }
}
