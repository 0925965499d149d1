//! Finding a value where it was in an earlier text.
//!
//! The messages of a feed are alike: the same members in the same order, with
//! other characters in their strings and other digits in their numbers. A text
//! that differs from an earlier one in nothing else, from its start to behind the
//! value, has the value in the same place. To see that takes some twenty
//! instructions for each sixteen bytes, none of which waits for another or depends
//! on a guess; to read the text takes as many for each byte or two.

use super::pointer::{Found, Pointer, TokenKind};

/// Layouts that are remembered.
const KNOWN: usize = 4;

/// Bytes up to behind the value of a text that is worth to be remembered.
const LONGEST: usize = 1024;

/// What is compared at once.
const WORD: usize = 16;

/// Trust in layouts, at most.
const TRUST: u32 = 32;

/// Without trust, each of so many texts is compared all the same.
const AGAIN: u32 = 16;

/// Finds the values of one pointer, faster in texts like earlier ones.
#[derive(Debug, Clone)]
pub(crate) struct Layouts {
    known: Vec<Layout>,
    /// The one that fitted last.
    latest: usize,
    /// The one to be forgotten next.
    oldest: usize,
    /// Grows with each text that fits and falls twice as fast with each other:
    /// where most texts are new, to compare them is lost time.
    trust: u32,
    /// Texts that were not compared since the last that was.
    passed: u32,
}

/// What a text is like, as far as it matters.
#[derive(Debug, Clone)]
struct Layout {
    words: Box<[Word]>,
    /// The last bytes once more: they may begin within a word.
    last: Word,
    /// Bytes up to behind what ends the value.
    len: usize,
    kind: TokenKind,
    /// Where the value is.
    start: usize,
    end: usize,
}

/// Some bytes, and for each of them what it may be.
#[derive(Debug, Clone, Copy)]
struct Word {
    bytes: [u8; WORD],
    /// All bits of each byte that must be the same.
    fixed: [u8; WORD],
    /// All bits of each byte within a string.
    text: [u8; WORD],
    /// All bits of each byte that may be any digit.
    digits: [u8; WORD],
}

/// What a byte may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum May {
    Stay,
    BeText,
    BecomeDigit,
}

impl Default for Layouts {
    fn default() -> Self {
        Self { known: Vec::new(), latest: 0, oldest: 0, trust: TRUST, passed: 0 }
    }
}

impl Layouts {
    /// What `pointer` finds in `text`; it must be the same pointer each time.
    pub(crate) fn find<'a>(&mut self, pointer: &Pointer, text: &'a [u8]) -> Option<Found<'a>> {
        if self.trust == 0 && self.passed < AGAIN {
            self.passed += 1;
            return pointer.find(text);
        }
        self.passed = 0;
        if let Some(found) = self.recall(text) {
            self.trust = (self.trust + 1).min(TRUST);
            return Some(found);
        }
        self.trust = self.trust.saturating_sub(2);
        let (found, start, len) = pointer.locate(text)?;
        if let Some(layout) = Layout::of(&text[..len], found, start) {
            self.learn(layout);
        }
        Some(found)
    }

    #[inline]
    fn recall<'a>(&mut self, text: &'a [u8]) -> Option<Found<'a>> {
        let latest = self.known.get(self.latest)?;
        if latest.fits(text) {
            return Some(latest.found(text));
        }
        let at = self.known.iter().position(|layout| layout.fits(text))?;
        self.latest = at;
        Some(self.known[at].found(text))
    }

    /// The one that fitted last stays.
    #[cold]
    fn learn(&mut self, layout: Layout) {
        if self.known.len() < KNOWN {
            self.latest = self.known.len();
            self.known.push(layout);
            return;
        }
        if self.oldest == self.latest {
            self.oldest = (self.oldest + 1) % KNOWN;
        }
        self.known[self.oldest] = layout;
        self.latest = self.oldest;
        self.oldest = (self.oldest + 1) % KNOWN;
    }
}

impl Layout {
    /// Of a text that ends behind the value that was found at `start` in it.
    fn of(text: &[u8], found: Found<'_>, start: usize) -> Option<Self> {
        // Of less than a word nothing is the last word.
        let last = *text.last_chunk()?;
        if text.len() > LONGEST || text.contains(&b'\\') {
            return None;
        }
        let may = what_may_be(text);
        let (chunks, _) = text.as_chunks();
        let words = chunks.iter().zip(may.chunks(WORD)).map(|(chunk, may)| Word::of(*chunk, may));
        let words = words.collect();
        let last = Word::of(last, &may[text.len() - WORD..]);
        let (len, kind, end) = (text.len(), found.kind, start + found.raw.len());
        Some(Self { words, last, len, kind, start, end })
    }

    /// Whether everything that decides where the value is, is here as it was there.
    #[inline]
    fn fits(&self, text: &[u8]) -> bool {
        let Some(text) = text.get(..self.len) else { return false };
        let (chunks, _) = text.as_chunks::<WORD>();
        let mut words = chunks.iter().zip(&self.words);
        words.all(|(chunk, word)| word.fits(chunk))
            && text.last_chunk().is_some_and(|chunk| self.last.fits(chunk))
    }

    #[inline]
    fn found<'a>(&self, text: &'a [u8]) -> Found<'a> {
        Found { kind: self.kind, raw: &text[self.start..self.end] }
    }
}

impl Word {
    fn of(bytes: [u8; WORD], may: &[May]) -> Self {
        let those = |what| std::array::from_fn(|at| if may[at] == what { 0xff } else { 0 });
        let (fixed, text, digits) = (those(May::Stay), those(May::BeText), those(May::BecomeDigit));
        Self { bytes, fixed, text, digits }
    }

    #[inline]
    fn fits(&self, bytes: &[u8; WORD]) -> bool {
        // All bits or none, and no branch: so it becomes vector instructions.
        let mask = |is: bool| 0_u8.wrapping_sub(u8::from(is));
        let mut wrong = 0;
        for (at, byte) in bytes.iter().enumerate() {
            let changed = (byte ^ self.bytes[at]) & self.fixed[at];
            let ends = mask((*byte == b'"') | (*byte == b'\\')) & self.text[at];
            let differs = mask(byte.wrapping_sub(b'0') > 9) & self.digits[at];
            wrong |= changed | ends | differs;
        }
        wrong == 0
    }
}

/// What each byte of a text without escapes may be: strings that are the values
/// of members may have other characters, and numbers may have other digits behind
/// the first, which says whether others may follow. All else is part of the
/// layout, names and the strings of arrays too.
fn what_may_be(text: &[u8]) -> Vec<May> {
    let mut may = vec![May::Stay; text.len()];
    let mut at = 0;
    let mut is_member = false;
    while at < text.len() {
        let len = match text[at] {
            b'"' => {
                let len = text[at + 1..].iter().take_while(|byte| **byte != b'"').count();
                if is_member {
                    may[at + 1..at + 1 + len].fill(May::BeText);
                }
                len + 2
            }
            b'-' | b'0'..=b'9' => {
                let part =
                    |byte: &&u8| matches!(byte, b'-' | b'+' | b'.' | b'e' | b'E' | b'0'..=b'9');
                let len = text[at..].iter().take_while(part).count();
                let first = at + usize::from(text[at] == b'-');
                for digit in (first + 1..at + len).filter(|digit| text[*digit].is_ascii_digit()) {
                    may[digit] = May::BecomeDigit;
                }
                len
            }
            b' ' | b'\t' | b'\n' | b'\r' => {
                at += 1;
                continue;
            }
            _ => 1,
        };
        is_member = text[at] == b':';
        at += len;
    }
    may
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn trade(symbol: &str, time: u64, id: u64) -> String {
        format!(r#"{{"e":"trade","E":{time},"s":"{symbol}","t":{id},"p":"67012.41","m":true}}"#)
    }

    fn find(layouts: &mut Layouts, pointer: &Pointer, text: &str) -> Option<String> {
        let found = layouts.find(pointer, text.as_bytes());
        assert_eq!(found, pointer.find(text.as_bytes()), "{text}");
        found.map(|found| String::from_utf8(found.raw.to_vec()).unwrap())
    }

    #[test]
    fn texts_that_differ_in_strings_and_digits_have_one_layout() {
        let pointer = Pointer::parse("/t").unwrap();
        let mut layouts = Layouts::default();
        for n in 0..1000 {
            let symbol = ["BTCUSDT", "ETHUSDT", "\u{e9}\u{e9} {,", "}:1,[]{"][n % 4];
            let text = trade(symbol, 1_767_225_600_000 + 7919 * n as u64, 100_000 + n as u64);
            assert_eq!(find(&mut layouts, &pointer, &text), Some(format!("{}", 100_000 + n)));
        }
        assert_eq!((layouts.known.len(), layouts.trust), (1, TRUST));
    }

    #[test]
    fn some_layouts_are_remembered_and_the_oldest_makes_room() {
        let pointer = Pointer::parse("/t").unwrap();
        let mut layouts = Layouts::default();
        let symbols = ["A", "AB", "ABC", "ABCD"];
        for n in 0..100 {
            find(&mut layouts, &pointer, &trade(symbols[n % 4], 10_000, 5000 + n as u64));
        }
        assert_eq!((layouts.known.len(), layouts.trust), (KNOWN, TRUST));
        find(&mut layouts, &pointer, &trade("ABCDE", 10_000, 5000));
        let symbols = ["ABCDE", "AB", "ABC", "ABCD"];
        for n in 0..100 {
            find(&mut layouts, &pointer, &trade(symbols[n % 4], 10_000, 5000 + n as u64));
            assert_eq!(layouts.known.len(), KNOWN);
        }
        assert_eq!(layouts.trust, TRUST);
    }

    #[test]
    fn texts_without_a_layout_in_common_are_seldom_compared_until_they_have_one() {
        let pointer = Pointer::parse("/t").unwrap();
        let mut layouts = Layouts::default();
        for n in 0..1000 {
            let symbol = "x".repeat(n % 50);
            find(&mut layouts, &pointer, &trade(&symbol, 10_000, 5000));
        }
        assert_eq!(layouts.trust, 0);
        let before = layouts.passed;
        find(&mut layouts, &pointer, &trade("x", 10_000, 5000));
        assert_ne!(layouts.passed, before);
        for _ in 0..100 {
            find(&mut layouts, &pointer, &trade("BTCUSDT", 10_000, 5000));
        }
        assert_eq!(layouts.trust, TRUST);
    }

    #[test]
    fn without_trust_one_text_is_compared_after_each_sixteen_that_are_not() {
        let pointer = Pointer::parse("/t").unwrap();
        let mut layouts = Layouts { trust: 0, ..Layouts::default() };
        for n in 0..100 {
            find(&mut layouts, &pointer, &trade(&"x".repeat(n), 10_000, 5000));
            assert_eq!(layouts.passed == 0, n % 17 == 16, "{n}");
        }
        assert_eq!((layouts.trust, layouts.known.len()), (0, KNOWN), "five were compared");
    }

    #[test]
    fn trust_grows_by_one_and_falls_by_two() {
        let pointer = Pointer::parse("/t").unwrap();
        let mut layouts = Layouts { trust: 3, ..Layouts::default() };
        for (symbol, trust) in
            [("A", 1), ("A", 2), ("B", 3), ("AB", 1), ("AB", 2), ("A", 3), ("ABC", 1), ("ABCD", 0)]
        {
            find(&mut layouts, &pointer, &trade(symbol, 10_000, 5000));
            assert_eq!(layouts.trust, trust, "{symbol}");
        }
        layouts.trust = TRUST;
        find(&mut layouts, &pointer, &trade("A", 10_000, 5000));
        assert_eq!(layouts.trust, TRUST, "and no more");
    }

    #[test]
    fn the_layout_that_fitted_last_is_tried_first_and_does_not_make_room() {
        let pointer = Pointer::parse("/t").unwrap();
        let mut layouts = Layouts::default();
        for symbol in ["A", "AB", "ABC", "ABCD", "A"] {
            find(&mut layouts, &pointer, &trade(symbol, 10_000, 5000));
        }
        assert_eq!((layouts.latest, layouts.oldest), (0, 0));
        find(&mut layouts, &pointer, &trade("ABCDE", 10_000, 5000));
        assert_eq!((layouts.latest, layouts.oldest), (1, 2));
        assert!(layouts.known[0].fits(trade("B", 12_345, 5678).as_bytes()));
    }

    #[test]
    fn what_is_short_or_long_or_has_escapes_is_not_remembered() {
        let pointer = Pointer::parse("/a").unwrap();
        let mut layouts = Layouts::default();
        let long = format!(r#"{{"b":"{}","a":1}}"#, "x".repeat(LONGEST));
        for text in [r#"{"a":1}"#, r#"{"b":"\n","a":1}"#, &long] {
            assert_eq!(find(&mut layouts, &pointer, text).as_deref(), Some("1"), "{text}");
        }
        assert_eq!(find(&mut layouts, &pointer, r#"{"b":1234567}"#), None);
        assert!(layouts.known.is_empty());
        find(&mut layouts, &pointer, r#"{"bcd":7,"a":1}"#);
        assert!(layouts.known.is_empty(), "fifteen bytes up to behind the value");
        find(&mut layouts, &pointer, r#"{"bcd":77,"a":1}"#);
        assert_eq!(layouts.known.len(), 1);
        let of = |len| format!(r#"{{"b":"{}","a":1}}"#, "x".repeat(len - 14));
        find(&mut layouts, &pointer, &of(LONGEST + 1));
        assert_eq!(layouts.known.len(), 1);
        find(&mut layouts, &pointer, &of(LONGEST));
        assert_eq!(layouts.known.len(), 2);
    }

    #[test]
    fn what_decides_the_place_may_not_change() {
        let pointer = Pointer::parse("/a/id").unwrap();
        let known = r#"{"x":"12345678","n":-10.5e3,"b":true,"a":{"l":[1,"z"],"id":7001 },"c":0}"#;
        for (other, id) in [
            (
                r#"{"x":"1234\"678","n":-10.5e3,"b":true,"a":{"l":[1,"z"],"id":7001 },"c":0}"#,
                "7001",
            ),
            (r#"{"x":"12345678","n":-00.5e3,"b":true,"a":{"l":[1,"z"],"id":7001 },"c":0}"#, ""),
            (r#"{"x":"12345678","n":-10.5e3,"b":trux,"a":{"l":[1,"z"],"id":7001 },"c":0}"#, ""),
            (r#"{"x":"12345678","n":-10.5e3,"b":true,"b":{"l":[1,"z"],"id":7001 },"c":0}"#, ""),
            (r#"{"x":"12345678","n":-10.5e3,"b":true,"a":{"l":[1,"z"],"ix":7001 },"c":0}"#, ""),
            (r#"{"x":"12345678","n":-10.5e3,"b":true,"a":{"id":1,"z":"id":7001 },"c":0}"#, "1"),
            (r#"{"x":"12345678","n":-10.5e3,"b":true,"a":{"l":[1,"z"],"id":70.1 },"c":0}"#, "70.1"),
            (r#"{"x":"12345678","n":-10.5e3,"b":true,"a":{"l":[1,"z"],"id":7-01 },"c":0}"#, ""),
            (r#"{"x":"12345678","n":-10.5e3,"b":true,"a":{"l":[1,"z"],"id":7001:},"c":0}"#, ""),
            (r#"{"x":"12345678","n":-10.5e3,"b":true,"a":{"l":[1,"z"],"id":7001"#, ""),
        ] {
            let mut layouts = Layouts::default();
            assert_eq!(find(&mut layouts, &pointer, known).as_deref(), Some("7001"));
            let found = find(&mut layouts, &pointer, other);
            assert_eq!(found.as_deref(), (!id.is_empty()).then_some(id), "{other}");
        }
    }

    #[test]
    fn strings_of_members_and_digits_behind_the_first_may_change() {
        for (text, may) in [
            (r#"{"id":"x{1","":"","b":"y"#, r#"{"id":"sss","":"","b":"s"#),
            (r#"{"a":0,"b":7,"c":10,"d":-25}"#, r#"{"a":0,"b":7,"c":1n,"d":-2n}"#),
            (r#"{"a":-10.5e+30,"b":1E-2}"#, r#"{"a":-1n.ne+nn,"b":1E-n}"#),
            ("{\"a\" :\t12,\r\n\"b\": \"x 1\" }", "{\"a\" :\t1n,\r\n\"b\": \"sss\" }"),
            (r#"{"a":true,"b1":null,"c":false}"#, r#"{"a":true,"b1":null,"c":false}"#),
            (r#"{"a":[12,"x1",-30],"b":"y"}"#, r#"{"a":[1n,"x1",-3n],"b":"s"}"#),
            (r#"[{"a":"x"},["y",{"b":45}],67]"#, r#"[{"a":"s"},["y",{"b":4n}],6n]"#),
        ] {
            let told = |(byte, may)| match may {
                May::Stay => char::from(byte),
                May::BeText => 's',
                May::BecomeDigit => 'n',
            };
            let told = text.bytes().zip(what_may_be(text.as_bytes())).map(told);
            assert_eq!(told.collect::<String>(), may);
        }
    }

    #[test]
    fn each_byte_may_be_what_it_may_whatever_its_neighbours_are() {
        let known = *b"\"12\\34'a5\x00\xff9\"012";
        for (at, byte) in (0..WORD).flat_map(|at| (0..=255).map(move |byte| (at, byte))) {
            let mut bytes = known;
            bytes[at] = byte;
            for (may, fits) in [
                (May::Stay, byte == known[at]),
                (May::BeText, !matches!(byte, b'"' | b'\\')),
                (May::BecomeDigit, byte.is_ascii_digit()),
            ] {
                let mut all = [May::Stay; WORD];
                all[at] = may;
                assert_eq!(Word::of(known, &all).fits(&bytes), fits, "{may:?} {byte} at {at}");
            }
        }
    }

    /// Members of all kinds, some nested.
    fn texts() -> impl Strategy<Value = String> {
        let value = prop_oneof![
            3 => "\"[a-c{}:, ]{0,12}\"",
            3 => "-?(0|[1-9][0-9]{0,12})",
            1 => "-?[1-9][0-9]?\\.[0-9]{1,3}(e-?[0-9]{1,2})?",
            1 => "true|false|null",
            1 => r#"\[("x",|-?[1-9][0-9]{0,2},){0,3}20?\]|\{"(a|id)":("y"|12),"z":[0-9]\}"#,
        ];
        let name = prop_oneof![Just("id"), Just("a"), Just("b"), Just("seq"), Just("")];
        let member = (name, value, "[ \n]{0,1}")
            .prop_map(|(name, value, space)| format!(r#""{name}":{space}{value}"#));
        prop::collection::vec(member, 1..7).prop_map(|members| format!("{{{}}}", members.join(",")))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(3000))]
        #[test]
        fn what_is_found_is_what_the_pointer_alone_finds(
            text in texts(),
            pointer in "/(id|a|b|seq|a/id|b/1)",
            changes in prop::collection::vec(
                (any::<prop::sample::Index>(), prop_oneof![
                    any::<u8>(),
                    prop::sample::select(br#"0123456789"\{}[]:,-.e ax"#.to_vec()),
                ], any::<bool>(), any::<prop::sample::Index>()),
                0..20,
            ),
        ) {
            let pointer = Pointer::parse(&pointer).unwrap();
            let mut layouts = Layouts::default();
            prop_assert_eq!(layouts.find(&pointer, text.as_bytes()), pointer.find(text.as_bytes()));
            let mut changed = text.clone().into_bytes();
            for (at, byte, again, cut) in changes {
                let at = at.index(changed.len());
                changed[at] = byte;
                prop_assert_eq!(layouts.find(&pointer, &changed), pointer.find(&changed), "{:?}", String::from_utf8_lossy(&changed));
                let part = &changed[..cut.index(changed.len())];
                prop_assert_eq!(layouts.find(&pointer, part), pointer.find(part));
                if again {
                    changed = text.clone().into_bytes();
                }
            }
        }
    }
}
