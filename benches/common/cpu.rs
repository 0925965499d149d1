//! What `/proc` knows of this process. Elsewhere than on Linux there is
//! nothing to know, and the figures are left out.

use std::collections::{BTreeMap, HashMap};
use std::fs;

/// Processor time used so far, by thread.
#[derive(Debug, Default)]
pub(crate) struct Threads(HashMap<String, (String, u64)>);

impl Threads {
    /// As of now; without the main thread, which measures.
    pub(crate) fn now() -> Self {
        let mut threads = HashMap::new();
        let main = std::process::id().to_string();
        for task in tasks().into_iter().filter(|task| *task != main) {
            let path = format!("/proc/self/task/{task}");
            let name = fs::read_to_string(format!("{path}/comm"));
            let time = fs::read_to_string(format!("{path}/schedstat"));
            if let (Ok(name), Ok(time)) = (name, time)
                && let Some(nanos) = time.split(' ').next().and_then(|n| n.parse().ok())
            {
                threads.insert(task, (role(name.trim_end()), nanos));
            }
        }
        Self(threads)
    }

    /// Nanoseconds used since `earlier`, by what threads are for.
    pub(crate) fn since(&self, earlier: &Self) -> BTreeMap<String, u64> {
        let mut used = BTreeMap::new();
        for (task, (role, nanos)) in &self.0 {
            let before = earlier.0.get(task).map_or(0, |(_, nanos)| *nanos);
            *used.entry(role.clone()).or_default() += nanos - before;
        }
        used
    }
}

/// What a thread is for. The kernel keeps 15 characters of a name.
fn role(name: &str) -> String {
    let role = match name.strip_prefix("broadsock-") {
        Some(own) if own.starts_with("conn") => "reader",
        Some(own) if own.starts_with("proc") => "processor",
        Some(own) if own.starts_with("sourc") => "source",
        Some(own) if own.starts_with("batch") => "batcher",
        Some(own) => own,
        None => name,
    };
    role.to_owned()
}

fn tasks() -> Vec<String> {
    let entries = fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

/// Threads of this process.
pub(crate) fn thread_count() -> usize {
    tasks().len()
}

/// Open descriptors of this process.
pub(crate) fn descriptors() -> usize {
    fs::read_dir("/proc/self/fd").map_or(0, |entries| entries.count().saturating_sub(1))
}

/// Resident memory of this process, in KiB.
pub(crate) fn resident() -> u64 {
    field("/proc/self/status", "VmRSS:")
}

/// How often threads of this process have gone to sleep, which is how often
/// they were woken.
pub(crate) fn sleeps() -> u64 {
    let status = |task| format!("/proc/self/task/{task}/status");
    tasks().into_iter().map(|task| field(&status(task), "voluntary_ctxt_switches:")).sum()
}

fn field(path: &str, name: &str) -> u64 {
    let text = fs::read_to_string(path).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    line.and_then(|rest| rest.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}
