//! What happens to a block of messages that does not fit into the queue.

use std::fmt;
use std::str::FromStr;

use crate::error::Error;

/// What gives way when the queue to the consumers is full.
///
/// Each policy has its own counter, so what is missing can be accounted for.
///
/// ```
/// use broadsock::Overflow;
///
/// let policy: Overflow = "drop-oldest".parse()?;
/// assert_eq!(policy, Overflow::DropOldest);
/// # Ok::<(), broadsock::Error>(())
/// ```
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Overflow {
    /// The connection stops reading until there is room: nothing is lost here,
    /// the TCP window closes, and the server decides what becomes of its feed.
    /// The default.
    #[default]
    Block,
    /// The messages that waited longest are dropped: for feeds of which only
    /// the latest counts.
    DropOldest,
    /// The messages that just arrived are dropped.
    DropNewest,
    /// The connection is cut and made anew after its back-off; what did not fit
    /// is dropped. For feeds that start with a snapshot.
    Disconnect,
}

/// How full the queue is, and how full it may get.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Room {
    /// Messages waiting.
    pub(crate) queued: usize,
    /// Most messages that may wait.
    pub(crate) capacity: usize,
    /// Payload bytes waiting.
    pub(crate) queued_bytes: usize,
    /// Most payload bytes that may wait; one block alone may exceed it.
    pub(crate) capacity_bytes: usize,
}

/// What to do with a block that arrived.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Decision {
    /// Queue the whole block.
    Push,
    /// Keep the block and stop reading; ask again when a consumer took some.
    Hold,
    /// Drop from the front of the queue at least this much, then push.
    DropOldest {
        /// Messages that must go, at least.
        messages: usize,
        /// Payload bytes that must go, at least.
        bytes: usize,
    },
    /// Queue the first `keep` messages of the block and drop the others.
    Split {
        /// Messages of the block that still fit.
        keep: usize,
    },
    /// As `Split`, and then cut the connection.
    Disconnect {
        /// Messages of the block that still fit.
        keep: usize,
    },
}

/// Decides about a block of `len` messages with `bytes` of payload together.
///
/// Progress is certain: an empty queue never holds a block back, however large
/// it is, or a single huge message could never pass. So `Block` and
/// `DropOldest` exceed the limits by one block at most; the other policies cut
/// a block with more messages than `capacity`.
pub(crate) fn decide(policy: Overflow, room: Room, len: usize, bytes: usize) -> Decision {
    if room.takes(len, bytes) {
        return Decision::Push;
    }
    match policy {
        Overflow::Block | Overflow::DropOldest if room.queued == 0 => Decision::Push,
        Overflow::Block => Decision::Hold,
        Overflow::DropOldest => room.make(len, bytes),
        Overflow::DropNewest => Decision::Split { keep: room.keep(len, bytes) },
        Overflow::Disconnect => Decision::Disconnect { keep: room.keep(len, bytes) },
    }
}

impl Room {
    /// Whether the whole block may be queued as things are.
    fn takes(self, len: usize, bytes: usize) -> bool {
        let fits = len <= self.capacity.saturating_sub(self.queued);
        len == 0 || fits && (self.queued == 0 || self.takes_bytes(bytes))
    }

    /// Whether so many bytes more stay within the limit.
    fn takes_bytes(self, bytes: usize) -> bool {
        bytes <= self.capacity_bytes.saturating_sub(self.queued_bytes)
    }

    /// How much of the queue must go before the block fits. A block that no
    /// emptying can fit takes the whole queue: asking for bytes alone would
    /// leave empty messages in it for ever.
    fn make(self, len: usize, bytes: usize) -> Decision {
        if len > self.capacity || bytes > self.capacity_bytes {
            return Decision::DropOldest { messages: self.queued, bytes: self.queued_bytes };
        }
        let messages = self.queued.saturating_sub(self.capacity - len);
        let bytes = self.queued_bytes.saturating_sub(self.capacity_bytes - bytes);
        Decision::DropOldest { messages, bytes }
    }

    /// How many of the block's messages still fit by count, given that not all
    /// do. Their bytes are known only together, so too many of them keep none.
    fn keep(self, len: usize, bytes: usize) -> usize {
        let at_least = if self.queued == 0 { len.min(1) } else { 0 };
        let fit = len.min(self.capacity.saturating_sub(self.queued));
        if self.takes_bytes(bytes) { fit.max(at_least) } else { at_least }
    }
}

impl fmt::Display for Overflow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Overflow::Block => "block",
            Overflow::DropOldest => "drop-oldest",
            Overflow::DropNewest => "drop-newest",
            Overflow::Disconnect => "disconnect",
        })
    }
}

impl FromStr for Overflow {
    type Err = Error;

    /// Reads what `Display` writes.
    fn from_str(name: &str) -> Result<Self, Error> {
        match name {
            "block" => Ok(Overflow::Block),
            "drop-oldest" => Ok(Overflow::DropOldest),
            "drop-newest" => Ok(Overflow::DropNewest),
            "disconnect" => Ok(Overflow::Disconnect),
            _ => Err(Error::setting(
                "overflow",
                format_args!("`{name}` is none of block, drop-oldest, drop-newest and disconnect"),
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;
    use proptest::prelude::*;

    const ALL: [Overflow; 4] =
        [Overflow::Block, Overflow::DropOldest, Overflow::DropNewest, Overflow::Disconnect];

    /// A queue of at most 10 messages and 100 bytes.
    fn room(queued: usize, queued_bytes: usize) -> Room {
        Room { queued, capacity: 10, queued_bytes, capacity_bytes: 100 }
    }

    #[test]
    fn a_block_that_fits_is_queued_under_every_policy() {
        for policy in ALL {
            for (queued, used, len, bytes) in
                [(0, 0, 10, 100), (9, 99, 1, 1), (4, 40, 6, 60), (10, 100, 0, 0), (0, 0, 1, 999)]
            {
                let decision = decide(policy, room(queued, used), len, bytes);
                assert_eq!(decision, Decision::Push, "{policy} {queued} {used} {len} {bytes}");
            }
        }
    }

    #[test]
    fn each_policy_gives_way_in_its_own_manner() {
        use Decision::{Disconnect, DropOldest, Hold, Push, Split};
        let table = [
            // Too many messages, too many bytes, both; then a block as large as
            // the queue, and one that is larger, beside others and alone.
            ((8, 10), (5, 5), Hold, DropOldest { messages: 3, bytes: 0 }, 2),
            ((2, 90), (1, 30), Hold, DropOldest { messages: 0, bytes: 20 }, 0),
            ((10, 100), (1, 1), Hold, DropOldest { messages: 1, bytes: 1 }, 0),
            ((3, 30), (10, 10), Hold, DropOldest { messages: 3, bytes: 0 }, 7),
            ((5, 50), (1, 100), Hold, DropOldest { messages: 0, bytes: 50 }, 0),
            ((3, 30), (11, 11), Hold, DropOldest { messages: 3, bytes: 30 }, 7),
            ((3, 0), (1, 101), Hold, DropOldest { messages: 3, bytes: 0 }, 0),
            ((0, 0), (11, 11), Push, Push, 10),
            ((0, 0), (11, 101), Push, Push, 1),
        ];
        for ((queued, used), (len, bytes), block, oldest, keep) in table {
            let room = room(queued, used);
            assert_eq!(decide(Overflow::Block, room, len, bytes), block, "{room:?}");
            assert_eq!(decide(Overflow::DropOldest, room, len, bytes), oldest, "{room:?}");
            assert_eq!(decide(Overflow::DropNewest, room, len, bytes), Split { keep }, "{room:?}");
            let cut = decide(Overflow::Disconnect, room, len, bytes);
            assert_eq!(cut, Disconnect { keep }, "{room:?}");
        }
    }

    #[test]
    fn names_are_read_as_they_are_written() {
        for policy in ALL {
            assert_eq!(policy.to_string().parse::<Overflow>().unwrap(), policy);
        }
        assert_eq!(Overflow::default(), Overflow::Block);
        assert_eq!(format!("{:>6}", Overflow::Block), " block");
    }

    #[test]
    fn an_unknown_name_is_told_with_the_known_ones() {
        let error = "drop".parse::<Overflow>().unwrap_err();
        assert_eq!(error.kind(), &ErrorKind::Setting("overflow"));
        assert!(error.to_string().contains("drop-oldest"), "{error}");
    }

    fn rooms() -> impl Strategy<Value = Room> {
        (0usize..12, 1usize..10, 0usize..120, 1usize..100).prop_map(
            |(queued, capacity, used, capacity_bytes)| Room {
                queued,
                capacity,
                queued_bytes: if queued == 0 { 0 } else { used },
                capacity_bytes,
            },
        )
    }

    proptest! {
        #[test]
        fn dropping_what_was_asked_for_makes_the_block_fit(
            room in rooms(), len in 0usize..20, bytes in 0usize..200,
        ) {
            let Decision::DropOldest { messages, bytes: shed } =
                decide(Overflow::DropOldest, room, len, bytes)
            else {
                return Ok(());
            };
            prop_assert!(messages > 0 || shed > 0, "nothing to drop");
            prop_assert!(messages <= room.queued && shed <= room.queued_bytes);
            let queued = room.queued - messages;
            let queued_bytes = if queued == 0 { 0 } else { room.queued_bytes - shed };
            let after = Room { queued, queued_bytes, ..room };
            prop_assert_eq!(decide(Overflow::DropOldest, after, len, bytes), Decision::Push);
        }

        #[test]
        fn what_is_kept_fits_and_something_is_given_up(
            room in rooms(), len in 0usize..20, bytes in 0usize..200,
        ) {
            for policy in [Overflow::DropNewest, Overflow::Disconnect] {
                if let Decision::Split { keep } | Decision::Disconnect { keep } =
                    decide(policy, room, len, bytes)
                {
                    prop_assert!(keep < len);
                    prop_assert!(keep == 0 || room.queued + keep <= room.capacity);
                }
            }
        }

        #[test]
        fn an_empty_queue_never_holds_a_block_back(len: usize, bytes: usize, capacity: usize) {
            let room = Room { queued: 0, capacity, queued_bytes: 0, capacity_bytes: 1 };
            for policy in ALL {
                let kept = match decide(policy, room, len, bytes) {
                    Decision::Push => len,
                    Decision::Split { keep } | Decision::Disconnect { keep } => keep,
                    other => return Err(TestCaseError::fail(format!("{other:?}"))),
                };
                prop_assert!(len == 0 || kept > 0);
            }
        }
    }
}
