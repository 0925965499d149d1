//! Finding one value in a JSON text without building a tree of it.

use crate::error::Error;

/// A JSON pointer (RFC 6901), such as `/data/0/id`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Pointer {
    steps: Box<[Step]>,
}

/// What kind of value was found, so that the string `"1"` and the number `1`
/// are told apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub(crate) enum TokenKind {
    /// A string; its bytes are those between the quotes.
    String = b's',
    /// A number, as it is written.
    Number = b'n',
    /// `true` or `false`.
    Bool = b'b',
    /// An object, from brace to brace.
    Object = b'o',
    /// An array, from bracket to bracket.
    Array = b'a',
    /// `null`: met on the way, never found.
    Null = b'0',
}

/// The value at a pointer, as it stands in the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Found<'a> {
    /// What it is.
    pub(crate) kind: TokenKind,
    /// Its bytes, escapes and all; of a string, those between the quotes.
    pub(crate) raw: &'a [u8],
}

/// One reference token of a pointer.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Step {
    /// The member it names in an object.
    key: Box<str>,
    /// The element it names in an array, if it can: digits, no leading zero.
    index: Option<usize>,
}

impl Pointer {
    /// Reads a pointer such as `/data/0/id`, in which `~1` stands for `/` and
    /// `~0` for `~`.
    ///
    /// The empty pointer names the whole document and is refused: equal
    /// documents are found by content.
    pub(crate) fn parse(text: &str) -> Result<Self, Error> {
        let Some(steps) = text.strip_prefix('/') else {
            let why = format!("JSON pointer `{text}` does not start with `/`");
            return Err(Error::setting("dedup", why));
        };
        let steps = steps.split('/').map(Step::parse).collect::<Option<_>>();
        steps.map(|steps| Self { steps }).ok_or_else(|| {
            let why = format!("JSON pointer `{text}` has a `~` without 0 or 1 after it");
            Error::setting("dedup", why)
        })
    }

    /// The value that this names in a JSON text; `None` if it is absent or
    /// `null`, or if the text is malformed as far as it was read.
    ///
    /// One pass, no allocation (but for keys with escapes), no recursion. Of
    /// members with the same name the first counts. What follows the value is
    /// not read, and objects and arrays beside the path are only walked from
    /// bracket to bracket.
    pub(crate) fn find<'a>(&self, text: &'a [u8]) -> Option<Found<'a>> {
        self.locate(text).map(|(found, ..)| found)
    }

    /// The same with where the value starts, and how much of the text was read.
    pub(crate) fn locate<'a>(&self, text: &'a [u8]) -> Option<(Found<'a>, usize, usize)> {
        let mut cursor = Cursor { text, at: 0 };
        let mut close = 0;
        for step in &self.steps {
            close = cursor.enter(step)?;
        }
        let found = cursor.value()?;
        let quote = usize::from(found.kind == TokenKind::String);
        let start = cursor.at - quote - found.raw.len();
        // A number at the end of a cut text may go on in what is missing.
        cursor.ends_with(close)?;
        (found.kind != TokenKind::Null).then_some((found, start, cursor.at))
    }
}

impl Step {
    fn parse(token: &str) -> Option<Self> {
        let mut key = String::with_capacity(token.len());
        let mut chars = token.chars();
        while let Some(c) = chars.next() {
            key.push(if c == '~' { tilde(chars.next()?)? } else { c });
        }
        Some(Self { index: index(&key), key: key.into() })
    }
}

/// What `~` and this character stand for together.
fn tilde(after: char) -> Option<char> {
    match after {
        '0' => Some('~'),
        '1' => Some('/'),
        _ => None,
    }
}

/// The array index that a token is, by RFC 6901: `0`, or digits without a
/// leading zero. `-`, the element after the last, never exists.
fn index(token: &str) -> Option<usize> {
    let digits = token.bytes().all(|byte| byte.is_ascii_digit());
    let plain = token == "0" || !token.starts_with('0');
    if digits && plain { token.parse().ok() } else { None }
}

/// A place in a JSON text; each method moves past what it is named for. They are
/// a few instructions each, and calls of them as many again.
struct Cursor<'a> {
    text: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    /// Goes to the value that `step` names in the object or array here, and
    /// tells which bracket closes that.
    fn enter(&mut self, step: &Step) -> Option<u8> {
        match self.token()? {
            b'{' => self.member(&step.key).map(|()| b'}'),
            b'[' => self.element(step.index?).map(|()| b']'),
            _ => None,
        }
    }

    /// From behind the opening brace to the value of the member `key`.
    #[inline(always)]
    fn member(&mut self, key: &str) -> Option<()> {
        loop {
            self.expect(b'"')?;
            let name = self.string()?;
            self.expect(b':')?;
            if name.is(key) {
                return Some(());
            }
            self.value()?;
            self.expect(b',')?;
        }
    }

    /// From behind the opening bracket to the element number `index`.
    fn element(&mut self, index: usize) -> Option<()> {
        for _ in 0..index {
            self.value()?;
            self.expect(b',')?;
        }
        Some(())
    }

    /// Any value.
    #[inline(always)]
    fn value(&mut self) -> Option<Found<'a>> {
        match self.token()? {
            b'"' => Some(Found { kind: TokenKind::String, raw: self.string()?.raw }),
            b'{' => self.nested(TokenKind::Object),
            b'[' => self.nested(TokenKind::Array),
            b't' => self.word(TokenKind::Bool, b"true"),
            b'f' => self.word(TokenKind::Bool, b"false"),
            b'n' => self.word(TokenKind::Null, b"null"),
            b'-' | b'0'..=b'9' => self.number(),
            _ => None,
        }
    }

    /// The rest of a string behind its opening quote: what stands before the
    /// closing one.
    #[inline(always)]
    fn string(&mut self) -> Option<Text<'a>> {
        let start = self.at;
        let mut escapes = false;
        loop {
            let rest = self.text.get(self.at..)?;
            let stop = rest.iter().position(|byte| matches!(byte, b'"' | b'\\'))?;
            self.at += stop;
            if rest[stop] == b'"' {
                let raw = self.text.get(start..self.at)?;
                self.at += 1;
                return Some(Text { raw, escapes });
            }
            escapes = true;
            self.at += 2;
        }
    }

    /// The rest of an object or array behind its opening bracket. A count of
    /// what is open instead of recursion: no depth can overflow the stack.
    fn nested(&mut self, kind: TokenKind) -> Option<Found<'a>> {
        let start = self.at - 1;
        let mut open = 1usize;
        while open > 0 {
            match self.byte()? {
                b'"' => _ = self.string()?,
                b'{' | b'[' => open += 1,
                b'}' | b']' => open -= 1,
                _ => {}
            }
        }
        self.found(kind, start)
    }

    /// The rest of `true`, `false` or `null` behind its first letter.
    fn word(&mut self, kind: TokenKind, word: &[u8]) -> Option<Found<'a>> {
        let start = self.at - 1;
        self.at = start + word.len();
        self.found(kind, start).filter(|found| found.raw == word)
    }

    /// The rest of a number behind its first byte.
    #[inline(always)]
    fn number(&mut self) -> Option<Found<'a>> {
        let start = self.at - 1;
        let rest = self.text.get(start..)?;
        let digits = rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
        let part = |byte: &u8| matches!(byte, b'0'..=b'9' | b'.' | b'e' | b'E' | b'+' | b'-');
        // Most numbers are digits and nothing else, and need no second look.
        if digits > 0 && rest[0] != b'0' && !rest.get(digits).is_some_and(part) {
            self.at = start + digits;
            return self.found(TokenKind::Number, start);
        }
        self.at = start + rest.iter().take_while(|byte| part(byte)).count();
        self.found(TokenKind::Number, start).filter(|found| is_number(found.raw))
    }

    /// What stands between `start` and here.
    #[inline(always)]
    fn found(&self, kind: TokenKind, start: usize) -> Option<Found<'a>> {
        self.text.get(start..self.at).map(|raw| Found { kind, raw })
    }

    /// A comma or this closing bracket.
    fn ends_with(&mut self, close: u8) -> Option<()> {
        let byte = self.token()?;
        (byte == b',' || byte == close).then_some(())
    }

    /// This byte, after any white space.
    #[inline(always)]
    fn expect(&mut self, byte: u8) -> Option<()> {
        (self.token()? == byte).then_some(())
    }

    /// The next byte that is not white space.
    #[inline(always)]
    fn token(&mut self) -> Option<u8> {
        loop {
            let byte = self.byte()?;
            if !matches!(byte, b' ' | b'\t' | b'\n' | b'\r') {
                return Some(byte);
            }
        }
    }

    #[inline(always)]
    fn byte(&mut self) -> Option<u8> {
        let byte = *self.text.get(self.at)?;
        self.at += 1;
        Some(byte)
    }
}

/// A string as it is written, without its quotes.
#[derive(Clone, Copy)]
struct Text<'a> {
    raw: &'a [u8],
    /// Whether what it means is not what it is written as.
    escapes: bool,
}

impl Text<'_> {
    /// Whether it means `key`.
    #[inline]
    fn is(self, key: &str) -> bool {
        if self.escapes {
            unescaped(self.raw).is_some_and(|name| name == key.as_bytes())
        } else {
            self.raw == key.as_bytes()
        }
    }
}

/// The text that a raw string means; `None` on a bad escape.
fn unescaped(raw: &[u8]) -> Option<Vec<u8>> {
    let mut text = Vec::with_capacity(raw.len());
    let mut rest = raw;
    while let Some((byte, after)) = rest.split_first() {
        rest = after;
        if *byte == b'\\' {
            let c = escape(&mut rest)?;
            text.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes());
        } else {
            text.push(*byte);
        }
    }
    Some(text)
}

/// The character that an escape means, from behind its backslash.
fn escape(rest: &mut &[u8]) -> Option<char> {
    let (byte, after) = rest.split_first()?;
    *rest = after;
    match byte {
        b'"' | b'\\' | b'/' => Some(char::from(*byte)),
        b'b' => Some('\u{8}'),
        b'f' => Some('\u{c}'),
        b'n' => Some('\n'),
        b'r' => Some('\r'),
        b't' => Some('\t'),
        b'u' => code_point(rest),
        _ => None,
    }
}

/// The character of `\uXXXX`, or of the two that make a surrogate pair.
fn code_point(rest: &mut &[u8]) -> Option<char> {
    let first = hex(rest)?;
    if !(0xD800..0xDC00).contains(&first) {
        return char::from_u32(u32::from(first));
    }
    *rest = rest.strip_prefix(b"\\u")?;
    let pair = [first, hex(rest)?];
    char::decode_utf16(pair).next()?.ok()
}

/// Four hexadecimal digits.
fn hex(rest: &mut &[u8]) -> Option<u16> {
    let (digits, after) = rest.split_first_chunk::<4>()?;
    *rest = after;
    digits.iter().try_fold(0, |value, digit| {
        let digit = char::from(*digit).to_digit(16)?;
        Some(value << 4 | digit as u16)
    })
}

/// The number grammar of RFC 8259, section 6.
fn is_number(raw: &[u8]) -> bool {
    let unsigned = raw.strip_prefix(b"-").unwrap_or(raw);
    let (whole, mut rest) = digits(unsigned);
    let leads_with_zero = whole.len() > 1 && whole[0] == b'0';
    if whole.is_empty() || leads_with_zero {
        return false;
    }
    if let Some(after) = rest.strip_prefix(b".") {
        let (fraction, after) = digits(after);
        if fraction.is_empty() {
            return false;
        }
        rest = after;
    }
    rest.is_empty() || is_exponent(rest)
}

/// `e` or `E`, perhaps a sign, then digits.
fn is_exponent(raw: &[u8]) -> bool {
    let Some((b'e' | b'E', signed)) = raw.split_first() else { return false };
    let unsigned = signed.strip_prefix(b"+").or_else(|| signed.strip_prefix(b"-"));
    let (exponent, rest) = digits(unsigned.unwrap_or(signed));
    !exponent.is_empty() && rest.is_empty()
}

/// The digits at the start, and the rest.
fn digits(raw: &[u8]) -> (&[u8], &[u8]) {
    let count = raw.iter().take_while(|byte| byte.is_ascii_digit()).count();
    raw.split_at(count)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;
    use proptest::prelude::*;
    use serde_json::{Map, Value, json};

    fn find<'a>(pointer: &str, text: &'a str) -> Option<(TokenKind, &'a str)> {
        let found = Pointer::parse(pointer).unwrap().find(text.as_bytes())?;
        Some((found.kind, std::str::from_utf8(found.raw).unwrap()))
    }

    #[test]
    fn each_kind_of_value_is_found_as_it_stands() {
        let text = r#" { "s" : "a\"b" , "n":-1.50e+3,"t":true,"f":false,"z":null,
            "o":{"x":[1,"}"]},"a":[ 1 , {} ],"":0,"e":"" } "#;
        for (pointer, expected) in [
            ("/s", Some((TokenKind::String, r#"a\"b"#))),
            ("/n", Some((TokenKind::Number, "-1.50e+3"))),
            ("/t", Some((TokenKind::Bool, "true"))),
            ("/f", Some((TokenKind::Bool, "false"))),
            ("/z", None),
            ("/o", Some((TokenKind::Object, r#"{"x":[1,"}"]}"#))),
            ("/o/x/1", Some((TokenKind::String, "}"))),
            ("/a", Some((TokenKind::Array, "[ 1 , {} ]"))),
            ("/a/0", Some((TokenKind::Number, "1"))),
            ("/a/1", Some((TokenKind::Object, "{}"))),
            ("/a/1/x", None),
            ("/", Some((TokenKind::Number, "0"))),
            ("/e", Some((TokenKind::String, ""))),
            ("/absent", None),
            ("/s/0", None),
        ] {
            assert_eq!(find(pointer, text), expected, "{pointer}");
        }
    }

    #[test]
    fn a_string_and_a_number_that_look_the_same_are_told_apart() {
        let string = find("/id", r#"{"id":"1"}"#).unwrap();
        let number = find("/id", r#"{"id":1}"#).unwrap();
        assert_eq!(string.1, number.1);
        assert_ne!(string.0, number.0);
    }

    #[test]
    fn the_examples_of_rfc_6901_are_found() {
        let text = r#"{"foo":["bar","baz"],"":0,"a/b":1,"c%d":2,"e^f":3,"g|h":4,
            "i\\j":5,"k\"l":6," ":7,"m~n":8}"#;
        for (pointer, raw) in [
            ("/foo", r#"["bar","baz"]"#),
            ("/foo/0", "bar"),
            ("/", "0"),
            ("/a~1b", "1"),
            ("/c%d", "2"),
            ("/e^f", "3"),
            ("/g|h", "4"),
            ("/i\\j", "5"),
            ("/k\"l", "6"),
            ("/ ", "7"),
            ("/m~0n", "8"),
        ] {
            assert_eq!(find(pointer, text).map(|(_, raw)| raw), Some(raw), "{pointer}");
        }
    }

    #[test]
    fn array_indexes_are_plain_decimal_numbers() {
        let text = "[10,11,12,13,14,15,16,17,18,19,20]";
        assert_eq!(find("/10", text), Some((TokenKind::Number, "20")));
        for pointer in ["/11", "/00", "/01", "/-", "/+1", "/1 ", "/", "/x", "/99999999999999999999"]
        {
            assert_eq!(find(pointer, text), None, "{pointer}");
        }
        assert_eq!(find("/01", r#"{"01":1}"#), Some((TokenKind::Number, "1")), "but a key may be");
    }

    #[test]
    fn the_first_of_members_with_one_name_counts() {
        assert_eq!(find("/a", r#"{"a":1,"a":2}"#), Some((TokenKind::Number, "1")));
        assert_eq!(find("/a/b", r#"{"a":{},"a":{"b":2}}"#), None);
    }

    #[test]
    fn keys_are_compared_by_what_they_mean() {
        for (pointer, key) in [
            ("/id", r"\u0069\u0064"),
            ("/id", r"\u0069d"),
            ("/\u{e9}", r"\u00E9"),
            ("/\u{1F600}", r"\uD83D\ude00"),
            ("/\"\\~1\u{8}\u{c}\n\r\t", r#"\"\\\/\b\f\n\r\t"#),
        ] {
            let text = format!(r#"{{"other":0,"{key}":1}}"#);
            assert_eq!(find(pointer, &text), Some((TokenKind::Number, "1")), "{pointer} {key}");
        }
    }

    #[test]
    fn a_key_with_a_bad_escape_is_no_key() {
        for key in [
            r"\x",
            r"\u",
            r"\u12",
            r"\u00zz",
            r"\uD83D",
            r"\uD83Dx",
            r"\uD83D\u0041",
            r"\uD83D\u12",
        ] {
            let text = format!(r#"{{"{key}":0,"a":1}}"#);
            assert_eq!(find("/a", &text), Some((TokenKind::Number, "1")), "{key}");
            assert_eq!(unescaped(key.as_bytes()), None, "{key}");
        }
        assert_eq!(unescaped(br"\uDE00"), None, "the second half of a pair alone");
        assert_eq!(unescaped(b"\\"), None);
    }

    #[test]
    fn malformed_texts_have_no_values() {
        for text in [
            "",
            " ",
            "{",
            "[",
            r#"{"a"#,
            r#"{"a""#,
            r#"{"a":"#,
            r#"{"a" 1}"#,
            r#"{a:1}"#,
            "{1:1}",
            r#"{"a":1"#,
            r#"{"a":1]"#,
            r#"{"a":"x"#,
            r#"{"a":"x\"#,
            r#"{"a":"x\""#,
            r#"{"a":[1}"#,
            r#"{"a":tru}"#,
            r#"{"a":t"#,
            r#"{"a":True}"#,
            r#"{"a":nul}"#,
            r#"{"a":truex}"#,
            r#"{"a":trux}"#,
            r#"{"a":fals1}"#,
            r#"{"b":1 "a":1}"#,
            r#"{"b":,"a":1}"#,
            r#"{"b":?,"a":1}"#,
            r#"{,"a":1}"#,
            r#""a""#,
            "1",
            "null",
            r#"["a",1]"#,
            r#"{"a":1:"#,
        ] {
            assert_eq!(find("/a", text), None, "{text}");
        }
    }

    #[test]
    fn numbers_follow_the_grammar() {
        for good in ["0", "-0", "10", "0.5", "-1.25", "1e5", "1E+5", "0e-5", "12.5e07"] {
            assert!(is_number(good.as_bytes()), "{good}");
        }
        for bad in ["-", "01", "-01", "1.", "1.e5", ".5", "1e", "1e+", "1e5.5", "1-2", "+1", "--1"]
        {
            assert!(!is_number(bad.as_bytes()), "{bad}");
            assert_eq!(find("/a", &format!(r#"{{"a":{bad}}}"#)), None, "{bad}");
        }
    }

    #[test]
    fn a_deep_nest_is_walked_without_recursion() {
        const DEPTH: usize = 1_000_000;
        let nest = format!("{}{}", "[".repeat(DEPTH), "]".repeat(DEPTH));
        let text = format!(r#"{{"deep":{nest},"id":7}}"#);
        assert_eq!(find("/id", &text), Some((TokenKind::Number, "7")));
        assert_eq!(find("/deep", &text), Some((TokenKind::Array, nest.as_str())));
        assert_eq!(find("/id", &"[".repeat(DEPTH)), None);
        assert_eq!(find("/id", &r#"{"x":"#.repeat(DEPTH)), None);
    }

    #[test]
    fn pointers_that_are_none_are_refused_with_the_reason() {
        for (text, word) in [("", "start"), ("id", "start"), ("/a~", "~"), ("/a~2b", "~")] {
            let error = Pointer::parse(text).unwrap_err();
            assert_eq!(error.kind(), &ErrorKind::Setting("dedup"));
            assert!(error.to_string().contains(word), "{error}");
        }
    }

    /// JSON documents with keys that often meet, and strings that need escapes.
    fn documents() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            // Eighths, because serde_json may read back other fractions one bit off.
            any::<i32>().prop_map(|eighths| Value::from(f64::from(eighths) / 8.0)),
            Just(Value::from(1e30)),
            any::<String>().prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 40, 5, |inner| {
            let member = (keys(), inner.clone());
            prop_oneof![
                prop::collection::vec(inner, 0..5).prop_map(Value::from),
                prop::collection::vec(member, 0..5)
                    .prop_map(|members| Value::Object(members.into_iter().collect::<Map<_, _>>())),
            ]
        })
    }

    fn keys() -> impl Strategy<Value = String> {
        prop_oneof![
            prop::sample::select(vec!["a", "b", "0", "1", "", "~", "/", "\"", "\\", "\u{1F600}"])
                .prop_map(String::from),
            any::<String>(),
        ]
    }

    /// A pointer that follows `choices` into `document` as far as it goes.
    fn path(document: &Value, choices: &[prop::sample::Index]) -> String {
        let (mut here, mut pointer) = (document, String::new());
        for choice in choices {
            let (token, next) = match here {
                Value::Array(items) if !items.is_empty() => {
                    let at = choice.index(items.len());
                    (at.to_string(), &items[at])
                }
                Value::Object(members) if !members.is_empty() => {
                    let (key, value) = members.iter().nth(choice.index(members.len())).unwrap();
                    (key.replace('~', "~0").replace('/', "~1"), value)
                }
                _ => break,
            };
            pointer = format!("{pointer}/{token}");
            here = next;
        }
        pointer
    }

    /// Checks what was found in `text` against the value in the tree.
    fn same(found: Option<Found<'_>>, expected: Option<&Value>) -> bool {
        let Some(expected) = expected.filter(|value| !value.is_null()) else {
            return found.is_none();
        };
        let Some(Found { kind, raw }) = found else { return false };
        let raw = std::str::from_utf8(raw).unwrap();
        let (value, right) = match kind {
            TokenKind::String => (format!("\"{raw}\""), expected.is_string()),
            TokenKind::Number => (raw.to_owned(), expected.is_number()),
            TokenKind::Bool => (raw.to_owned(), expected.is_boolean()),
            TokenKind::Object => (raw.to_owned(), expected.is_object()),
            TokenKind::Array => (raw.to_owned(), expected.is_array()),
            TokenKind::Null => return false,
        };
        right && serde_json::from_str::<Value>(&value).unwrap() == *expected
    }

    /// Writes every character of every string as `\uXXXX`.
    fn escaped(value: &Value) -> String {
        let string = |text: &str| {
            let units: String = text.encode_utf16().map(|unit| format!("\\u{unit:04x}")).collect();
            format!("\"{units}\"")
        };
        let join = |parts: Vec<String>| parts.join(" ,\n");
        match value {
            Value::String(text) => string(text),
            Value::Array(items) => format!("[ {} ]", join(items.iter().map(escaped).collect())),
            Value::Object(members) => {
                let member = |(key, value): (&String, &Value)| {
                    format!("{} :\t{}", string(key), escaped(value))
                };
                format!("{{\r{} }}", join(members.iter().map(member).collect()))
            }
            other => other.to_string(),
        }
    }

    #[test]
    fn the_reference_and_this_agree_on_a_plain_document() {
        let document = json!({"a": [1, {"b": "x"}], "c": null});
        for pointer in ["/a/1/b", "/a", "/c", "/d"] {
            let text = document.to_string();
            let found = Pointer::parse(pointer).unwrap().find(text.as_bytes());
            assert!(same(found, document.pointer(pointer)), "{pointer}");
        }
    }

    proptest! {
        #[test]
        fn what_serde_json_finds_in_a_tree_is_found_in_the_text(
            document in documents(),
            choices in prop::collection::vec(any::<prop::sample::Index>(), 1..5),
            other in "(/[ab01~/]{0,2}){1,3}",
        ) {
            for pointer in [path(&document, &choices), other] {
                let Ok(parsed) = Pointer::parse(&pointer) else { continue };
                let expected = document.pointer(&pointer);
                for text in [
                    document.to_string(),
                    serde_json::to_string_pretty(&document).unwrap(),
                    escaped(&document),
                ] {
                    prop_assert!(same(parsed.find(text.as_bytes()), expected), "{} {}", pointer, text);
                }
            }
        }

        #[test]
        fn a_cut_text_has_the_same_value_or_none(
            document in documents(),
            choices in prop::collection::vec(any::<prop::sample::Index>(), 1..5),
            cut: prop::sample::Index,
        ) {
            let Ok(pointer) = Pointer::parse(&path(&document, &choices)) else { return Ok(()) };
            let text = document.to_string();
            let whole = pointer.find(text.as_bytes());
            let part = pointer.find(&text.as_bytes()[..cut.index(text.len())]);
            prop_assert!(part.is_none() || part == whole, "{:?} {:?}", part, whole);
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes: Vec<u8>, pointer in "(/[a-c0-9]{0,2}){1,3}") {
            let _ = Pointer::parse(&pointer).unwrap().find(&bytes);
        }

        #[test]
        fn almost_json_never_panics(
            text in r#"[\[\]{}":,\\/ abtruefalsn0123456789.eE+\-]{0,40}"#,
            pointer in "(/[ab01]{0,1}){1,3}",
        ) {
            let _ = Pointer::parse(&pointer).unwrap().find(text.as_bytes());
        }

        #[test]
        fn any_text_is_a_pointer_or_an_error(text: String) {
            let _ = Pointer::parse(&text);
            let _ = Pointer::parse(&format!("/{text}"));
        }
    }
}
