//! What the library stands on: no async runtime, and nothing that needs a newer
//! Rust than the manifest declares.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::process::Command;

use serde_json::Value;

fn cargo(arguments: &[&str]) -> String {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned());
    let output = Command::new(cargo)
        .args(arguments)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn no_async_runtime_is_in_the_dependency_tree() {
    let tree = cargo(&["tree", "--edges", "normal", "--all-features", "--prefix", "none"]);
    assert!(tree.contains("tungstenite"), "the test no longer sees the tree");
    for line in tree.lines() {
        let name = line.split(' ').next().unwrap_or_default();
        let runtime = ["tokio", "async-std", "smol", "async-io", "futures-executor", "glommio"];
        assert!(!runtime.contains(&name) && !name.starts_with("tokio-"), "{line}");
    }
}

/// That the code itself needs no newer Rust is what clippy's `incompatible_msrv`
/// looks after.
#[test]
fn no_dependency_needs_a_newer_rust_than_the_manifest_declares() {
    let metadata: Value =
        serde_json::from_str(&cargo(&["metadata", "--format-version", "1", "--all-features"]))
            .unwrap();
    let declared = version(env!("CARGO_PKG_RUST_VERSION"));
    let packages = metadata["packages"].as_array().unwrap();
    assert!(packages.len() > 10, "the test no longer sees the packages");
    for package in packages {
        if let Some(needs) = package["rust_version"].as_str() {
            assert!(version(needs) <= declared, "{} needs Rust {needs}", package["name"]);
        }
    }
}

fn version(text: &str) -> Vec<u32> {
    let mut parts: Vec<u32> = text.split('.').map(|part| part.parse().unwrap()).collect();
    parts.resize(3, 0);
    parts
}
