//! The identity of a message: a keyed 128-bit hash.

use twox_hash::XxHash3_128;
use xxhash_rust::xxh3::xxh3_128_with_secret;

use crate::message::MessageId;

/// How long a key is: what XXH3 takes in place of its own secret.
pub(crate) const KEY: usize = 192;

/// Ids above this length are hashed in stripes. The one implementation is faster with
/// those, by a third at 1 KiB and by half at 16 KiB; the other with all below.
const SHORT: usize = 240;

/// Hashes ids, under a key that a peer does not know: it cannot craft two
/// messages of one identity. 128 bits make accidents impossible in practice
/// (among 10^9 ids, with a chance of 10^-20).
#[derive(Clone)]
pub(crate) struct Identity {
    // By itself in each copy, of which a connection has one: behind a pointer, it
    // would be looked for once more for each message.
    key: [u8; KEY],
}

impl Identity {
    /// `key` must be drawn at random for each process.
    pub(crate) fn new(key: [u8; KEY]) -> Self {
        Self { key }
    }

    /// The identity of `id`; `kind` keeps apart what is equal in bytes only.
    // A call for each message would cost a fifth of what the hash itself does.
    #[inline(always)]
    pub(crate) fn of(&self, kind: u8, id: &[u8]) -> MessageId {
        let hash = match id.len() {
            // The most common ones are hashed in place, where the compiler knows of most
            // bounds: that takes a fifth off.
            33..=64 => xxh3_128_with_secret(id, &self.key),
            _ => self.hash_other(id),
        };
        // Only the kinds of one id need be kept apart. This is one instruction, and
        // changes the lowest bits, by which the window of ids tells them first.
        MessageId::new(hash ^ u128::from(kind))
    }

    /// The hash of what is shorter or longer.
    #[inline(never)]
    fn hash_other(&self, id: &[u8]) -> u128 {
        if id.len() <= SHORT {
            return xxh3_128_with_secret(id, &self.key);
        }
        match XxHash3_128::oneshot_with_secret(&self.key, id) {
            Ok(hash) => hash,
            // Only of a key that is too short.
            Err(_) => xxh3_128_with_secret(id, &self.key),
        }
    }
}

impl std::fmt::Debug for Identity {
    /// Without the key.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Identity")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    fn identity(seed: u8) -> Identity {
        Identity::new(std::array::from_fn(|at| (at as u8 ^ seed).wrapping_mul(167).rotate_left(3)))
    }

    #[test]
    fn equal_ids_agree_and_kinds_lengths_and_keys_differ() {
        let a = identity(1);
        assert_eq!(a.of(0, b"x"), a.of(0, b"x"));
        assert_ne!(a.of(0, b"x"), a.of(1, b"x"));
        assert_ne!(a.of(0, b""), a.of(0, b"\0"));
        for len in [1, 10, 100, 200, 300, 5000] {
            let id = vec![7; len];
            assert_ne!(a.of(0, &id), identity(2).of(0, &id), "{len}");
        }
    }

    #[test]
    fn one_hash_is_taken_of_ids_of_all_lengths() {
        let a = identity(1);
        let id: Vec<u8> = (0..70_000_u32).map(|n| (n * 31 / 8) as u8).collect();
        for len in (0..1500).chain([4096, 16_384, 65_537, 70_000]) {
            let hash = xxh3_128_with_secret(&id[..len], &a.key);
            assert_eq!(a.of(0, &id[..len]), MessageId::new(hash), "{len}");
        }
    }

    #[test]
    fn ids_lie_as_far_apart_under_every_kind() {
        let a = identity(1);
        let apart = |kind| a.of(kind, b"x").to_u128() ^ a.of(kind, b"y").to_u128();
        assert_eq!(apart(0), apart(b's'));
    }

    #[test]
    fn the_key_is_not_shown() {
        assert_eq!(format!("{:?}", identity(1)), "Identity");
    }

    #[test]
    fn neither_half_repeats_over_many_ids() {
        let a = identity(1);
        let ids: Vec<u128> = (0..50_000_u32).map(|n| a.of(0, &n.to_le_bytes()).to_u128()).collect();
        assert_eq!(ids.iter().map(|id| id >> 64).collect::<HashSet<_>>().len(), 50_000);
        assert_eq!(ids.iter().map(|id| *id as u64).collect::<HashSet<_>>().len(), 50_000);
    }
}
