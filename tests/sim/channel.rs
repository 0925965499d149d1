//! Stands in for `crossbeam_channel`: its bounded channels, on which coroutines
//! wait.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

pub(crate) use crossbeam::{RecvError, RecvTimeoutError, SendError, TryRecvError, TrySendError};

use crate::kernel::{self, with};
use crate::planted::{Bug, planted};

/// Both ends of a channel share this.
#[derive(Debug)]
struct Channel<T> {
    state: Mutex<State<T>>,
}

#[derive(Debug)]
struct State<T> {
    items: VecDeque<T>,
    capacity: usize,
    senders: usize,
    receivers: usize,
    /// Nothing can be received before.
    due: Option<u64>,
    /// Coroutines that wait for a change.
    waiting: Vec<usize>,
}

#[derive(Debug)]
pub(crate) struct Sender<T>(Arc<Channel<T>>);

#[derive(Debug)]
pub(crate) struct Receiver<T>(Arc<Channel<T>>);

pub(crate) fn bounded<T>(capacity: usize) -> (Sender<T>, Receiver<T>) {
    let channel = Channel::new(capacity, None, VecDeque::new());
    (Sender(Arc::clone(&channel)), Receiver(channel))
}

pub(crate) fn never<T>() -> Receiver<T> {
    Receiver(Channel::new(0, None, VecDeque::new()))
}

pub(crate) fn at(when: Instant) -> Receiver<Instant> {
    let due = with(|k| k.nanos(when));
    Receiver(Channel::new(1, Some(due), VecDeque::from([when])))
}

impl<T> Channel<T> {
    fn new(capacity: usize, due: Option<u64>, items: VecDeque<T>) -> Arc<Self> {
        let (senders, receivers, waiting) = (1, 1, Vec::new());
        Arc::new(Self {
            state: Mutex::new(State { items, capacity, senders, receivers, due, waiting }),
        })
    }

    fn state(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T> State<T> {
    /// Whether a receiver need not wait.
    fn has_item(&self) -> bool {
        let is_due = self.due.is_none_or(|due| due <= with(|k| k.now));
        is_due && (!self.items.is_empty() || self.senders == 0)
    }

    /// Whether a sender need not wait.
    fn has_room(&self) -> bool {
        self.items.len() < self.capacity || self.receivers == 0
    }

    fn wake(&mut self) {
        self.waiting.drain(..).for_each(kernel::wake);
    }
}

impl<T> Sender<T> {
    pub(crate) fn try_send(&self, item: T) -> Result<(), TrySendError<T>> {
        let mut state = self.0.state();
        if state.receivers == 0 {
            drop(state);
            return Err(TrySendError::Disconnected(item));
        }
        if !state.has_room() {
            drop(state);
            return Err(TrySendError::Full(item));
        }
        // A signal is an item without a size.
        if planted(Bug::LostSignal) && size_of::<T>() == 0 && kernel::chance(0.02) {
            return Ok(());
        }
        state.items.push_back(item);
        state.wake();
        Ok(())
    }

    pub(crate) fn send(&self, mut item: T) -> Result<(), SendError<T>> {
        loop {
            match self.try_send(item) {
                Ok(()) => return Ok(()),
                Err(TrySendError::Disconnected(back)) => return Err(SendError(back)),
                Err(TrySendError::Full(back)) => item = back,
            }
            wait(&[self], None);
        }
    }
}

impl<T> Receiver<T> {
    pub(crate) fn try_recv(&self) -> Result<T, TryRecvError> {
        let mut state = self.0.state();
        if !state.has_item() {
            return Err(TryRecvError::Empty);
        }
        match state.items.pop_front() {
            Some(item) => {
                state.wake();
                Ok(item)
            }
            None => Err(TryRecvError::Disconnected),
        }
    }

    pub(crate) fn recv(&self) -> Result<T, RecvError> {
        loop {
            match self.try_recv() {
                Ok(item) => return Ok(item),
                Err(TryRecvError::Disconnected) => return Err(RecvError),
                Err(TryRecvError::Empty) => wait(&[self], None),
            };
        }
    }

    pub(crate) fn recv_deadline(&self, until: Instant) -> Result<T, RecvTimeoutError> {
        let late = if planted(Bug::DeadlineIgnored) { 3_600_000_000_000 } else { 0 };
        let until = with(|k| k.nanos(until)) + late;
        loop {
            match self.try_recv() {
                Ok(item) => return Ok(item),
                Err(TryRecvError::Disconnected) => return Err(RecvTimeoutError::Disconnected),
                Err(TryRecvError::Empty) => {}
            }
            if wait(&[self], Some(until)).is_none() {
                return Err(RecvTimeoutError::Timeout);
            }
        }
    }

    pub(crate) fn try_iter(&self) -> impl Iterator<Item = T> {
        std::iter::from_fn(|| self.try_recv().ok())
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.state().items.is_empty()
    }

    pub(crate) fn len(&self) -> usize {
        self.0.state().items.len()
    }

    pub(crate) fn capacity(&self) -> Option<usize> {
        Some(self.0.state().capacity)
    }

    pub(crate) fn operand(&self) -> &dyn Operand
    where
        T: Send,
    {
        self
    }

    /// What was found to be there.
    pub(crate) fn take(&self) -> Result<T, RecvError> {
        self.try_recv().map_err(|_| RecvError)
    }
}

impl<T> Clone for Sender<T> {
    fn clone(&self) -> Self {
        self.0.state().senders += 1;
        Self(Arc::clone(&self.0))
    }
}

impl<T> Clone for Receiver<T> {
    fn clone(&self) -> Self {
        self.0.state().receivers += 1;
        Self(Arc::clone(&self.0))
    }
}

impl<T> Drop for Sender<T> {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.senders -= 1;
        if state.senders == 0 && !(planted(Bug::EndUnheard) && kernel::chance(0.2)) {
            state.wake();
        }
    }
}

impl<T> Drop for Receiver<T> {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.receivers -= 1;
        if state.receivers == 0 {
            let left = std::mem::take(&mut state.items);
            state.wake();
            drop(state);
            drop(left);
        }
    }
}

/// What can be waited for.
pub(crate) trait Operand {
    fn is_ready(&self) -> bool;
    /// When it is ready by itself.
    fn due(&self) -> Option<u64>;
    fn watch(&self, task: usize);
    fn forget(&self, task: usize);
}

macro_rules! operand {
    ($end:ident, $ready:ident) => {
        impl<T> Operand for $end<T> {
            fn is_ready(&self) -> bool {
                self.0.state().$ready()
            }

            fn due(&self) -> Option<u64> {
                self.0.state().due
            }

            fn watch(&self, task: usize) {
                self.0.state().waiting.push(task);
            }

            fn forget(&self, task: usize) {
                self.0.state().waiting.retain(|other| *other != task);
            }
        }
    };
}

operand!(Sender, has_room);
operand!(Receiver, has_item);

/// Waits until one of them is ready; one by chance, if several are. `None` when
/// it is `until` before.
pub(crate) fn wait(operands: &[&dyn Operand], until: Option<u64>) -> Option<usize> {
    kernel::preempt();
    let due = operands.iter().filter_map(|operand| operand.due()).chain(until).min();
    loop {
        let (mut ready, mut found) = ([0; 8], 0);
        for (index, operand) in operands.iter().enumerate() {
            if operand.is_ready() {
                ready[found] = index;
                found += 1;
            }
        }
        match found {
            0 => {}
            1 => return Some(ready[0]),
            _ => return Some(with(|k| k.pick(&ready[..found]))),
        }
        if until.is_some_and(|until| until <= with(|k| k.now)) {
            return None;
        }
        let task = kernel::current();
        operands.iter().for_each(|operand| operand.watch(task));
        kernel::park(due);
        operands.iter().for_each(|operand| operand.forget(task));
    }
}

/// As much of crossbeam's as the crate uses.
#[derive(Default)]
pub(crate) struct Select<'a>(Vec<&'a dyn Operand>);

pub(crate) struct Selected(usize);

impl<'a> Select<'a> {
    pub(crate) fn new() -> Self {
        Self(Vec::new())
    }

    pub(crate) fn send<T>(&mut self, sender: &'a Sender<T>) -> usize {
        self.0.push(sender);
        self.0.len() - 1
    }

    pub(crate) fn recv<T>(&mut self, receiver: &'a Receiver<T>) -> usize {
        self.0.push(receiver);
        self.0.len() - 1
    }

    pub(crate) fn select(&mut self) -> Selected {
        Selected(wait(&self.0, None).expect("there is no time limit"))
    }
}

impl Selected {
    pub(crate) fn index(&self) -> usize {
        self.0
    }

    pub(crate) fn send<T>(self, sender: &Sender<T>, item: T) -> Result<(), SendError<T>> {
        sender.try_send(item).map_err(|error| SendError(error.into_inner()))
    }

    pub(crate) fn recv<T>(self, receiver: &Receiver<T>) -> Result<T, RecvError> {
        receiver.take()
    }
}

/// As many forms of crossbeam's as the crate uses: receivers, two to four.
macro_rules! select {
    (@arms [$($done:tt)*]) => { $crate::select!(@run $($done)*) };
    (@arms [$($done:tt)*] recv($from:expr) -> $got:pat => $body:block, $($rest:tt)*) => {
        $crate::select!(@arms [$($done)* ($from, $got, $body)] $($rest)*)
    };
    (@arms [$($done:tt)*] recv($from:expr) -> $got:pat => $body:block $($rest:tt)*) => {
        $crate::select!(@arms [$($done)* ($from, $got, $body)] $($rest)*)
    };
    (@arms [$($done:tt)*] recv($from:expr) -> $got:pat => $body:expr, $($rest:tt)*) => {
        $crate::select!(@arms [$($done)* ($from, $got, $body)] $($rest)*)
    };
    (@run ($a:expr, $in_a:pat, $do_a:expr) ($b:expr, $in_b:pat, $do_b:expr)) => {
        match (&$a, &$b) {
            (a, b) => match $crate::channel::wait(&[a.operand(), b.operand()], None) {
                Some(0) => { let $in_a = a.take(); $do_a }
                _ => { let $in_b = b.take(); $do_b }
            },
        }
    };
    (@run ($a:expr, $in_a:pat, $do_a:expr) ($b:expr, $in_b:pat, $do_b:expr)
        ($c:expr, $in_c:pat, $do_c:expr)) => {
        match (&$a, &$b, &$c) {
            (a, b, c) => {
                match $crate::channel::wait(&[a.operand(), b.operand(), c.operand()], None) {
                    Some(0) => { let $in_a = a.take(); $do_a }
                    Some(1) => { let $in_b = b.take(); $do_b }
                    _ => { let $in_c = c.take(); $do_c }
                }
            }
        }
    };
    (@run ($a:expr, $in_a:pat, $do_a:expr) ($b:expr, $in_b:pat, $do_b:expr)
        ($c:expr, $in_c:pat, $do_c:expr) ($d:expr, $in_d:pat, $do_d:expr)) => {
        match (&$a, &$b, &$c, &$d) {
            (a, b, c, d) => {
                let all = [a.operand(), b.operand(), c.operand(), d.operand()];
                match $crate::channel::wait(&all, None) {
                    Some(0) => { let $in_a = a.take(); $do_a }
                    Some(1) => { let $in_b = b.take(); $do_b }
                    Some(2) => { let $in_c = c.take(); $do_c }
                    _ => { let $in_d = d.take(); $do_d }
                }
            }
        }
    };
    ($($arms:tt)+) => { $crate::select!(@arms [] $($arms)+) };
}

pub(crate) use select;
