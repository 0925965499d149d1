//! JSON pointers: what serde_json finds in a document is what is found in its
//! text, and a text that was cut has no other value than the whole. Nor does it
//! matter what texts were looked into before.

use serde_json::Value;

use crate::logic::layout::Layouts;
use crate::logic::pointer::{Found, Pointer, TokenKind};

pub(super) const WORDS: &[&[u8]] = &[
    b"\n",
    b"/a",
    b"/0",
    b"~0",
    b"~1",
    b"{\"a\":",
    b"[",
    b"]",
    b"}",
    b",",
    b"\"",
    b"\\u0061",
    b"\\ud83d\\ude00",
    b"\\\"",
    b"null",
    b"true",
    b"-1.5e+3",
    b"0",
    b" \t",
];

/// The first line is the pointer, the rest the text.
pub(super) fn run(input: &[u8]) {
    let split = input.iter().position(|byte| *byte == b'\n').unwrap_or(input.len());
    let (first, text) = (&input[..split], input.get(split + 1..).unwrap_or_default());
    let Ok(line) = std::str::from_utf8(first) else { return };
    let well_formed = line.starts_with('/') && line.split('~').skip(1).all(is_escape);
    let parsed = Pointer::parse(line);
    assert_eq!(parsed.is_ok(), well_formed, "{line}");
    let Ok(pointer) = parsed else { return };
    let found = pointer.find(text);
    let mut layouts = Layouts::default();
    assert_eq!(layouts.find(&pointer, text), found);
    for end in 0..text.len() {
        let part = pointer.find(&text[..end]);
        assert!(part.is_none() || part == found, "{part:?} in {end} bytes, then {found:?}");
        assert_eq!(layouts.find(&pointer, &text[..end]), part);
    }
    let mut changed = text.to_vec();
    for at in 0..text.len().min(300) {
        for byte in [b'"', b'\\', b'0', b'7', b'a', b'}'] {
            changed[at] = byte;
            assert_eq!(layouts.find(&pointer, &changed), pointer.find(&changed));
            changed[at] = text[at];
        }
        assert_eq!(layouts.find(&pointer, text), found);
    }
    if let Ok(document) = serde_json::from_slice::<Value>(text)
        && members(&document) == colons(text)
    {
        check(found, document.pointer(line));
    }
}

fn is_escape(behind_tilde: &str) -> bool {
    behind_tilde.starts_with(['0', '1'])
}

/// `null` is as good as absent.
fn check(found: Option<Found<'_>>, expected: Option<&Value>) {
    let Some(expected) = expected.filter(|value| !value.is_null()) else {
        return assert_eq!(found, None);
    };
    let Found { kind, raw } = found.unwrap();
    let raw = std::str::from_utf8(raw).unwrap();
    let quoted = format!("\"{raw}\"");
    let text = if kind == TokenKind::String { quoted.as_str() } else { raw };
    assert_eq!(&serde_json::from_str::<Value>(text).unwrap(), expected);
    let same_kind = match kind {
        TokenKind::String => expected.is_string(),
        TokenKind::Number => expected.is_number(),
        TokenKind::Bool => expected.is_boolean(),
        TokenKind::Object => expected.is_object(),
        TokenKind::Array => expected.is_array(),
        TokenKind::Null => false,
    };
    assert!(same_kind, "{kind:?} is {expected}");
}

/// How many members the objects of a document have: fewer than there are colons
/// in its text if a name came twice, of which serde_json keeps the last.
fn members(value: &Value) -> usize {
    match value {
        Value::Array(items) => items.iter().map(members).sum(),
        Value::Object(all) => all.len() + all.values().map(members).sum::<usize>(),
        _ => 0,
    }
}

/// Colons outside strings.
fn colons(text: &[u8]) -> usize {
    let (mut count, mut in_string, mut escaped) = (0, false, false);
    for byte in text {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            b':' if !in_string => count += 1,
            _ => {}
        }
    }
    count
}
