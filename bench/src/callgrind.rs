//! Counting instructions: runs a scenario of [`crate::path`] in a child process under callgrind
//! and attributes what was collected to the layers of the path.
//!
//! Instructions are attributed by source file, so that inlined code counts where it was written;
//! what was inlined from the standard library counts for the function that it stands in.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;
use std::process::Command;

use crate::Error;
use crate::path::Scenario;

/// Instructions collected in one run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Profile {
    /// By layer, the data copy left out.
    pub layers: BTreeMap<String, u64>,
    /// In the data copy's own function.
    pub copy: u64,
    /// Of all these, atomic read-modify-writes.
    pub atomics: u64,
}

impl Profile {
    /// All but the copy.
    pub fn total(&self) -> u64 {
        self.layers.values().sum()
    }
}

/// The function that copies data; the only one that may be left out.
const COPY: &str = "copy_bytes";

/// Where each layer's sources are, the most special first.
const LAYERS: [(&str, &str); 11] = [
    ("ffi/blkif/src", "blkif"),
    ("qcow/src", "qcow"),
    ("nvme/model/src", "device registers"),
    ("nvme/spec/src", "nvme"),
    ("nvme/src", "nvme"),
    ("reactor/dma/src", "dma"),
    ("reactor/block/src", "block"),
    ("reactor/file/src", "file"),
    ("reactor/src", "reactor"),
    ("tools/node/src", "node"),
    ("bench/src", "bench"),
];

/// The same by the crate's name in a function's.
const CRATES: [(&str, &str); 10] = [
    ("blkif::", "blkif"),
    ("qcow::", "qcow"),
    ("nvme_model::", "device registers"),
    ("nvme_spec::", "nvme"),
    ("nvme::", "nvme"),
    ("dma::", "dma"),
    ("block::", "block"),
    ("reactor::", "reactor"),
    ("node::", "node"),
    ("bench::", "bench"),
];

/// Where in a program its atomic read-modify-writes are: addresses of instructions with a lock
/// prefix, and of exchanges with memory, which lock by themselves.
#[derive(Debug, Default)]
pub struct Atomics(HashSet<u64>);

impl Atomics {
    /// Disassembles the program.
    ///
    /// # Errors
    /// If objdump is missing or finds none, which cannot be.
    pub fn of(program: &Path) -> Result<Atomics, Error> {
        let run = Command::new("objdump")
            .args(["-d", "--no-show-raw-insn"])
            .arg(program)
            .output()
            .map_err(|e| Error::other(format!("cannot run objdump ({e}); install binutils")))?;
        let found = Atomics::parse(&String::from_utf8_lossy(&run.stdout));
        if !run.status.success() || found.0.is_empty() {
            let text = String::from_utf8_lossy(&run.stderr);
            return Err(Error::other(format!("objdump found no atomic instruction: {text}")));
        }
        Ok(found)
    }

    fn parse(text: &str) -> Atomics {
        let atomic = |code: &str| {
            code.starts_with("lock ") || (code.starts_with("xchg") && code.contains('('))
        };
        let lines = text.lines().filter_map(|line| line.split_once(':'));
        let found = lines.filter(|(_, code)| atomic(code.trim_start()));
        Atomics(found.filter_map(|(at, _)| u64::from_str_radix(at.trim(), 16).ok()).collect())
    }
}

/// Runs `program bench path-worker …` under callgrind and reads what it collected.
///
/// # Errors
/// If valgrind is missing or fails, or nothing was collected: a wrong symbol must not count 0.
pub fn profile(
    program: &Path,
    scenario: Scenario,
    depth: usize,
    count: u64,
    scratch: &Path,
    atomics: &Atomics,
) -> Result<Profile, Error> {
    let out = scratch.join(format!("{}-{depth}-{count}.callgrind", scenario.name()));
    let run = Command::new("valgrind")
        // Fair, so that a device's thread gets its turns on a busy machine too.
        .args(["-q", "--fair-sched=try", "--tool=callgrind", "--collect-atstart=no"])
        .args(["--dump-instr=yes", "--compress-pos=no"])
        .arg(format!("--toggle-collect=*{}*", scenario.symbol()))
        .arg(format!("--callgrind-out-file={}", out.display()))
        .arg(program)
        .args(["bench", "path-worker", "--scenario", &scenario.name()])
        .args(["--depth", &depth.to_string(), "--count", &count.to_string()])
        .arg("--scratch")
        .arg(scratch)
        .output()
        .map_err(|e| Error::other(format!("cannot run valgrind ({e}); install it")))?;
    if !run.status.success() {
        let text = String::from_utf8_lossy(&run.stderr);
        return Err(Error::other(format!("{} under valgrind: {text}", scenario.name())));
    }
    let text = std::fs::read_to_string(&out).map_err(Error::other)?;
    let profile = parse(&text, program, atomics);
    if profile.total() < 50 {
        return Err(Error::other(format!(
            "{}: only {} instructions were collected in {}: not measured",
            scenario.name(),
            profile.total(),
            scenario.symbol()
        )));
    }
    Ok(profile)
}

/// Sums up a callgrind profile ("Callgrind Format Specification") with absolute positions of
/// instruction and line.
fn parse(text: &str, program: &Path, atomics: &Atomics) -> Profile {
    let (mut files, mut functions, mut objects) = (HashMap::new(), HashMap::new(), HashMap::new());
    let (mut file, mut function, mut ours) = (String::new(), String::new(), false);
    let mut profile = Profile::default();
    let mut skip = false;
    for line in text.lines() {
        if let Some((key, value)) = line.split_once('=')
            && key.chars().all(|c| c.is_ascii_lowercase())
        {
            match key {
                "fl" | "fi" | "fe" => file = name(&mut files, value),
                "fn" => function = name(&mut functions, value),
                "ob" => ours = Path::new(&name(&mut objects, value)) == program,
                "cob" => drop(name(&mut objects, value)),
                "cfn" => drop(name(&mut functions, value)),
                "cfi" | "cfl" => drop(name(&mut files, value)),
                // The next line is what the callee cost, which is counted there.
                "calls" => skip = true,
                _ => {}
            }
            continue;
        }
        let Some(line) = line.strip_prefix("0x") else { continue };
        if std::mem::take(&mut skip) {
            continue;
        }
        let mut words = line.split_whitespace();
        let at = words.next().and_then(|n| u64::from_str_radix(n, 16).ok());
        let cost = words.nth(1).and_then(|n| n.parse::<u64>().ok()).unwrap_or(0);
        if ours && at.is_some_and(|at| atomics.0.contains(&at)) {
            profile.atomics += cost;
        }
        if function.contains(COPY) {
            profile.copy += cost;
        } else {
            *profile.layers.entry(layer(&file, &function).to_owned()).or_default() += cost;
        }
    }
    profile
}

/// A name that is written once as `(7) name` and then as `(7)`.
fn name(known: &mut HashMap<String, String>, value: &str) -> String {
    let Some((id, rest)) = value.split_once(')') else { return value.to_owned() };
    let rest = rest.trim();
    if !rest.is_empty() {
        known.insert(id.to_owned(), rest.to_owned());
    }
    known.get(id).cloned().unwrap_or_default()
}

fn layer(file: &str, function: &str) -> &'static str {
    let by_file = LAYERS.iter().find(|(dir, _)| file.contains(dir)).map(|(_, l)| *l);
    let by_function = || {
        let first = |c: &&(&str, &str)| function.find(c.0);
        CRATES.iter().filter(|c| first(c).is_some()).min_by_key(first).map(|(_, l)| *l)
    };
    by_file.or_else(by_function).unwrap_or("other")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn costs_go_to_the_layers() {
        let text = "\
events: Ir
ob=(1) /x/polldisk
fl=(1) /x/reactor/src/core.rs
fn=(1) bench::path::measured_turn
0x4010 10 5
fi=(2) /x/qcow/src/map.rs
0x4020 13 7
fi=(3) /rustc/library/core/src/num.rs
0x4030 12 2
cfi=(2)
cob=(2) /lib/libc.so
cfn=(2) dma::access::copy_bytes
calls=3 0x5000 12
0x4034 15 1000
fn=(2)
0x5000 20 999
ob=(2)
fn=(3) memcpy
0x4020 1 3
totals: 2016
";
        let atomics = Atomics::parse(
            "  4020:\tlock xadd %rax,(%rdx)\n  4010:\txchg %ax,%ax\n  5000:\txchg %rax,(%rdi)\n",
        );
        let p = parse(text, Path::new("/x/polldisk"), &atomics);
        assert_eq!(p.copy, 999);
        assert_eq!(p.layers["reactor"], 5);
        assert_eq!(p.layers["qcow"], 7);
        assert_eq!(p.layers["bench"], 2);
        assert_eq!(p.total(), 17);
        assert_eq!(p.atomics, 7 + 999, "of the program only, each as often as it ran");
    }
}
