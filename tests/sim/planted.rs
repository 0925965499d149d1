//! Bugs planted on purpose, one at a time: the checks must find each.
//!
//! They sit in this program's doubles and in thin shells around the crate's
//! modules, so the crate itself has no trace of them.

use std::cell::Cell;

macro_rules! bugs {
    ($($name:ident,)*) => {
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub(crate) enum Bug { $($name,)* }
        pub(crate) const ALL: &[Bug] = &[$(Bug::$name,)*];
    };
}

bugs! {
    // Around the threads.
    LostWakeUp, LostEdge, LostAlarm, TimerKeepsTheLater, LostNotice, SocketNotReleased, LateClock,
    // Heartbeat.
    HalfOpenNeverDeclared, SendingPostponesTheVerdict, ResumeForgotten, StallNeverDeclared,
    PingsHideADeadFeed, DeadWhilePaused, DueAndNothingDone,
    // Back-off and error classes.
    BackOffResetByConnect, BackOffNeverReset, RetryAfterIgnored, BackOffBeyondItsCap,
    CloseCodeDelayIgnored, UnrecoverableRetried, RecoverableGivenUp, AttemptsNotLimited,
    IllegalTransition, BusyServerGivenUp, RefusalRetried, BreachRetried, ClassifierNotAsked,
    // Redirects.
    RedirectsNotLimited, RedirectsRefused,
    // Dedup, ledger, overflow, restarts.
    WindowTooSmall, FailureNotForgotten, DuplicateAccepted, FreshTakenForDuplicate,
    SkippedNotCounted, ShedNotCounted, NeverFull, HeldForEver, OldestNotDropped,
    IntensityIgnored, RestartedAtOnce, HeldLostWithItsThread, HeldUntilTheNextThread,
    QuietLostWithItsThread,
    // The WebSocket and the blocks.
    UnfinishedForgotten, FinishedSentAgain, WrittenTwice, WrongEpoch, WrongOrder, PongMissing,
    // The pipeline's logic.
    TimerOfAnOlderBatch, EmptyBatch, BatchTooLarge, ClosedBeforeItsTime, MissedFlushOnStop,
    OvertakenInItsKey, RateExceeded, RetriedAtOnce,
    // The pipeline's threads.
    LostSignal, EndUnheard, LostChange, ItemUntold, RoomUntold, RoomNotPassedOn,
    OvertakenInItsPartition, RetriedForEver, SettledTwice, FinishedButNotSettled,
    FailureTakenForSuccess, EarlyAcknowledgementForgotten, DeadWorkersMessageForgotten,
    DeadWorkersRestDropped, DeathUntold, PanicEscapes, DeadlineIgnored, RoomNeverGivenBack,
    RoomForTooMany,
    EndUntold,
    // Found where each call fails in its turn.
    ReadErrorSwallowed, WakeErrorSwallowed,
}

/// Those that only a failed call brings out.
pub(crate) const OF_FAILED_CALLS: &[Bug] = &[Bug::ReadErrorSwallowed, Bug::WakeErrorSwallowed];

thread_local! {
    static PLANTED: Cell<Option<Bug>> = const { Cell::new(None) };
}

pub(crate) fn plant(bug: Option<Bug>) {
    PLANTED.set(bug);
}

pub(crate) fn planted(bug: Bug) -> bool {
    PLANTED.get() == Some(bug)
}
