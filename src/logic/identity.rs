//! The identity of a message: a keyed 128-bit hash.

use std::hash::{BuildHasher, Hasher};

use foldhash::SharedSeed;
use foldhash::quality::SeedableRandomState;

use crate::message::MessageId;

/// Hashes ids, under keys that a peer does not know: it cannot craft two
/// messages of one identity. Two lanes of 64 bits make accidents impossible in
/// practice (10^9 ids collide with a chance of 10^-20).
#[derive(Clone)]
pub(crate) struct Identity {
    lanes: [SeedableRandomState; 2],
}

impl Identity {
    /// `shared` and `keys` must be drawn at random for each process.
    pub(crate) fn new(shared: &'static SharedSeed, keys: [u64; 2]) -> Self {
        Self { lanes: keys.map(|key| SeedableRandomState::with_seed(key, shared)) }
    }

    /// The identity of `id`; `kind` keeps apart what is equal in bytes only.
    pub(crate) fn of(&self, kind: u8, id: &[u8]) -> MessageId {
        let [high, low] = [&self.lanes[0], &self.lanes[1]].map(|lane| {
            let mut hasher = lane.build_hasher();
            hasher.write(id);
            hasher.write_u8(kind);
            hasher.finish()
        });
        MessageId::new(u128::from(high) << 64 | u128::from(low))
    }
}

impl std::fmt::Debug for Identity {
    /// Without the keys.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Identity")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    static SHARED: SharedSeed = SharedSeed::from_u64(7);

    #[test]
    fn equal_ids_agree_and_kinds_lengths_and_keys_differ() {
        let a = Identity::new(&SHARED, [1, 2]);
        assert_eq!(a.of(0, b"x"), a.of(0, b"x"));
        assert_ne!(a.of(0, b"x"), a.of(1, b"x"));
        assert_ne!(a.of(0, b""), a.of(0, b"\0"));
        assert_ne!(a.of(0, b"x"), Identity::new(&SHARED, [1, 3]).of(0, b"x"));
    }

    #[test]
    fn neither_lane_repeats_over_many_ids() {
        let identity = Identity::new(&SHARED, [1, 2]);
        let ids: Vec<u128> =
            (0..50_000_u32).map(|n| identity.of(0, &n.to_le_bytes()).to_u128()).collect();
        assert_eq!(ids.iter().map(|id| id >> 64).collect::<HashSet<_>>().len(), 50_000);
        assert_eq!(ids.iter().map(|id| *id as u64).collect::<HashSet<_>>().len(), 50_000);
    }
}
