//! Under which terms a static program is given out: ours, and those of everything that is in it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::cmd;
use crate::suite;

/// What is in the program beside crates. The terms of the C library are met since its source and ours, with
/// what links them, are to be had.
const LIBRARIES: &str = "\
polldisk is linked statically with these:

GNU C Library, under the LGPL, version 2.1 or later (https://www.gnu.org/licenses/old-licenses/lgpl-2.1.html);
its own notices stand at the end. `cargo xtask dist` in polldisk's sources links it with any other version.

libgcc, under the GPL, version 3, with the GCC Runtime Library Exception 3.1
(https://www.gnu.org/licenses/gcc-exception-3.1.html).

The standard library of Rust, under the MIT licence or the Apache License 2.0
(https://www.rust-lang.org/policies/licenses).

";

/// Debian's collection of the C library's notices.
const LIBC: &str = "/usr/share/doc/libc6/copyright";

/// The file `copyright` of all packages.
pub(super) fn text() -> Result<String> {
    let root = crate::root();
    let read = |path: &Path| fs::read_to_string(path).with_context(|| path.display().to_string());
    let mut text = "polldisk: MIT or Apache-2.0, as you like.\n\n".to_owned();
    text += &read(&root.join("LICENSE-MIT"))?;
    let _ = writeln!(text, "\n{LIBRARIES}These crates are in it, each with its terms below:\n");
    let mut notices: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for Crate { name, licence, folder } in crates()? {
        let _ = writeln!(text, "  {name} ({licence})");
        for notice in of_crate(Path::new(&folder), &licence)? {
            notices.entry(notice).or_default().insert(name.clone());
        }
    }
    for (notice, names) in &notices {
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let _ = write!(text, "\n----\n{}:\n\n{notice}\n", names.join(", "));
    }
    let _ = write!(text, "\n----\nLicense: Apache-2.0\n\n{}", read(&root.join("LICENSE-APACHE"))?);
    let _ = write!(text, "\n----\nThe GNU C Library\n\n{}", read(Path::new(LIBC))?);
    Ok(text)
}

#[derive(Debug)]
struct Crate {
    name: String,
    licence: String,
    /// Where its sources are.
    folder: String,
}

/// Other people's crates that are in the program, by name.
fn crates() -> Result<Vec<Crate>> {
    let target = "x86_64-unknown-linux-gnu";
    let mut cargo = suite::cargo();
    cargo.args(["metadata", "--format-version", "1", "--filter-platform", target]);
    let mut crates = in_program(&serde_json::from_str(&cmd::ok(&mut cargo)?)?)?;
    crates.sort_by(|a, b| a.name.cmp(&b.name));
    if crates.len() < 10 {
        bail!("only {} crates are in the program", crates.len());
    }
    Ok(crates)
}

/// Those that are reached from `polldisk` by what is linked: not what runs while it is built.
fn in_program(metadata: &Value) -> Result<Vec<Crate>> {
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let packages: BTreeMap<String, Value> =
        list(&metadata["packages"]).into_iter().map(|p| (text(&p["id"]), p)).collect();
    let nodes: BTreeMap<String, Value> =
        list(&metadata["resolve"]["nodes"]).into_iter().map(|n| (text(&n["id"]), n)).collect();
    let root = packages.iter().find(|(_, p)| p["name"] == "polldisk").context("no polldisk")?.0;
    let (mut todo, mut seen) = (vec![root.clone()], BTreeSet::new());
    let mut found = Vec::new();
    while let Some(id) = todo.pop() {
        let (package, node) = (&packages[&id], &nodes[&id]);
        let macros = list(&package["targets"])
            .iter()
            .any(|t| list(&t["kind"]).contains(&"proc-macro".into()));
        if macros || !seen.insert(id) {
            continue;
        }
        if !package["source"].is_null() {
            found.push(Crate {
                name: format!("{} {}", text(&package["name"]), text(&package["version"])),
                licence: text(&package["license"]),
                folder: text(&package["manifest_path"]).trim_end_matches("Cargo.toml").to_owned(),
            });
        }
        let linked = |dep: &&Value| list(&dep["dep_kinds"]).iter().any(|k| k["kind"].is_null());
        todo.extend(list(&node["deps"]).iter().filter(linked).map(|dep| text(&dep["pkg"])));
    }
    Ok(found)
}

/// Of a crate that may be had under this licence and has no file that says so.
const APACHE: &str = "Under the Apache License 2.0, which stands below.\n";

/// The notices in a crate's folder: the MIT licence where there is a choice, else all.
fn of_crate(folder: &Path, licence: &str) -> Result<Vec<String>> {
    const STARTS: [&str; 5] = ["LICEN", "COPYING", "COPYRIGHT", "NOTICE", "UNLICENSE"];
    let entries = fs::read_dir(folder).with_context(|| folder.display().to_string())?;
    let mut files: Vec<_> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy().to_uppercase();
            path.is_file() && STARTS.iter().any(|start| name.starts_with(start))
        })
        .collect();
    files.sort();
    if files.is_empty() {
        let choices = licence.replace('/', " OR ");
        if choices.split(" OR ").any(|choice| choice.trim() == "Apache-2.0") {
            return Ok(vec![APACHE.to_owned()]);
        }
        bail!("{}: no licence", folder.display());
    }
    let mit: Vec<_> = files
        .iter()
        .filter(|path| path.to_string_lossy().contains("LICENSE-MIT"))
        .cloned()
        .collect();
    let chosen = if mit.is_empty() { files } else { mit };
    let read = |path| fs::read_to_string(&path).with_context(|| format!("{path:?}"));
    chosen.into_iter().map(read).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_is_linked_counts_and_what_builds_does_not() {
        let package = |id: &str, source: Option<&str>, kind: &str| {
            json!({"id": id, "name": id, "version": "1.0.0", "license": "MIT", "source": source,
                   "manifest_path": format!("/x/{id}/Cargo.toml"), "targets": [{"kind": [kind]}]})
        };
        let dep = |id: &str, kind: Option<&str>| json!({"pkg": id, "dep_kinds": [{"kind": kind}]});
        let metadata = json!({
            "packages": [
                package("polldisk", None, "bin"), package("ours", None, "lib"),
                package("linked", Some("r"), "lib"), package("derive", Some("r"), "proc-macro"),
                package("parser", Some("r"), "lib"), package("tested", Some("r"), "lib"),
            ],
            "resolve": {"nodes": [
                {"id": "polldisk", "deps": [dep("ours", None), dep("tested", Some("dev"))]},
                {"id": "ours", "deps": [dep("linked", None), dep("derive", None)]},
                {"id": "linked", "deps": []},
                {"id": "derive", "deps": [dep("parser", None)]},
                {"id": "parser", "deps": []}, {"id": "tested", "deps": []},
            ]},
        });
        let found = in_program(&metadata).unwrap();
        assert_eq!(found.len(), 1, "{found:?}");
        assert_eq!(
            (found[0].name.as_str(), found[0].folder.as_str()),
            ("linked 1.0.0", "/x/linked/")
        );
    }

    #[test]
    fn a_crate_without_a_file_is_under_what_it_may_be_chosen_under() {
        // A folder without such files.
        let folder = crate::root().join("tools/xtask/src");
        for licence in ["MIT OR Apache-2.0", "MIT/Apache-2.0", "Apache-2.0"] {
            assert_eq!(of_crate(&folder, licence).unwrap(), [APACHE]);
        }
        for licence in ["MIT", "Apache-2.0 AND MIT", ""] {
            assert!(of_crate(&folder, licence).is_err(), "{licence}");
        }
    }

    #[test]
    fn all_that_is_linked_has_its_terms() {
        let text = text().unwrap();
        for what in ["  clap 4", "Permission is hereby granted", "Apache License", "GNU Lesser"] {
            assert!(text.contains(what), "{what}");
        }
    }
}
