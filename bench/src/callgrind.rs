//! Counting instructions: runs a scenario of [`crate::path`] in a child process under callgrind
//! and attributes what was collected to the layers of the path.
//!
//! An instruction counts for the function that it was written in, however that was inlined; if that is
//! one of the standard library or of the vocabulary that all share (`dma`, `block`), for the layer that
//! called it. What prepares a data copy counts as the copy. Where the compiler has put the same code of
//! several callers together, nothing says where it was written: such an instruction counts as the one that
//! runs before it.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::Error;
use crate::path::Scenario;

/// Instructions collected in one run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Profile {
    /// By layer, the data copy left out.
    pub layers: BTreeMap<String, u64>,
    /// Of the data copy, with what it checks.
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

/// The functions that copy data; the only ones that may be left out, with what they check.
const COPIES: [&str; 6] = ["copy_bytes", "copy", "copy_to", "copy_from", "read", "write"];
const COPIES_IN: &str = "reactor/dma/src/access.rs";

/// Where each layer's sources are, the most special first.
const LAYERS: [(&str, &str); 9] = [
    ("ffi/blkif/src", "blkif"),
    ("qcow/src", "qcow"),
    ("nvme/model/src", "device registers"),
    ("nvme/spec/src", "nvme"),
    ("nvme/src", "nvme"),
    ("reactor/file/src", "file"),
    ("tools/node/src", "node"),
    ("bench/src", "bench"),
    ("reactor/src", "reactor"),
];
/// The same of what layers share: counts for them only if no other called.
const SHARED: [(&str, &str); 2] = [("reactor/dma/src", "dma"), ("reactor/block/src", "block")];

/// A function that an instruction stands in, and the file that it is written in.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Frame {
    function: String,
    file: String,
}

/// The functions that each instruction stands in, the innermost first, by address.
fn frames(program: &Path, addresses: &[u64]) -> Result<HashMap<u64, Vec<Frame>>, Error> {
    let failed = |e| Error::other(format!("cannot run addr2line ({e}); install binutils"));
    let mut child = Command::new("addr2line")
        .args(["-a", "-f", "-i", "-C", "-e"])
        .arg(program)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    let text: String = addresses.iter().map(|at| format!("{at:x}\n")).collect();
    let mut stdin = child.stdin.take().ok_or_else(|| Error::other("no pipe to addr2line"))?;
    // From a thread: it answers while it is asked.
    let asking = std::thread::spawn(move || stdin.write_all(text.as_bytes()));
    let out = child.wait_with_output().map_err(failed)?;
    asking.join().map_err(|_| Error::other("asking addr2line"))?.map_err(failed)?;
    Ok(parse_frames(&String::from_utf8_lossy(&out.stdout)))
}

fn parse_frames(text: &str) -> HashMap<u64, Vec<Frame>> {
    let mut all: HashMap<u64, Vec<Frame>> = HashMap::new();
    let mut lines = text.lines();
    let mut at = 0;
    while let Some(line) = lines.next() {
        if let Some(address) = line.strip_prefix("0x") {
            at = u64::from_str_radix(address.trim(), 16).unwrap_or(0);
        } else {
            let file = lines.next().unwrap_or_default().to_owned();
            all.entry(at).or_default().push(Frame { function: line.to_owned(), file });
        }
    }
    all
}

/// Whether a function is one of those that copy data.
fn is_copy(frame: &Frame) -> bool {
    let name = frame.function.rsplit("::").next().unwrap_or_default();
    frame.file.contains(COPIES_IN) && COPIES.contains(&name)
}

/// The layer that an instruction counts for; `None`: the copy.
fn layer(frames: &[Frame]) -> Option<&'static str> {
    if frames.iter().any(is_copy) {
        return None;
    }
    let of = |table: &[(&str, &'static str)]| {
        frames.iter().find_map(|frame| {
            table.iter().find(|(dir, _)| frame.file.contains(dir)).map(|(_, layer)| *layer)
        })
    };
    Some(of(&LAYERS).or_else(|| of(&SHARED)).unwrap_or("other"))
}

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
        .args(["--dump-instr=yes", "--collect-jumps=yes", "--compress-pos=no"])
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
    let counts = parse(&text, program);
    let addresses: Vec<u64> = counts.costs.keys().flatten().copied().collect();
    let profile = attribute(&counts, &frames(program, &addresses)?, atomics);
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

/// What callgrind counted.
#[derive(Debug, Default)]
struct Counts {
    /// By address in the program, and of what is outside of it (`None`).
    costs: BTreeMap<Option<u64>, u64>,
    /// From where each place is jumped to most often, and how often.
    jumps: HashMap<u64, (u64, u64)>,
}

impl Counts {
    /// The address of the instruction that runs before another one.
    fn before(&self, at: u64) -> Option<u64> {
        let jump = self.jumps.get(&at).map(|&(from, _)| from);
        jump.or_else(|| self.costs.range(..Some(at)).next_back().and_then(|(&before, _)| before))
    }
}

/// Reads a callgrind profile ("Callgrind Format Specification") with absolute positions of instruction
/// and line.
fn parse(text: &str, program: &Path) -> Counts {
    let (mut objects, mut ours, mut skip, mut jump) = (HashMap::new(), false, false, None);
    let mut counts = Counts::default();
    let address = |word: &str| u64::from_str_radix(word.trim_start_matches("0x"), 16).ok();
    for line in text.lines() {
        if let Some((key, value)) = line.split_once('=')
            && key.chars().all(|c| c.is_ascii_lowercase())
        {
            match key {
                "ob" => ours = Path::new(&name(&mut objects, value)) == program,
                "cob" => drop(name(&mut objects, value)),
                // The next line is what the callee cost, which is counted there.
                "calls" => skip = true,
                // How often, where to; the next line is where from, and costs nothing.
                "jump" | "jcnd" => {
                    let mut words = value.split_whitespace();
                    let often = words.next().and_then(|n| n.split('/').next_back());
                    let often = often.and_then(|n| n.parse::<u64>().ok());
                    jump = Some(often.zip(words.next().and_then(address)));
                }
                _ => {}
            }
            continue;
        }
        if !line.starts_with("0x") || std::mem::take(&mut skip) {
            continue;
        }
        let mut words = line.split_whitespace();
        let at = words.next().and_then(address).filter(|_| ours);
        if let Some(jump) = jump.take() {
            if let Some(((often, to), from)) = jump.zip(at) {
                let best = counts.jumps.entry(to).or_insert((from, often));
                if often > best.1 {
                    *best = (from, often);
                }
            }
            continue;
        }
        let cost = words.nth(1).and_then(|n| n.parse::<u64>().ok()).unwrap_or(0);
        *counts.costs.entry(at).or_default() += cost;
    }
    counts
}

/// How many instructions without a line are followed back to one that has one.
const MOST_MERGED: usize = 256;

fn attribute(counts: &Counts, frames: &HashMap<u64, Vec<Frame>>, atomics: &Atomics) -> Profile {
    let merged = |at: &u64| {
        let inner = frames.get(at).and_then(|all| all.first());
        // Of a known file: what has no debug information at all is nobody's.
        let lineless = |file: &str| file.ends_with(":?") || file.ends_with(":0");
        inner.is_some_and(|f| lineless(&f.file) && !f.file.starts_with("??"))
    };
    let mut profile = Profile::default();
    for (&at, &cost) in &counts.costs {
        if at.is_some_and(|at| atomics.0.contains(&at)) {
            profile.atomics += cost;
        }
        let mut back = std::iter::successors(at, |&at| counts.before(at)).take(MOST_MERGED);
        let known = back.find(|at| !merged(at)).or(at);
        let stands_in = known.and_then(|at| frames.get(&at)).map_or(&[][..], Vec::as_slice);
        match layer(stands_in) {
            Some(layer) => *profile.layers.entry(layer.to_owned()).or_default() += cost,
            None => profile.copy += cost,
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
0x4020 13 7
0x4030 12 2
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
        let frames = parse_frames(
            "\
0x0000000000004010
reactor::core::Core<L,I,F>::turn
/x/reactor/src/core.rs:305
0x0000000000004020
core::num::<impl u32>::wrapping_add
/rustc/5980/library/core/src/num/uint_macros.rs:2457
dma::access::Entry<_>::read_words
/x/reactor/dma/src/access.rs:322
blkif::ring::BackRing<M>::head
/x/ffi/blkif/src/ring.rs:123
reactor::core::Core<L,I,F>::turn
/x/reactor/src/core.rs:305
0x0000000000004030
dma::region::Region::len
/x/reactor/dma/src/region.rs:12
0x0000000000005000
dma::region::Region::at
/x/reactor/dma/src/region.rs:330
dma::access::copy
/x/reactor/dma/src/access.rs:78
blkif::backend::Backend<M,G,E>::complete
/x/ffi/blkif/src/backend/mod.rs:579
",
        );
        let atomics = Atomics::parse(
            "  4020:\tlock xadd %rax,(%rdx)\n  4010:\txchg %ax,%ax\n  5000:\txchg %rax,(%rdi)\n",
        );
        let p = attribute(&parse(text, Path::new("/x/polldisk")), &frames, &atomics);
        assert_eq!(p.copy, 999);
        assert_eq!(p.layers["reactor"], 5);
        assert_eq!(p.layers["blkif"], 7);
        assert_eq!((p.layers["dma"], p.layers["other"]), (2, 3));
        assert_eq!(p.total(), 17);
        assert_eq!(p.atomics, 7 + 999, "of the program only, each as often as it ran");
    }

    /// What stands nowhere counts for what ran before it, however often, and wherever that is.
    #[test]
    fn merged_code_counts_for_what_leads_to_it() {
        let text = "\
ob=(1) /x/polldisk
fn=(1) bench::path::measured_turn
0x4010 10 5
jcnd=2/9 0x4030 20
0x4010 10
jump=3 0x4030 20
0x4020 30
0x4020 30 3
0x4030 0 50
0x4038 0 50
0x4040 40 50
0x4048 0 7
";
        let at = |at: u64, file: &str| {
            let frame = Frame { function: "f".to_owned(), file: format!("/x/{file}") };
            (at, vec![frame])
        };
        let frames = HashMap::from([
            at(0x4010, "nvme/src/ring.rs:7"),
            at(0x4020, "qcow/src/map.rs:3"),
            at(0x4030, "ffi/blkif/src/ring.rs:?"),
            at(0x4038, "ffi/blkif/src/ring.rs:0"),
            at(0x4040, "ffi/blkif/src/ring.rs:40"),
            (0x4048, vec![Frame { function: "??".to_owned(), file: "??:0".to_owned() }]),
        ]);
        let p = attribute(&parse(text, Path::new("/x/polldisk")), &frames, &Atomics::default());
        assert_eq!(p.layers["nvme"], 5 + 50 + 50);
        assert_eq!((p.layers["qcow"], p.layers["blkif"], p.layers["other"]), (3, 50, 7));
        assert_eq!(p.total(), 165, "a jump costs nothing more than itself");
    }
}
