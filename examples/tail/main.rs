//! `tail -f` for WebSockets: prints the messages of feeds, one a line, and
//! stays connected, until it has what was asked for or Ctrl-C.
//!
//! ```text
//! cargo run --example tail -- --events --report wss://feed.example/stream
//! cargo run --example tail -- --help
//! ```
//!
//! `options.rs` reads the command line, `report.rs` writes to stderr; here is
//! what the program does.

#![allow(clippy::disallowed_methods, reason = "it runs in real time")]

mod options;
mod report;

use std::convert::Infallible;
use std::error::Error;
use std::io::{self, BufWriter, ErrorKind, IsTerminal, Write};
use std::process::{self, ExitCode};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use broadsock::crossbeam_channel::{Receiver, TryRecvError, after, bounded, never, select};
use broadsock::{Client, Message};

use options::{Command, Options};
use report::say;

/// How long the close handshakes may take.
const CLOSE: Duration = Duration::from_secs(2);

/// How long the last line may take to leave: whoever reads stdout may have stopped.
const LAST_LINE: Duration = Duration::from_secs(1);

/// Why no further message is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// `--max-messages` is reached, or nobody reads stdout any more.
    Enough,
    /// `--duration` is over, or a signal came.
    Asked,
    /// There are no more: the client has failed.
    NoMore,
}

fn main() -> ExitCode {
    match options::parse(lexopt::Parser::from_env()) {
        Ok(Command::Help) => {
            let _ = io::stdout().write_all(options::HELP.as_bytes());
            ExitCode::SUCCESS
        }
        Ok(Command::Run(options)) => run(*options).unwrap_or_else(|error| {
            say(format_args!("tail: {error}"));
            ExitCode::FAILURE
        }),
        Err(usage) => wrong_usage(&usage),
    }
}

fn wrong_usage(what: &dyn Error) -> ExitCode {
    say(format_args!("tail: {what}\nTry `tail --help` for what it takes."));
    ExitCode::from(2)
}

fn run(mut options: Options) -> Result<ExitCode, Box<dyn Error>> {
    let start = Instant::now();
    if let Some(filter) = &options.log {
        env_logger::Builder::new().parse_filters(filter).init();
    }
    if options.events {
        options.client = options.client.observer(move |event| say(report::event(event, start)));
    }
    let signals = signals()?;
    let client = match options.client.clone().start() {
        Ok(client) => Arc::new(client),
        Err(error) if is_usage(&error) => return Ok(wrong_usage(&error)),
        Err(error) => return Err(error.into()),
    };

    let deadline = options.duration.map_or_else(never, after);
    let show_report = options.report;
    let (stop, stopped) = bounded::<Infallible>(0);
    let printed = start_printer(Arc::clone(&client), options, stopped)?;
    let mut end = select! {
        recv(signals) -> _ => Ok(End::Asked),
        recv(deadline) -> _ => Ok(End::Asked),
        recv(printed) -> end => end?,
    };
    // Ends the printer, wherever it waits; only then the counters stand still.
    drop(stop);
    client.close(CLOSE);
    if let Ok(End::Asked) = end
        && let Ok(Err(error)) = printed.recv_timeout(LAST_LINE)
    {
        end = Err(error);
    }
    let (metrics, error) = (client.metrics(), client.error());
    // Dropped first, for it may have something to log: the report comes last.
    drop(client);
    let status = exit_status(&end, error.as_ref());
    if show_report {
        say(report::report(&metrics, error.as_ref()));
    }
    Ok(status)
}

/// Whether the client was refused for what the command line says.
fn is_usage(error: &broadsock::Error) -> bool {
    matches!(error.kind(), broadsock::ErrorKind::Setting(_) | broadsock::ErrorKind::Url)
}

fn exit_status(end: &io::Result<End>, error: Option<&broadsock::Error>) -> ExitCode {
    match (end, error) {
        (Err(error), _) => say(format_args!("tail: cannot write to stdout: {error}")),
        (Ok(End::Enough), _) | (_, None) => return ExitCode::SUCCESS,
        (_, Some(error)) => say(format_args!("tail: {}", error.chain())),
    }
    ExitCode::FAILURE
}

/// Starts the thread that prints. It ends after `stopped` is disconnected.
fn start_printer(
    client: Arc<Client>,
    options: Options,
    stopped: Receiver<Infallible>,
) -> io::Result<Receiver<io::Result<End>>> {
    let (done, printed) = bounded(1);
    thread::Builder::new().name("printer".to_owned()).spawn(move || {
        let end = match print(&client, &options, &stopped) {
            // `tail URL | head`: that is an end as asked.
            Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(End::Enough),
            end => end,
        };
        // So that the client is dropped by `main`, after the report's counters.
        drop(client);
        let _ = done.send(end);
    })?;
    Ok(printed)
}

fn print(client: &Client, options: &Options, stopped: &Receiver<Infallible>) -> io::Result<End> {
    let stdout = io::stdout().lock();
    // Somebody who watches, or who measures by `--work-ms`, sees each line at once.
    let at_once = stdout.is_terminal() || !options.work.is_zero();
    let mut out = BufWriter::new(stdout);
    let mut left = options.max_messages;
    loop {
        if left == Some(0) {
            return out.flush().map(|()| End::Enough);
        }
        if stopped.try_recv() == Err(TryRecvError::Disconnected) {
            return out.flush().map(|()| End::Asked);
        }
        let Some(message) = next(client, &mut out)? else { return Ok(End::NoMore) };
        print_line(&mut out, &message)?;
        left = left.map(|left| left - 1);
        if at_once {
            out.flush()?;
        }
        if !options.work.is_zero() {
            // The work that each message takes, cut short by the end.
            let _ = stopped.recv_timeout(options.work);
        }
    }
}

/// The next message. Nothing is left in the buffer while it waits for one.
fn next(client: &Client, out: &mut impl Write) -> io::Result<Option<Message>> {
    if let Ok(message) = client.try_recv() {
        return Ok(Some(message));
    }
    out.flush()?;
    Ok(client.recv().ok())
}

fn print_line(out: &mut impl Write, message: &Message) -> io::Result<()> {
    match message.text() {
        Some(text) if text.contains(['\n', '\r']) => {
            writeln!(out, "{}", text.replace(['\n', '\r'], " "))
        }
        Some(text) => {
            out.write_all(text.as_bytes())?;
            out.write_all(b"\n")
        }
        None => writeln!(out, "{message}"),
    }
}

/// Yields when SIGINT (Ctrl-C) or SIGTERM comes. The second one is for those
/// who do not want to wait for the end: it is immediate.
#[cfg(unix)]
fn signals() -> io::Result<Receiver<()>> {
    use signal_hook::consts::{SIGINT, SIGTERM};

    let mut signals = signal_hook::iterator::Signals::new([SIGINT, SIGTERM])?;
    let (send, receive) = bounded(1);
    thread::Builder::new().name("signals".to_owned()).spawn(move || {
        for (earlier, signal) in signals.forever().enumerate() {
            if earlier > 0 {
                process::exit(128 + signal);
            }
            let _ = send.send(());
        }
    })?;
    Ok(receive)
}

#[cfg(not(unix))]
fn signals() -> io::Result<Receiver<()>> {
    Ok(never())
}
