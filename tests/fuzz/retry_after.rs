//! `Retry-After` of a server that refuses: any value means a wait, or nothing,
//! and whatever it means, the wait is not longer than the program allows.

use std::time::{Duration, SystemTime};

use super::Input;
use crate::error::ErrorKind;
use crate::handler::Request;
use crate::io::target::Target;
use crate::io::upgrade::Upgrade;
use crate::logic::backoff::{Backoff, Retry, retry_delay};

pub(super) const WORDS: &[&[u8]] = &[
    b"18446744073709551616",
    b"Sun, 06 Nov 1994 08:49:37 GMT",
    b"Sunday, 06-Nov-94 08:49:37 GMT",
    b"Sun Nov  6 08:49:37 1994",
    b"Fri, 31 Dec 9999 23:59:59 GMT",
    b" GMT",
    b"-",
    b".5",
];

/// The longest wait allowed.
const CAP: Duration = Duration::from_secs(300);

/// The first byte says what time it is and the second which chance is drawn; then
/// the value.
pub(super) fn run(input: &[u8]) {
    let mut input = Input(input);
    let wall = SystemTime::UNIX_EPOCH
        + input.one_of(&[0, 784_111_777, 1_700_000_000, 253_402_300_799].map(Duration::from_secs));
    let random = f64::from(input.byte()) / 256.0;
    let value = input.0;
    // A line break would end it.
    if value.iter().any(|byte| matches!(byte, b'\r' | b'\n' | 0)) {
        return;
    }
    let head = [b"HTTP/1.1 503 No\r\nRetry-After: ", value, b"\r\n\r\n"].concat();
    let target = Target::parse("ws://h/").unwrap();
    let mut upgrade = Upgrade::new(&target, &Request::new("ws://h/"), true);
    let error = upgrade.on_read(&head, wall).unwrap_err();
    let retry_after = match error.kind() {
        ErrorKind::Http { status: 503, retry_after } => *retry_after,
        // A control character.
        ErrorKind::Handshake => return,
        other => panic!("{other:?}"),
    };
    assert_eq!(retry_after, meant(value, wall), "{}", value.escape_ascii());
    let (base, max) = (Duration::from_millis(500), Duration::from_secs(30));
    let retry = Retry { attempt: 1, error: &error, uptime: Duration::ZERO };
    let delay = retry_delay(&Backoff::exponential(base, max), &retry, CAP, random);
    assert!(delay <= CAP + CAP / 10, "{delay:?}");
    assert!(delay >= retry_after.unwrap_or_default().min(CAP), "{delay:?}");
}

/// What a value means, said in another way than by the code.
fn meant(value: &[u8], wall: SystemTime) -> Option<Duration> {
    let text = std::str::from_utf8(value).ok()?.trim();
    if !text.is_empty() && text.chars().all(|c| c.is_ascii_digit()) {
        let digits = text.trim_start_matches('0');
        let seconds = digits.chars().try_fold(0_u64, |sum, digit| {
            sum.checked_mul(10)?.checked_add(u64::from(digit.to_digit(10)?))
        });
        // Beyond all bounds is as good as any time that is.
        return Some(Duration::from_secs(seconds.unwrap_or(u64::MAX / 4)));
    }
    let date = httpdate::parse_http_date(text).ok()?;
    Some(date.duration_since(wall).unwrap_or(Duration::ZERO))
}
