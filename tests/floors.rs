//! The layout holds: imports only go down, and `logic/` decides without touching
//! the world.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs;
use std::path::{Path, PathBuf};

/// Each top-level module of `src/` and its floor.
const FLOORS: [(&str, u32); 19] = [
    ("acknowledger", 4),
    ("block", 0),
    ("message", 0),
    ("work", 0),
    ("error", 0),
    ("event", 0),
    ("metrics", 0),
    ("handler", 0),
    ("logic", 1),
    ("io", 1),
    ("threads", 2),
    ("config", 3),
    ("pipeline", 3),
    ("client", 4),
    ("sender", 4),
    ("testing", 4),
    ("manual", 4),
    ("lib", 4),
    ("sources", 4),
];

/// What pure logic must not name.
const WORLD: [&str; 12] = [
    "Instant::now",
    "SystemTime",
    "std::thread",
    "std::net",
    "std::io::",
    "std::sync::mpsc",
    "crossbeam",
    "mio::",
    "rand::",
    "log::",
    "tungstenite",
    "native_tls",
];

#[test]
fn imports_only_go_down() {
    let mut seen = 0;
    for (path, code) in sources() {
        let own = module_of(&path);
        for target in imports(&code) {
            let (from, to) = (floor(&own), floor(&target));
            let sibling = from == to && !(from == 1 && own != target);
            assert!(to < from || sibling, "{} imports {target} ({from} -> {to})", path.display());
            seen += 1;
        }
    }
    assert!(seen > 50, "the test no longer finds imports");
}

#[test]
fn logic_names_no_clock_thread_socket_channel_chance_or_logger() {
    let mut files = 0;
    for (path, code) in sources().into_iter().filter(|(path, _)| module_of(path) == "logic") {
        files += 1;
        for line in code.lines().filter(|line| !line.trim_start().starts_with("//")) {
            for name in WORLD {
                assert!(!line.contains(name), "{} names {name}: {line}", path.display());
            }
        }
    }
    assert!(files > 5, "the test no longer finds logic/");
}

/// Every source file with its code, without its tests.
fn sources() -> Vec<(PathBuf, String)> {
    let mut files = Vec::new();
    collect(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut files);
    files.into_iter().map(|path| (path.clone(), without_tests(&path))).collect()
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(&path, files);
        } else if path.extension().is_some_and(|ending| ending == "rs") {
            files.push(path);
        }
    }
}

/// The code up to the test module, less single items that only tests have.
fn without_tests(path: &Path) -> String {
    let code = fs::read_to_string(path).unwrap();
    let code = code.split("#[cfg(test)]\nmod tests").next().unwrap_or_default().to_owned();
    let mut parts = code.split("#[cfg(test)]");
    let mut kept = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        kept.push_str(part.split_once("\n}\n").map_or("", |(_, rest)| rest));
    }
    kept
}

fn module_of(path: &Path) -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let first = path.strip_prefix(root).unwrap().components().next().unwrap();
    first.as_os_str().to_string_lossy().trim_end_matches(".rs").to_owned()
}

fn floor(module: &str) -> u32 {
    let known = FLOORS.iter().find(|(name, _)| *name == module);
    known.unwrap_or_else(|| panic!("module {module} has no floor yet")).1
}

/// The top-level modules that a file's `crate::` paths name.
fn imports(code: &str) -> Vec<String> {
    let code: String = code.lines().filter(|line| !line.trim_start().starts_with("//")).collect();
    let paths = code.split("crate::").skip(1);
    paths
        .map(|path| path.chars().take_while(|c| c.is_ascii_lowercase() || *c == '_').collect())
        .filter(|name: &String| !name.is_empty())
        .collect()
}
