//! `cargo xtask tidy`: house rules that no compiler lint knows. Prints one line per finding, with
//! file, line and reason. Reads every Rust source that git knows or would add.
//!
//! Where `unsafe` may stand is written down in `tools/xtask/unsafe.list`, one file a line:
//! path, the number of `unsafe` words in its code, and the reason. More than that is a finding, and
//! so is a line that is out of date, so that the list always tells the truth.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};

use crate::cmd::{self, program};
use crate::lexer::{self, Line};

/// A file longer than this is split by topic.
const LONGEST: usize = 650;

/// Where the permitted uses of `unsafe` are written down.
const UNSAFE_LIST: &str = "tools/xtask/unsafe.list";

/// Words that are refused, the part of a line that they are looked for in, and the reason.
const REFUSED: [(&str, Part, &str); 5] = [
    (concat!("todo", "!("), Part::Code, "unfinished code"),
    (concat!("unimplemented", "!("), Part::Code, "unfinished code"),
    (concat!("#[", "ignore"), Part::Code, "a test that never runs proves nothing"),
    (concat!("FIX", "ME"), Part::Comment, "fix it, or say what the limit is"),
    (concat!("TO", "DO"), Part::Comment, "do it, or say what the limit is"),
];

#[derive(Clone, Copy)]
enum Part {
    Code,
    Comment,
}

/// One broken rule.
#[derive(Debug, PartialEq, Eq)]
struct Finding {
    file: String,
    line: usize,
    reason: String,
}

/// Runs the command; false when something was found.
pub(crate) fn command() -> Result<bool> {
    let root = crate::root();
    let listing = cmd::ok(
        program("git", ["ls-files", "-co", "--exclude-standard", "--", "*.rs"]).current_dir(&root),
    )?;
    let mut files = BTreeMap::new();
    for name in listing.lines() {
        // A file that was deleted but not yet committed is still listed.
        if let Ok(text) = fs::read_to_string(root.join(name)) {
            files.insert(name.to_owned(), text);
        }
    }
    if files.is_empty() {
        bail!("git lists no Rust source in {}", root.display());
    }
    let list = fs::read_to_string(root.join(UNSAFE_LIST)).context(UNSAFE_LIST)?;
    let findings = check(&files, &list, &|folder| root.join(folder).join("Cargo.toml").is_file());
    for Finding { file, line, reason } in &findings {
        println!("{file}:{line}: {reason}");
    }
    let count: usize = files.values().map(|text| unsafe_lines(&lexer::split(text)).len()).sum();
    println!("tidy: {} files, {count} uses of unsafe, {} findings", files.len(), findings.len());
    Ok(findings.is_empty())
}

/// All findings in `files` (path and text). `is_crate` tells whether a folder holds a crate.
fn check(
    files: &BTreeMap<String, String>,
    unsafe_list: &str,
    is_crate: &dyn Fn(&Path) -> bool,
) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut uses = BTreeMap::new();
    for (file, text) in files {
        let lines = lexer::split(text);
        let length = text.lines().count();
        if length > LONGEST {
            let reason = format!("{length} lines, more than {LONGEST}: split it by topic");
            findings.push(Finding { file: file.clone(), line: LONGEST + 1, reason });
        }
        for (index, line) in lines.iter().enumerate() {
            for (word, part, reason) in REFUSED {
                let text = match part {
                    Part::Code => &line.code,
                    Part::Comment => &line.comment,
                };
                if text.contains(word) {
                    let reason = format!("`{word}`: {reason}");
                    findings.push(Finding { file: file.clone(), line: index + 1, reason });
                }
            }
        }
        uses.insert(file.as_str(), unsafe_lines(&lines));
    }
    check_unsafe(&uses, unsafe_list, &mut findings);
    check_forbid(files, &uses, is_crate, &mut findings);
    findings
}

/// The line numbers of all `unsafe` words in code.
fn unsafe_lines(lines: &[Line]) -> Vec<usize> {
    let mut found = Vec::new();
    for (index, line) in lines.iter().enumerate() {
        let words = line.code.split(|char: char| !char.is_alphanumeric() && char != '_');
        found.extend(words.filter(|word| *word == "unsafe").map(|_| index + 1));
    }
    found
}

/// Compares the uses of `unsafe` with the list.
fn check_unsafe(uses: &BTreeMap<&str, Vec<usize>>, list: &str, findings: &mut Vec<Finding>) {
    let mut listed = BTreeMap::new();
    for (index, entry) in list.lines().enumerate() {
        if entry.trim().is_empty() || entry.starts_with('#') {
            continue;
        }
        let mut words = entry.split_whitespace();
        let (file, count) = (words.next(), words.next().and_then(|word| word.parse().ok()));
        match (file, count, words.next()) {
            (Some(file), Some(count), Some(_)) => {
                listed.insert(file, (count, index + 1));
            }
            _ => findings.push(Finding {
                file: UNSAFE_LIST.to_owned(),
                line: index + 1,
                reason: "not `path count reason`".to_owned(),
            }),
        }
    }
    for (file, lines) in uses {
        let Some(first) = lines.first() else { continue };
        let (allowed, entry) = listed.remove(file).unwrap_or((0_usize, 0));
        let count = lines.len();
        if count > allowed {
            let line = lines.get(allowed).copied().unwrap_or(*first);
            let reason = format!("{count} uses of unsafe, {allowed} allowed by {UNSAFE_LIST}");
            findings.push(Finding { file: (*file).to_owned(), line, reason });
        } else if count < allowed {
            let reason = format!("{file} has {count} uses of unsafe, not {allowed}: lower it");
            findings.push(Finding { file: UNSAFE_LIST.to_owned(), line: entry, reason });
        }
    }
    for (file, (_, line)) in listed {
        let reason = format!("{file} has no unsafe: remove the line");
        findings.push(Finding { file: UNSAFE_LIST.to_owned(), line, reason });
    }
}

/// A crate without unsafe code says so, so that the compiler keeps it that way.
fn check_forbid(
    files: &BTreeMap<String, String>,
    uses: &BTreeMap<&str, Vec<usize>>,
    is_crate: &dyn Fn(&Path) -> bool,
    findings: &mut Vec<Finding>,
) {
    for (file, text) in files {
        let Some(folder) =
            ["src/lib.rs", "src/main.rs"].iter().find_map(|end| file.strip_suffix(end))
        else {
            continue;
        };
        if !is_crate(Path::new(folder)) {
            continue;
        }
        let source = format!("{folder}src/");
        let clean = uses.iter().all(|(name, lines)| !name.starts_with(&source) || lines.is_empty());
        let says =
            lexer::split(text).iter().any(|line| line.code.contains("#![forbid(unsafe_code)]"));
        if clean && !says {
            let reason = "no unsafe in this crate: add #![forbid(unsafe_code)]".to_owned();
            findings.push(Finding { file: file.clone(), line: 1, reason });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLEAN: &str = "//! A crate.\n#![forbid(unsafe_code)]\n";

    fn reasons(files: &[(&str, &str)], list: &str) -> Vec<String> {
        let files = files.iter().map(|(name, text)| ((*name).into(), (*text).into())).collect();
        check(&files, list, &|_| true)
            .into_iter()
            .map(|finding| format!("{}:{} {}", finding.file, finding.line, finding.reason))
            .collect()
    }

    #[test]
    fn clean_sources_have_no_findings() {
        let text = "//! unsafe is only a word here\nfn f() { g(\"unsafe todo!()\") }\n";
        assert_eq!(reasons(&[("a/src/lib.rs", CLEAN), ("a/src/b.rs", text)], ""), [""; 0]);
    }

    #[test]
    fn each_refused_word_is_found_with_its_line() {
        for (word, part, _) in REFUSED {
            let line = match part {
                Part::Code => format!("fn f() {{}}\n{word}\n"),
                Part::Comment => format!("fn f() {{}}\n// {word} later\n"),
            };
            let found = reasons(&[("a/src/lib.rs", CLEAN), ("a/src/b.rs", &line)], "");
            assert_eq!(found.len(), 1, "{word}: {found:?}");
            assert!(found[0].starts_with("a/src/b.rs:2 "), "{found:?}");
        }
    }

    #[test]
    fn long_files_are_found() {
        let found = reasons(&[("a/src/lib.rs", CLEAN), ("a/tests/t.rs", &"\n".repeat(651))], "");
        assert_eq!(found, ["a/tests/t.rs:651 651 lines, more than 650: split it by topic"]);
        assert!(reasons(&[("a/tests/t.rs", &"\n".repeat(650))], "").is_empty());
    }

    #[test]
    fn unsafe_must_be_listed_with_the_right_count() {
        let files = [("a/src/lib.rs", "//! x\nunsafe fn f() {}\nfn g() { unsafe { f() } }\n")];
        assert_eq!(reasons(&files, "# note\na/src/lib.rs 2 shared memory\n"), [""; 0]);
        let none = reasons(&files, "");
        assert!(none[0].starts_with("a/src/lib.rs:2 2 uses of unsafe, 0 allowed"), "{none:?}");
        let one = reasons(&files, "a/src/lib.rs 1 shared memory");
        assert!(one[0].starts_with("a/src/lib.rs:3 2 uses"), "{one:?}");
        assert!(reasons(&files, "a/src/lib.rs 3 shared memory")[0].contains("lower it"));
        let stale = reasons(&files, "a/src/lib.rs 2 shared memory\nb.rs 1 gone\n");
        assert!(stale[0].contains("remove the line"), "{stale:?}");
        assert!(reasons(&files, "a/src/lib.rs 2\n").iter().any(|text| text.contains("not `path")));
    }

    #[test]
    fn a_crate_without_unsafe_must_forbid_it() {
        let found = reasons(&[("a/src/main.rs", "fn main() {}\n")], "");
        assert_eq!(found, ["a/src/main.rs:1 no unsafe in this crate: add #![forbid(unsafe_code)]"]);
    }
}
