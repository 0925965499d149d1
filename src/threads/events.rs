//! Where events go: the log, the observer, and every subscriber's channel.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crossbeam_channel::{Receiver, Sender, TrySendError, bounded};

use super::contained;
use crate::event::{Event, EventKind};
use crate::metrics::Counter;

/// What can be told: it has a log line and a level.
pub(crate) trait Told: Clone + fmt::Display + Send {
    fn level(&self) -> log::Level;

    /// So frequent that it is told to those only who listen at the moment.
    fn is_fine(&self) -> bool {
        false
    }
}

/// A new subscriber first gets this many of the latest events.
const RECENT: usize = 256;

/// A subscriber that reads none may leave this many waiting.
const WAITING: usize = 1024;

/// The user's function that hears of every event, on the thread it happens on.
pub(crate) type Observer<E> = Arc<dyn Fn(&E) + Send + Sync>;

/// Tells what happens.
pub(crate) struct Hub<E> {
    observer: Option<Observer<E>>,
    subscribers: Mutex<Subscribers<E>>,
    /// Events that some subscriber had no room for.
    pub(crate) lost: Counter,
}

struct Subscribers<E> {
    recent: VecDeque<E>,
    channels: Vec<Sender<E>>,
    closed: bool,
}

impl<E: Told> Hub<E> {
    pub(crate) fn new(observer: Option<Observer<E>>) -> Self {
        let subscribers =
            Subscribers { recent: VecDeque::new(), channels: Vec::new(), closed: false };
        Self { observer, subscribers: Mutex::new(subscribers), lost: Counter::default() }
    }

    /// Whether anybody listens at the moment, besides the log.
    pub(crate) fn is_heard(&self) -> bool {
        self.observer.is_some() || !self.lock().channels.is_empty()
    }

    pub(crate) fn emit(&self, event: E) {
        if event.is_fine() && !self.is_heard() {
            return;
        }
        log::log!(target: "broadsock", event.level(), "{event}");
        if let Some(observer) = &self.observer
            && let Err(panic) = contained(|| observer(&event))
        {
            log::error!("observer panicked: {panic}");
        }
        let mut subscribers = self.lock();
        subscribers.channels.retain(|channel| match channel.try_send(event.clone()) {
            Ok(()) => true,
            Err(TrySendError::Full(_)) => {
                self.lost.add(1);
                true
            }
            Err(TrySendError::Disconnected(_)) => false,
        });
        if event.is_fine() {
            return;
        }
        if subscribers.recent.len() == RECENT {
            subscribers.recent.pop_front();
        }
        subscribers.recent.push_back(event);
    }

    /// A channel of the latest events and all that follow.
    pub(crate) fn subscribe(&self) -> Receiver<E> {
        let (sender, receiver) = bounded(WAITING);
        let mut subscribers = self.lock();
        for event in &subscribers.recent {
            // The channel is new and larger than what is kept.
            let _ = sender.try_send(event.clone());
        }
        if !subscribers.closed {
            subscribers.channels.push(sender);
        }
        receiver
    }

    /// Nothing follows: subscribers see the end of their channels.
    pub(crate) fn close(&self) {
        let mut subscribers = self.lock();
        subscribers.closed = true;
        subscribers.channels.clear();
    }

    fn lock(&self) -> MutexGuard<'_, Subscribers<E>> {
        self.subscribers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<E> fmt::Debug for Hub<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hub").finish_non_exhaustive()
    }
}

impl Told for Event {
    fn level(&self) -> log::Level {
        match self.kind {
            EventKind::State { .. } | EventKind::Blocked(_) => log::Level::Info,
            EventKind::Restarting { .. }
            | EventKind::Failed { .. }
            | EventKind::Panic { .. }
            | EventKind::Stuck { .. } => log::Level::Error,
            _ => log::Level::Warn,
        }
    }
}
