//! The crate's `logic/`, each module in a shell that can carry a planted bug.

pub(crate) mod backoff;
pub(crate) mod batch;
pub(crate) mod connection;
pub(crate) mod dedup;
pub(crate) mod heartbeat;
#[path = "../../src/logic/identity.rs"]
pub(crate) mod identity;
#[path = "../../src/logic/layout.rs"]
pub(crate) mod layout;
pub(crate) mod ledger;
pub(crate) mod overflow;
#[path = "../../src/logic/pointer.rs"]
pub(crate) mod pointer;
pub(crate) mod rate;
pub(crate) mod recovery;
pub(crate) mod restart;

pub(crate) fn some_instant() -> std::time::Instant {
    std::time::Instant::now()
}
