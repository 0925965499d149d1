//! The calls to the world that may fail, and how they fail.

use std::io;

use crate::kernel::{self, Kernel, Wait, with};

/// What a failure says where the crate shows it to a person.
pub(crate) const PLANNED: &str = "planned fault";

/// Every fault that a world has to know. A run over many seeds fails if one of
/// them never struck.
pub(crate) const BOOK: &[&str] = &[
    // An attempt.
    "refused",
    "black hole",
    "TLS failure",
    "redirect",
    "HTTP 401",
    "HTTP 429",
    "HTTP 503",
    "Retry-After",
    "no HTTP",
    "upgrade: silence",
    "upgrade: reset",
    "upgrade: end",
    "upgrade: dribble",
    "upgrade: wrong accept",
    "upgrade: extension",
    "upgrade: subprotocol",
    "look-up fails",
    "look-up panics",
    "look-up is slow",
    // A socket.
    "one-byte reads",
    "partial writes",
    "slow socket",
    "reset",
    "reset within a frame",
    "end within a frame",
    "end without a close frame",
    "half-open",
    "half-close",
    "server stops reading",
    "server falls silent",
    "close frame and silence",
    "delay",
    "oversize frame",
    "reserved bits",
    "not UTF-8",
    "masked frame",
    "ping flood",
    "close 999",
    "close 1000",
    "close 1001",
    "close 1002",
    "close 1003",
    "close 1005",
    "close 1006",
    "close 1007",
    "close 1008",
    "close 1009",
    "close 1010",
    "close 1011",
    "close 1012",
    "close 1013",
    "close 1014",
    "close 1015",
    "close 2999",
    "close 3000",
    "close 4321",
    "close 4999",
    "close 5000",
    // A feed.
    "no data",
    "duplicate",
    "reorder",
    "replay",
    "no welcome",
    // A program.
    "request hook fails",
    "request hook panics",
    "session fails",
    "session panics",
    "session stalls",
    "classifier panics",
    "user code never returns",
    "consumer stalls",
    "consumer leaves",
    "reader panics",
    "thread ends with blocks held",
    "message fails",
    "late alarm",
    "timer panics",
    "close at any moment",
];

/// A call of the crate that the world may fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Call {
    Spawn,
    NewPoller,
    NewWaker,
    Wake,
    Poll,
    Register,
    Connect,
    TakeError,
    SetNodelay,
    Read,
    Write,
    LookUp,
    RequestHook,
    NewSession,
    OnOpen,
    OnMessage,
    OnHeartbeat,
}

/// How a call fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    Error(io::ErrorKind),
    Panic,
    /// The stream has ended; a write takes nothing for good.
    End,
    /// One byte only.
    Short,
    /// Nothing now, and readiness a second later.
    Later,
    /// Nothing ever, and nobody is told.
    Stall,
}

/// The call that fails: the one of this number, from 0, and with `lasts` all of
/// its kind behind it, until the world heals.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Strike {
    pub(crate) at: usize,
    pub(crate) call: Call,
    pub(crate) fault: Fault,
    pub(crate) lasts: bool,
}

impl Call {
    /// The ways in which this call fails on a real system.
    pub(crate) fn faults(self) -> &'static [Fault] {
        use Fault::*;
        use io::ErrorKind::*;
        match self {
            Call::Spawn => &[Error(WouldBlock)],
            Call::NewPoller | Call::NewWaker | Call::Wake | Call::SetNodelay => &[Error(Other)],
            Call::Poll => &[Error(Interrupted), Error(OutOfMemory)],
            Call::Register => &[Error(OutOfMemory)],
            Call::Connect => &[Error(AddrNotAvailable), Stall],
            Call::TakeError => &[Error(ConnectionRefused)],
            Call::Read => &[
                Error(ConnectionReset),
                Error(TimedOut),
                Error(Interrupted),
                End,
                Short,
                Later,
                Stall,
            ],
            Call::Write => &[
                Error(ConnectionReset),
                Error(BrokenPipe),
                Error(Interrupted),
                End,
                Short,
                Later,
                Stall,
            ],
            Call::LookUp => &[Error(Other), Panic, End, Stall],
            Call::RequestHook | Call::OnOpen | Call::OnMessage | Call::OnHeartbeat => {
                &[Error(Other), Panic, Stall]
            }
            Call::NewSession => &[Panic, Stall],
        }
    }

    /// Whether a failure that stays is something to get over: nothing gets over
    /// calls that are interrupted or late for ever, or wake-ups that never come.
    pub(crate) fn may_last(self, fault: Fault) -> bool {
        let interrupted = fault == Fault::Error(io::ErrorKind::Interrupted);
        self != Call::Wake && !interrupted && fault != Fault::Later
    }

    /// Whether nobody notices when such calls fail now and then.
    fn is_frequent(self) -> bool {
        matches!(self, Call::Read | Call::Write | Call::Poll)
    }

    /// Whether a world with a share of failing calls fails this one: what users
    /// write fails at a rate of its own.
    fn is_of_the_system(self) -> bool {
        !matches!(
            self,
            Call::Wake
                | Call::LookUp
                | Call::RequestHook
                | Call::NewSession
                | Call::OnOpen
                | Call::OnMessage
                | Call::OnHeartbeat
        )
    }
}

impl Fault {
    /// Whether the cause has to be seen in what the crate tells of a loss.
    pub(crate) fn shows(self) -> bool {
        match self {
            Fault::Error(kind) => kind != io::ErrorKind::Interrupted,
            Fault::Panic => true,
            Fault::End | Fault::Short | Fault::Later | Fault::Stall => false,
        }
    }
}

/// Whether, and how, this call fails.
pub(crate) fn fault(call: Call) -> Option<Fault> {
    with(|k| {
        let fault = drawn(k, call).or_else(|| struck(k, call))?;
        k.fault(format!("{call:?} fails"));
        k.note(|| format!("{call:?} fails: {fault:?}"));
        Some(fault)
    })
}

fn drawn(k: &mut Kernel, call: Call) -> Option<Fault> {
    let p = if call.is_frequent() { k.failing / 20.0 } else { k.failing };
    let fails = p > 0.0 && call.is_of_the_system() && k.chance(p);
    fails.then(|| k.pick(call.faults()))
}

fn struck(k: &mut Kernel, call: Call) -> Option<Fault> {
    if let Some(calls) = &mut k.calls {
        calls.push(call);
    }
    let at = k.called;
    k.called += 1;
    let strike = k.strike?;
    let again = strike.lasts && at > strike.at && call == strike.call && !k.sv.healed;
    let strikes = at == strike.at || again;
    if strikes {
        k.struck_at = k.now;
    }
    strikes.then_some(strike.fault)
}

/// The error of a call, if it fails by one.
pub(crate) fn error(call: Call) -> io::Result<()> {
    match fault(call) {
        Some(Fault::Error(kind)) => Err(planned(kind)),
        _ => Ok(()),
    }
}

pub(crate) fn planned(kind: io::ErrorKind) -> io::Error {
    io::Error::new(kind, PLANNED)
}

/// Fails a call of user code.
pub(crate) fn user_code(call: Call) -> io::Result<()> {
    match fault(call) {
        Some(Fault::Error(kind)) => Err(planned(kind)),
        Some(Fault::Panic) => panic!("{PLANNED}"),
        Some(Fault::Stall) => hang(),
        _ => Ok(()),
    }
}

/// Never returns: the thread is stuck for good.
pub(crate) fn hang() -> ! {
    with(|k| {
        let name = k.current_name();
        k.note(|| format!("{name} hangs"));
        k.hung.insert(name);
    });
    loop {
        kernel::park(None);
    }
}
