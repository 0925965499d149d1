//! Processes of one bench: its own program once more, in another role.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child as Process, ChildStdin, ChildStdout, Command, Stdio};

const ROLE: &str = "BROADSOCK_BENCH_ROLE";

/// The role this process was started in; `None`: it is the bench itself.
pub(crate) fn role() -> Option<String> {
    std::env::var(ROLE).ok()
}

/// Lets `command`, which runs this program, run it in `role`.
pub(crate) fn in_role<'c>(command: &'c mut Command, role: &str) -> &'c mut Command {
    command.env(ROLE, role)
}

/// A child process that is talked to by lines. It ends when it is dropped, and
/// by itself when its parent is gone.
#[derive(Debug)]
pub(crate) struct Child {
    process: Process,
    stdin: Option<ChildStdin>,
    lines: BufReader<ChildStdout>,
}

impl Child {
    /// Starts this program in `role`.
    pub(crate) fn start(role: &str) -> Self {
        let program = std::env::current_exe().expect("a program knows where it is");
        Self::run(Command::new(program), role)
    }

    /// The same, with as many descriptors as the system allows.
    pub(crate) fn start_wide(role: &str) -> Self {
        let program = std::env::current_exe().expect("a program knows where it is");
        let mut shell = Command::new("sh");
        shell.args(["-c", r#"ulimit -n "$(ulimit -H -n)" 2>/dev/null; exec "$0""#]).arg(program);
        Self::run(shell, role)
    }

    fn run(mut command: Command, role: &str) -> Self {
        let mut process = command
            .env(ROLE, role)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("a child process starts");
        let stdin = process.stdin.take();
        let lines = BufReader::new(process.stdout.take().expect("it is piped"));
        Self { process, stdin, lines }
    }

    /// Its next line.
    pub(crate) fn line(&mut self) -> String {
        let mut line = String::new();
        let read = self.lines.read_line(&mut line).expect("a child's output is text");
        assert!(read > 0, "the child process ended early");
        line.trim_end().to_owned()
    }

    /// Says a line to it.
    pub(crate) fn say(&mut self, line: &str) {
        let stdin = self.stdin.as_mut().expect("open until it is dropped");
        writeln!(stdin, "{line}").expect("the child process listens");
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        self.stdin.take();
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// In a child: says a line to the parent.
pub(crate) fn tell(line: &str) {
    let mut out = std::io::stdout().lock();
    if writeln!(out, "{line}").and_then(|()| out.flush()).is_err() {
        std::process::exit(1);
    }
}

/// In a child: each line of the parent; ends the process when it is gone.
pub(crate) fn obey(mut each: impl FnMut(&str)) -> ! {
    for line in std::io::stdin().lines() {
        match line {
            Ok(line) => each(&line),
            Err(_) => break,
        }
    }
    std::process::exit(0)
}
