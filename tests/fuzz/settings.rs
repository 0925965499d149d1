//! Settings: each is refused by an error that names it, or the client or pipeline
//! runs with it and ends in time with its books in order.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

use super::Input;
use crate::error::{Error, ErrorKind};
use crate::io::clock::Clock;
use crate::testing::{Script, Server};
use crate::{
    Backoff, Batch, Batching, Client, ClientBuilder, Dedup, Failure, Handler, Intensity, Jitter,
    Message, Next, Overflow, Pipeline, PipelineBuilder, RateLimit, Request, WhileDown, sources,
};

pub(super) const WORDS: &[&[u8]] = &[b"ws://127.0.0.1:1/", b"wss://", b"/id", b"~", b"a: b", b"\0"];

/// How long a close or stop may take; on a busy machine, much longer than asked.
const DEADLINE: Duration = Duration::from_secs(3);
const SLACK: Duration = Duration::from_secs(20);

/// What ended before the deadline has left no thread; at the deadline, one may
/// only have had no turn.
fn ended_in_time(begun: Instant, stuck: &[String]) {
    let took = Clock::real().now() - begun;
    assert!(took < DEADLINE + SLACK, "{took:?}");
    assert!(took > DEADLINE - DEADLINE / 4 || stuck.is_empty(), "{stuck:?} after {took:?}");
}

/// Each setting is a byte for which one it is, and bytes for its value.
pub(super) fn client(input: &[u8]) {
    let mut input = Input(input);
    let mut builder = Client::builder(server().url()).header("X-A", "1");
    while !input.is_empty() {
        builder = set(builder, &mut input);
    }
    let client = match builder.start() {
        Ok(client) => client,
        Err(error) => return refused(&error),
    };
    let events = client.events();
    // Not all of them can: a message may be larger than allowed.
    let _ = client.sender().try_send("hello");
    let _ = client.recv_timeout(Duration::from_millis(3));
    let begun = Clock::real().now();
    let report = client.close(DEADLINE);
    ended_in_time(begun, &report.stuck);
    assert!(report.metrics.ledger.balanced(), "{}", report.metrics.ledger);
    for event in events.try_iter() {
        // Also that of a thread which supervision has started again.
        assert!(!event.to_string().contains("panicked"), "{event}");
    }
}

fn set(builder: ClientBuilder, input: &mut Input<'_>) -> ClientBuilder {
    match input.byte() % 28 {
        0 => builder.endpoint(Request::new(text(input))),
        1 => builder.header(text(input), text(input)),
        2 => builder.subprotocol(text(input)),
        3 => builder.connect_timeout(time(input)),
        4 => builder.redirect_limit(number(input) as u32),
        5 => builder.backoff(backoff(input)),
        6 => builder.stable_after(time(input)),
        7 => builder.retry_after_max(time(input)),
        8 => builder.max_attempts(number(input) as u32),
        9 => builder.max_reconnect_attempts(number(input) as u32),
        10 => builder.ping_interval(time(input)),
        11 => builder.ping_interval(None),
        12 => builder.pong_timeout(time(input)),
        13 => builder.idle_timeout(time(input)),
        14 => builder.write_timeout(time(input)),
        15 => builder.max_message_size(number(input)),
        16 => builder.read_buffer_size(number(input)),
        17 => builder.queue(number(input)),
        18 => builder.queue_bytes(number(input)),
        19 => builder.overflow(input.one_of(&[
            Overflow::Block,
            Overflow::DropOldest,
            Overflow::DropNewest,
            Overflow::Disconnect,
        ])),
        20 => builder.dedup(dedup(input)),
        21 => builder.outbox(number(input)),
        22 => builder.outbox_bytes(number(input)),
        23 => builder.while_down(input.one_of(&[
            WhileDown::Queue,
            WhileDown::Reject,
            WhileDown::Wait,
        ])),
        24 => builder.opening_message(text(input)),
        25 => builder.close_timeout(time(input)),
        26 => builder.restart_intensity(intensity(input)),
        _ => root_certificate(builder, text(input)),
    }
}

#[cfg(feature = "tls")]
fn root_certificate(builder: ClientBuilder, text: String) -> ClientBuilder {
    builder.root_certificate(text)
}

#[cfg(not(feature = "tls"))]
fn root_certificate(builder: ClientBuilder, _: String) -> ClientBuilder {
    builder
}

pub(super) fn pipeline(input: &[u8]) {
    let mut input = Input(input);
    let mut builder = Pipeline::builder(Work).source(sources::iter(["1", "2", "x"])).processors(1);
    while !input.is_empty() {
        builder = arrange(builder, &mut input);
    }
    let pipeline = match builder.start() {
        Ok(pipeline) => pipeline,
        Err(error) => return refused(&error),
    };
    let begun = Clock::real().now();
    let report = pipeline.stop(DEADLINE);
    ended_in_time(begun, &report.stuck);
    assert!(report.ledger.balanced(), "{}", report.ledger);
    assert_eq!(report.returned.len() as u64, report.ledger.returned);
    // What the handler fails for is no reason for the pipeline to fail.
    assert!(report.error.is_none(), "{:?}", report.error);
}

/// Sends numbers into the batcher `a`, of which there may be none.
struct Work;

impl Handler for Work {
    type Item = u32;

    fn handle_message(&self, message: &Message) -> Result<Next<u32>, Failure> {
        Ok(Next::to("a", message.text().unwrap_or_default().parse()?))
    }

    fn handle_batch(&self, batch: &mut Batch<u32>) -> Result<(), Failure> {
        assert!(batch.items().count() > 0, "a batch is never empty");
        Ok(())
    }
}

fn arrange(builder: PipelineBuilder<Work>, input: &mut Input<'_>) -> PipelineBuilder<Work> {
    match input.byte() % 12 {
        0 => builder.source(sources::iter([text(input)])),
        1 => builder.processors(threads(input)),
        2 => builder.partition_by(|message| message.as_bytes().len() as u64),
        3 => builder.queue(number(input)),
        4 => builder.chunk(number(input)),
        5 => builder.max_in_flight(number(input)),
        6 => builder.batcher(input.one_of(&["a", "b", "", "\0", "processors"]), batching(input)),
        7 => builder.retries(number(input) as u32, backoff(input)),
        8 => builder.hold_order(),
        9 => builder.rate_limit(rate_limit(input)),
        10 => builder.handler_timeout(time(input)),
        _ => builder.restart_intensity(intensity(input)),
    }
}

fn batching(input: &mut Input<'_>) -> Batching<u32> {
    let batching = Batching::new().timeout(time(input)).concurrency(threads(input));
    let batching = batching.max_keys(number(input));
    match input.byte() % 2 {
        0 => batching.size(number(input)),
        _ => {
            let weight = number(input);
            batching.size_by(number(input), move |_| weight)
        }
    }
}

fn rate_limit(input: &mut Input<'_>) -> RateLimit {
    match input.byte() % 2 {
        0 => RateLimit::token_bucket(
            input.one_of(&[0.0, -1.0, f64::NAN, f64::INFINITY, f64::MIN_POSITIVE, 0.1, 1e3, 1e300]),
            number(input) as u32,
        ),
        _ => RateLimit::fixed_window(number(input) as u32, time(input)),
    }
}

fn backoff(input: &mut Input<'_>) -> Backoff {
    match input.byte() % 4 {
        0 => Backoff::exponential(time(input), time(input)),
        1 => Backoff::exponential(time(input), time(input)).with_jitter(input.one_of(&[
            Jitter::Equal,
            Jitter::Full,
            Jitter::None,
        ])),
        2 => Backoff::linear(time(input), number(input) as u32),
        _ => Backoff::constant(time(input)),
    }
}

fn dedup(input: &mut Input<'_>) -> Dedup {
    let dedup = match input.byte() % 4 {
        0 => Dedup::by_content(),
        1 => Dedup::by_session(),
        2 => Dedup::by(|_| Some("same")),
        _ => Dedup::by_pointer(text(input)),
    };
    match input.byte() % 2 {
        0 => dedup.capacity(number(input)),
        _ => dedup.expire_after(time(input)),
    }
}

fn intensity(input: &mut Input<'_>) -> Intensity {
    Intensity { restarts: input.one_of(&[0, 1, 3, u32::MAX]), within: time(input) }
}

/// Zero, the smallest, the usual, and more than there is.
fn time(input: &mut Input<'_>) -> Duration {
    input.one_of(&[
        Duration::ZERO,
        Duration::from_nanos(1),
        Duration::from_millis(1),
        Duration::from_millis(20),
        Duration::from_secs(10),
        Duration::from_secs(u64::from(u32::MAX)),
        Duration::from_secs(u64::MAX),
        Duration::MAX,
    ])
}

/// The edges; what lies between the large ones takes memory and shows nothing.
fn number(input: &mut Input<'_>) -> usize {
    let edge =
        input.one_of(&[0, 1, 2, 1023, 1024, 4096, (1 << 30) + 1, usize::MAX / 2, usize::MAX]);
    edge.max(usize::from(edge == 2) * usize::from(input.byte()))
}

fn threads(input: &mut Input<'_>) -> usize {
    input.one_of(&[0, 1, 2, 5, 4097, usize::MAX])
}

/// Anything, up to a line break.
fn text(input: &mut Input<'_>) -> String {
    let end = input.0.iter().position(|byte| *byte == b'\n').unwrap_or(input.0.len());
    let text = input.take(end);
    input.take(1);
    String::from_utf8_lossy(text).into_owned()
}

/// The error names the setting.
fn refused(error: &Error) {
    let named = matches!(error.kind(), ErrorKind::Setting(_) | ErrorKind::Url | ErrorKind::Tls);
    assert!(named && !error.to_string().is_empty(), "{:?}: {}", error.kind(), error.chain());
}

/// One server for all runs.
fn server() -> &'static Server {
    static SERVER: OnceLock<Server> = OnceLock::new();
    SERVER.get_or_init(|| {
        let script = Script::new().upgrade().send("a").send("a").echo();
        Server::script([script]).keep_received(0).start().unwrap()
    })
}
