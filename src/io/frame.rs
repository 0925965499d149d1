//! The head of a WebSocket frame (RFC 6455, section 5.2), as far as it takes to
//! tell the common frame from all others.

/// What the bytes at the start of a frame say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Head {
    /// Too few bytes to tell.
    Short,
    /// A whole message in one frame from a server: final, text or binary,
    /// without reserved bits, unmasked.
    Whole { text: bool, header: usize, payload: u64 },
    /// Any other: a control frame, a fragment, or a breach of the protocol.
    /// `open` says whether a fragmented message goes on behind it; a control
    /// frame does not change that, and leaves it `None`.
    Other { header: usize, payload: u64, open: Option<bool> },
}

const FINAL: u8 = 0x80;
const MASKED: u8 = 0x80;
const OPCODE: u8 = 0x0f;
const CONTROL: u8 = 0x08;
pub(super) const WHOLE_TEXT: u8 = FINAL | 1;
pub(super) const WHOLE_BINARY: u8 = FINAL | 2;

/// Reads a frame's head.
#[inline]
pub(super) fn head(bytes: &[u8]) -> Head {
    let &[first, second, ..] = bytes else { return Head::Short };
    let (length, extended) = match second & !MASKED {
        126 => match bytes.get(2..4) {
            Some(&[a, b]) => (u64::from(u16::from_be_bytes([a, b])), 2),
            _ => return Head::Short,
        },
        127 => match bytes.get(2..10) {
            Some(&[a, b, c, d, e, f, g, h]) => (u64::from_be_bytes([a, b, c, d, e, f, g, h]), 8),
            _ => return Head::Short,
        },
        short => (u64::from(short), 0),
    };
    let whole = first == WHOLE_TEXT || first == WHOLE_BINARY;
    if whole && second & MASKED == 0 {
        return Head::Whole { text: first == WHOLE_TEXT, header: 2 + extended, payload: length };
    }
    let mask = if second & MASKED == 0 { 0 } else { 4 };
    let open = (first & OPCODE < CONTROL).then_some(first & FINAL == 0);
    Head::Other { header: 2 + extended + mask, payload: length, open }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_common_frame_is_told_from_all_others() {
        let whole = |text, header, payload| Head::Whole { text, header, payload };
        let other = |header, payload, open| Head::Other { header, payload, open };
        for (bytes, head_of) in [
            (&[0x81, 5][..], whole(true, 2, 5)),
            (&[0x82, 0], whole(false, 2, 0)),
            (&[0x81, 126, 1, 0], whole(true, 4, 256)),
            (&[0x82, 127, 0, 0, 0, 0, 0, 1, 0, 0], whole(false, 10, 65_536)),
            // Fragments: first, middle, last.
            (&[0x01, 5], other(2, 5, Some(true))),
            (&[0x00, 5], other(2, 5, Some(true))),
            (&[0x80, 5], other(2, 5, Some(false))),
            // Control frames say nothing about fragments.
            (&[0x89, 5], other(2, 5, None)),
            (&[0x88, 0], other(2, 0, None)),
            // Breaches: reserved bits, mask, reserved opcode.
            (&[0xc1, 5], other(2, 5, Some(false))),
            (&[0x81, 0x85], other(6, 5, Some(false))),
            (&[0x83, 5], other(2, 5, Some(false))),
        ] {
            assert_eq!(head(bytes), head_of, "{bytes:?}");
        }
    }

    proptest! {
        #[test]
        fn a_head_is_short_until_its_last_byte_and_the_same_for_ever_after(
            bytes in proptest::collection::vec(any::<u8>(), 0..40)
        ) {
            let known: Vec<Head> = (0..=bytes.len()).map(|n| head(&bytes[..n])).collect();
            let first = known.iter().position(|head| *head != Head::Short);
            if let Some(first) = first {
                prop_assert!(first <= 10);
                prop_assert!(known[first..].iter().all(|head| *head == known[first]));
            }
        }
    }
}
