//! The command line: what it says, and what a client makes of it.

use std::error::Error;
use std::fmt;
use std::fs;
use std::str::FromStr;
use std::time::Duration;

use broadsock::{Backoff, BoxError, Client, ClientBuilder, Dedup, Link, Session};
use lexopt::{Arg, Parser, ValueExt};

pub(crate) const HELP: &str = "\
tail -f for WebSockets: prints the messages of feeds, one a line, and stays connected.

Usage: tail [OPTIONS] URL...

Several URLs make one connection each; their messages come out together. A line
break within a message is printed as a space, a binary message as its length.

What is said to the server:
  --header 'NAME: VALUE'   adds a header to the upgrade request; repeatable
  --subprotocol NAME       offers a subprotocol; repeatable
  --send TEXT              sends this first on every connection; repeatable
  --ca FILE                trusts the root certificate in FILE (PEM or DER) as well

Messages that come twice:
  --id POINTER             drops repeats by the id at this JSON pointer, such as /id
  --dedup-content          drops repeats by the whole message

Staying connected (S is in seconds, fractions allowed):
  --connect-timeout S      deadline of one attempt, all steps together   [10]
  --ping-interval S        pings after so long a silence                 [20]
  --pong-timeout S         gives up on the server so long after a ping   [20]
  --idle-timeout S         reconnects after so long without a message    [off]
  --backoff-base S         delay before the first retry, doubling...     [0.5]
  --backoff-max S          ...up to this                                 [30]
  --stable-after S         a connection this old starts the delays over  [10]
  --max-attempts N         fails after N failed attempts in a row        [no limit]

When messages come faster than they are consumed:
  --queue N                how many messages may wait                   [16384]
  --overflow POLICY        when they are more: block, drop-oldest, drop-newest
                           or disconnect                                 [block]
  --work-ms N              pretends that each message takes N ms to consume

When to end (Ctrl-C always ends, and closes the connections properly):
  --max-messages N         after N messages
  --duration S             after S seconds

What is told on stderr:
  --events                 what happens, one JSON object a line
  --report                 the counters at the end, as one JSON object
  --log FILTER             the library's log, such as debug or broadsock=trace
  -h, --help               this text, on stdout

Exit status: 0 ended as asked, 1 failed, 2 the command line is wrong.
";

/// What the command line asks for.
pub(crate) enum Command {
    Help,
    Run(Box<Options>),
}

/// A complete command line.
pub(crate) struct Options {
    pub(crate) client: ClientBuilder,
    pub(crate) work: Duration,
    pub(crate) max_messages: Option<u64>,
    pub(crate) duration: Option<Duration>,
    pub(crate) events: bool,
    pub(crate) report: bool,
    pub(crate) log: Option<String>,
}

/// What is wrong with a command line.
#[derive(Debug)]
pub(crate) struct Usage(String);

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Error for Usage {}

impl From<lexopt::Error> for Usage {
    fn from(error: lexopt::Error) -> Self {
        Self(error.to_string())
    }
}

/// What was read so far.
struct Reader {
    options: Options,
    urls: usize,
    sends: Vec<String>,
    base: Option<Duration>,
    max: Option<Duration>,
    dedup: Option<Dedup>,
}

pub(crate) fn parse(mut parser: Parser) -> Result<Command, Usage> {
    let mut reader = Reader::new();
    while let Some(argument) = parser.next()? {
        match argument {
            Arg::Short('h') | Arg::Long("help") => return Ok(Command::Help),
            Arg::Value(url) => reader.add_url(url.string()?),
            Arg::Long(name) => {
                let name = name.to_owned();
                reader = reader.option(&name, &mut parser)?;
            }
            other @ Arg::Short(_) => return Err(other.unexpected().into()),
        }
    }
    reader.finish().map(|options| Command::Run(Box::new(options)))
}

impl Reader {
    fn new() -> Self {
        let options = Options {
            client: Client::unconnected(),
            work: Duration::ZERO,
            max_messages: None,
            duration: None,
            events: false,
            report: false,
            log: None,
        };
        Self { options, urls: 0, sends: Vec::new(), base: None, max: None, dedup: None }
    }

    fn add_url(&mut self, url: String) {
        let client = std::mem::replace(&mut self.options.client, Client::unconnected());
        self.options.client = client.endpoint(url);
        self.urls += 1;
    }

    /// Options of this program; those of the client are left to it.
    fn option(mut self, name: &str, parser: &mut Parser) -> Result<Self, Usage> {
        let options = &mut self.options;
        match name {
            "send" => self.sends.push(parser.value()?.string()?),
            "id" => self.set_dedup(Dedup::by_pointer(parser.value()?.string()?))?,
            "dedup-content" => self.set_dedup(Dedup::by_content())?,
            "backoff-base" => self.base = Some(seconds(name, parser)?),
            "backoff-max" => self.max = Some(seconds(name, parser)?),
            "work-ms" => options.work = Duration::from_millis(number(name, parser)?),
            "max-messages" => options.max_messages = Some(number(name, parser)?),
            "duration" => options.duration = Some(seconds(name, parser)?),
            "events" => options.events = true,
            "report" => options.report = true,
            "log" => options.log = Some(parser.value()?.string()?),
            _ => self.options.client = of_client(self.options.client, name, parser)?,
        }
        Ok(self)
    }

    fn set_dedup(&mut self, dedup: Dedup) -> Result<(), Usage> {
        match self.dedup.replace(dedup) {
            Some(_) => Err(Usage("--id and --dedup-content: give one of them, once".to_owned())),
            None => Ok(()),
        }
    }

    fn finish(mut self) -> Result<Options, Usage> {
        if self.urls == 0 {
            return Err(Usage("there is no URL".to_owned()));
        }
        let mut client = self.options.client;
        if self.base.is_some() || self.max.is_some() {
            client = client.backoff(backoff(self.base, self.max));
        }
        if let Some(dedup) = self.dedup {
            client = client.dedup(dedup);
        }
        if !self.sends.is_empty() {
            client = client.session(move || Opening { sends: self.sends.clone() });
        }
        self.options.client = client;
        Ok(self.options)
    }
}

/// Options that are the client's settings, under the same names.
fn of_client(
    client: ClientBuilder,
    name: &str,
    parser: &mut Parser,
) -> Result<ClientBuilder, Usage> {
    Ok(match name {
        "header" => {
            let text = parser.value()?.string()?;
            let (name, value) = header(&text)?;
            client.header(name, value)
        }
        "subprotocol" => client.subprotocol(parser.value()?.string()?),
        "ca" => client.root_certificate(file(name, parser)?),
        "connect-timeout" => client.connect_timeout(seconds(name, parser)?),
        "ping-interval" => client.ping_interval(seconds(name, parser)?),
        "pong-timeout" => client.pong_timeout(seconds(name, parser)?),
        "idle-timeout" => client.idle_timeout(seconds(name, parser)?),
        "stable-after" => client.stable_after(seconds(name, parser)?),
        "max-attempts" => {
            let attempts: u32 = number(name, parser)?;
            client.max_attempts(attempts).max_reconnect_attempts(attempts)
        }
        "queue" => client.queue(number(name, parser)?),
        "overflow" => client.overflow(read(parser)?),
        _ => return Err(Arg::Long(name).unexpected().into()),
    })
}

/// One of the two may stand alone: then the other one's default gives way.
fn backoff(base: Option<Duration>, max: Option<Duration>) -> Backoff {
    let (usual_base, usual_max) = (Duration::from_millis(500), Duration::from_secs(30));
    let longest = max.unwrap_or_else(|| base.map_or(usual_max, |base| base.max(usual_max)));
    Backoff::exponential(base.unwrap_or_else(|| usual_base.min(longest)), longest)
}

/// The value is a secret more often than not: no error repeats it.
fn header(text: &str) -> Result<(&str, &str), Usage> {
    let parts = text.split_once(':').map(|(name, value)| (name.trim(), value.trim()));
    parts.ok_or_else(|| Usage("--header: this takes the form 'NAME: VALUE'".to_owned()))
}

fn file(option: &str, parser: &mut Parser) -> Result<Vec<u8>, Usage> {
    let path = parser.value()?;
    let failed = |error| Usage(format!("--{option}: {}: {error}", path.to_string_lossy()));
    fs::read(&path).map_err(failed)
}

fn seconds(option: &str, parser: &mut Parser) -> Result<Duration, Usage> {
    let text = parser.value()?.string()?;
    let seconds = text.parse().ok();
    seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok()).ok_or_else(|| {
        Usage(format!("--{option}: `{text}` is not a number of seconds, such as 20 or 0.5"))
    })
}

fn number<T: FromStr>(option: &str, parser: &mut Parser) -> Result<T, Usage> {
    let text = parser.value()?.string()?;
    text.parse().map_err(|_| Usage(format!("--{option}: `{text}` is not a number from 0 up")))
}

/// A value whose type says itself what is wrong with it.
fn read<T: FromStr<Err: fmt::Display>>(parser: &mut Parser) -> Result<T, Usage> {
    parser.value()?.string()?.parse().map_err(|error: T::Err| Usage(error.to_string()))
}

/// Sends the opening messages on each connection and passes everything on.
struct Opening {
    sends: Vec<String>,
}

impl Session for Opening {
    fn on_open(&mut self, link: &mut Link<'_>) -> Result<(), BoxError> {
        self.sends.iter().for_each(|text| link.send(text.as_str()));
        Ok(())
    }
}
