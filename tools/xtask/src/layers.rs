//! `cargo xtask layers`: checks that imports between our crates go one way, as
//! docs/architecture.md says. Reads `cargo metadata`.

use std::process::Command;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::cmd;

/// Where a crate stands. A crate imports only from lower levels; crates of one level do not know
/// each other.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Level {
    /// Pure layouts of a device; not for the vocabulary crates, which know no device.
    Layouts,
    Memory,
    Vocabulary,
    Core,
    /// Drivers, formats and frontends: they meet at `BlockQueue`.
    Part,
    /// Stand-ins for hardware and time: for tests, and for what puts parts together.
    Double,
    Assembly,
    Measurement,
    Comparison,
    Product,
    /// The repository's own commands: import none of ours.
    Apart,
}

/// Every crate of the workspace. A crate that is missing here is an error.
const CRATES: [(&str, Level); 23] = [
    ("nvme-spec", Level::Layouts),
    ("dma", Level::Memory),
    ("block", Level::Vocabulary),
    ("reactor", Level::Core),
    ("file", Level::Part),
    ("nvme", Level::Part),
    ("vfio", Level::Part),
    ("vfio-user", Level::Part),
    ("volume", Level::Part),
    ("qcow", Level::Part),
    ("vhd", Level::Part),
    ("xen", Level::Part),
    ("blkif", Level::Part),
    ("nbd", Level::Part),
    ("vhost-user-blk", Level::Part),
    ("nvme-model", Level::Double),
    ("sim", Level::Double),
    ("node", Level::Assembly),
    ("sr", Level::Assembly),
    ("bench", Level::Measurement),
    ("compare", Level::Comparison),
    ("polldisk", Level::Product),
    ("xtask", Level::Apart),
];

/// One import between two of our crates.
#[derive(Debug, Clone)]
struct Edge {
    from: String,
    to: String,
    /// Only for the importing crate's tests.
    dev: bool,
}

fn level(name: &str) -> Option<Level> {
    CRATES.iter().find(|(known, _)| *known == name).map(|(_, level)| *level)
}

/// Why an import is wrong; `None` when it is right.
fn fault(edge: &Edge) -> Option<String> {
    let Some(from) = level(&edge.from) else {
        return Some("the importing crate has no level in layers.rs".to_owned());
    };
    let Some(to) = level(&edge.to) else {
        return Some("the imported crate has no level in layers.rs".to_owned());
    };
    let wrong = |reason: &str| Some(reason.to_owned());
    match (from, to) {
        (Level::Apart, _) | (_, Level::Apart) => wrong("xtask stands apart from our crates"),
        // Tests of anything above the vocabulary may use the doubles.
        (Level::Core | Level::Part | Level::Double, Level::Double) if edge.dev => None,
        (_, Level::Double) if from < Level::Assembly => wrong("a double is only for tests here"),
        (Level::Memory | Level::Vocabulary | Level::Core, Level::Layouts) => {
            wrong("this level knows no device")
        }
        (Level::Part, Level::Layouts) if edge.from != "nvme" => wrong("only for the NVMe driver"),
        // A double needs the ground floor, never the parts that it is used to test.
        (Level::Double, Level::Part) => wrong("a double must not share code with what it tests"),
        _ if to < from => None,
        _ if to == from => wrong("crates of one level never import each other"),
        _ => wrong("imports go down only"),
    }
}

/// The imports between our crates, from the output of `cargo metadata --no-deps`.
fn edges(metadata: &Value) -> Result<(Vec<String>, Vec<Edge>)> {
    let packages = metadata["packages"].as_array().context("no packages in cargo metadata")?;
    let name = |package: &Value| package["name"].as_str().unwrap_or_default().to_owned();
    let ours: Vec<String> = packages.iter().map(name).collect();
    let mut edges = Vec::new();
    for package in packages {
        for dependency in package["dependencies"].as_array().context("no dependencies")? {
            let to = name(dependency);
            // A crate of the same name from a registry has no path.
            if ours.contains(&to) && dependency["path"].is_string() {
                let dev = dependency["kind"] == "dev";
                edges.push(Edge { from: name(package), to, dev });
            }
        }
    }
    Ok((ours, edges))
}

/// Runs the command; false when an import is wrong.
pub(crate) fn command() -> Result<bool> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let text = cmd::ok(
        Command::new(cargo)
            .args(["metadata", "--no-deps", "--format-version", "1"])
            .current_dir(crate::root()),
    )?;
    let (crates, edges) = edges(&serde_json::from_str(&text)?)?;
    let mut wrong = 0;
    for name in crates.iter().filter(|name| level(name).is_none()) {
        println!("{name}: has no level in tools/xtask/src/layers.rs");
        wrong += 1;
    }
    for edge in &edges {
        if let Some(reason) = fault(edge) {
            println!("{} imports {}: {reason}", edge.from, edge.to);
            wrong += 1;
        }
    }
    println!("layers: {} crates, {} imports, {wrong} wrong", crates.len(), edges.len());
    Ok(wrong == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(from: &str, to: &str, dev: bool) -> Option<String> {
        fault(&Edge { from: from.into(), to: to.into(), dev })
    }

    #[test]
    fn right_imports_pass() {
        for (from, to) in [
            ("block", "dma"),
            ("reactor", "block"),
            ("nvme", "nvme-spec"),
            ("nvme-model", "nvme-spec"),
            ("qcow", "reactor"),
            ("node", "nvme-model"),
            ("node", "qcow"),
            ("bench", "node"),
            ("polldisk", "bench"),
        ] {
            assert_eq!(check(from, to, false), None, "{from} -> {to}");
        }
        assert_eq!(check("nvme", "nvme-model", true), None);
        assert_eq!(check("qcow", "sim", true), None);
    }

    #[test]
    fn wrong_imports_are_found() {
        for (from, to) in [
            ("dma", "block"),
            ("block", "reactor"),
            ("dma", "nvme-spec"),
            ("qcow", "file"),
            ("qcow", "nvme-spec"),
            ("nvme", "qcow"),
            ("blkif", "nbd"),
            ("nvme", "nvme-model"),
            ("nvme-model", "nvme"),
            ("reactor", "sim"),
            ("qcow", "node"),
            ("node", "polldisk"),
            ("bench", "polldisk"),
            ("xtask", "dma"),
            ("polldisk", "xtask"),
            ("dma", "unheard-of"),
            ("unheard-of", "dma"),
        ] {
            assert!(check(from, to, false).is_some(), "{from} -> {to}");
        }
        // Tests may not go around the rule either, except with the doubles.
        assert!(check("qcow", "file", true).is_some());
    }

    #[test]
    fn metadata_is_read() {
        let text = r#"{"packages": [
            {"name": "dma", "dependencies": [{"name": "libc", "kind": null}]},
            {"name": "block", "dependencies": [
                {"name": "dma", "kind": "dev", "path": "/x"},
                {"name": "dma", "kind": null}]}]}"#;
        let (crates, edges) = edges(&serde_json::from_str(text).unwrap()).unwrap();
        assert_eq!(crates, ["dma", "block"]);
        assert_eq!(edges.len(), 1);
        assert!(edges[0].dev && edges[0].from == "block" && edges[0].to == "dma");
    }
}
