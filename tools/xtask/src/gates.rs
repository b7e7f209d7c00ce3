//! `cargo xtask gates`: the counts that a change may not raise, measured on the release binary:
//! instructions, system calls, allocations, locks, device writes. Each gate that looks for zero
//! has a positive control: the same run with a wrong thing done on purpose must turn it red.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::cmd::say;
use crate::suite::{Tally, build_polldisk};
use crate::tools;

/// Instructions at most: scenario, depth, bound. A bound is a little above what is reached, and only
/// ever goes down, but for what the path really does and was not counted: the rings' records were not.
const INSTRUCTIONS: [(&str, u64, f64); 4] = [
    ("read", 32, 300.0),
    ("write", 32, 300.0),
    ("translate-1", 1, 26.0),
    ("translate-20", 1, 26.0),
];

/// The same of the backend half alone, above the image layer.
const BACKEND: f64 = 120.0;

/// Cost of a request to the driver with several devices as a share of that with one.
const DEVICES: f64 = 1.1;

/// Cost of a request on the whole path over a stripe of 2 or 4 devices, each as deep as one by itself, as a
/// share of that with one.
const STRIPES: f64 = 1.1;

/// Instructions that the same stripes may add where all their devices together are as deep as one: each has
/// its own poll and doorbells, for the fewer requests the more devices there are.
const SHALLOW_STRIPES: f64 = 78.0;

/// Cost of a request over a large disk, whose map is far from the processor, as a share of one over a small
/// disk.
const FAR: f64 = 1.05;

/// What a request to a QCOW2 image may cost, as a share of one to bytes as they are.
const QCOW2: f64 = 1.15;

/// The same of two queues of one device: nothing is shared, so nothing is added.
const REACTORS: f64 = 1.01;

/// A hit by a satellite as a share of the same on the home reactor, and a hit on a home reactor with
/// a satellite as a share of one without.
const SATELLITE: f64 = 1.02;
const HOME: f64 = 1.02;

/// Instructions that one more satellite may add to an idle turn of the home reactor.
const IDLE_SATELLITE: f64 = 24.0;

/// Device writes per guest write while an empty image is filled.
const FILL: f64 = 1.2;

/// Memory that opening 16 TiB may take.
const OPEN_BYTES: f64 = 64.0 * 1024.0 * 1024.0;

/// Memory of a full image for each cluster, in bytes, without what an image of any size has.
const CLUSTER_BYTES: f64 = 8.0 * 1.05;

/// Memory of a check: this share of the refcounts' plain size, and so many bytes.
const CHECK_SHARE: f64 = 0.25;
const CHECK_BYTES: f64 = 64.0 * 1024.0 * 1024.0;

/// Runs the gates alone.
pub(crate) fn command() -> Result<bool> {
    let tally = run()?;
    println!("{tally}");
    Ok(tally.good())
}

/// Runs all gates.
pub(crate) fn run() -> Result<Tally> {
    if let Err(missing) = tools::need(&["valgrind", "qemu-img"]) {
        println!("skipped: gates: {missing:#}");
        return Ok(Tally { skipped: 1, ..Tally::default() });
    }
    let polldisk = build_polldisk()?;
    let mut tally = Tally::default();
    let mut judge = |name: &str, result: Result<()>| {
        match &result {
            Ok(()) => say(&format!("gates: {name}: ok")),
            Err(e) => say(&format!("gates: {name}: FAILED: {e:#}")),
        }
        tally.passed += u64::from(result.is_ok());
        tally.failed += u64::from(result.is_err());
    };
    let path = json(&polldisk, &["bench", "path", "--json"], 0)?;
    for (name, depth, bound) in INSTRUCTIONS {
        judge(
            &format!("instructions of {name} at depth {depth}"),
            instructions(&path, name, depth, bound),
        );
    }
    judge("instructions of all paths, against the table", crate::perf::judge(&path));
    judge("instructions of paths beside each other", several(&path));
    judge("an idle turn with satellites", idle(&path));
    judge("atomic read-modify-writes", atomics(&path));
    judge("path: no system call, allocation or lock", path_is_quiet(&path));
    judge("device writes of filling an empty image", fill(&path));
    judge("memory of opening 16 TiB", open(&path));
    let full = json(&polldisk, &["bench", "full", "--json"], 0)?;
    judge("an L2 miss is one read of the device, and a warm map has none", misses(&full));
    judge("memory of a full image of 1 TiB", memory(&full));
    judge("check of a full image of 1 TiB", check(&full));
    judge("demo: verified, and quiet on the reactor", demo_is_quiet(&polldisk));
    for wrong in ["syscall", "alloc", "lock", "corrupt"] {
        judge(&format!("positive control: {wrong} is noticed"), control(&polldisk, wrong));
    }
    Ok(tally)
}

/// Runs the binary, which must exit with `code`, and reads its JSON.
pub(crate) fn json(polldisk: &Path, args: &[&str], code: i32) -> Result<Value> {
    let out = Command::new(polldisk).args(args).output().context("cannot run polldisk")?;
    let text = String::from_utf8_lossy(&out.stderr);
    ensure!(
        out.status.code() == Some(code),
        "polldisk {}: {}, not exit code {code}: {text}",
        args.join(" "),
        out.status
    );
    serde_json::from_slice(&out.stdout).context("its output is no JSON")
}

fn number(value: &Value, key: &str) -> Result<f64> {
    match value[key].as_f64() {
        Some(n) => Ok(n),
        None => bail!("{key} is {}, no number", value[key]),
    }
}

fn scenario<'a>(path: &'a Value, name: &str, depth: u64) -> Result<&'a Value> {
    let rows = path["scenarios"].as_array().context("there are no scenarios")?;
    let found = rows.iter().find(|r| r["name"] == name && r["depth"] == depth);
    found.with_context(|| format!("there is no scenario {name} at depth {depth}"))
}

fn instructions(path: &Value, name: &str, depth: u64, bound: f64) -> Result<()> {
    let row = scenario(path, name, depth)?;
    let n = number(row, "instructions_per_request")?;
    say(&format!("gates:   {n:.1}, at most {bound}: {}", row["layers"]));
    ensure!(n <= bound, "{n:.1} instructions, at most {bound} are allowed");
    // A translation has no part in it; where nothing is counted for it, nothing was attributed.
    if !name.starts_with("translate") {
        let half = number(&row["layers"], "blkif")?;
        ensure!(half <= BACKEND, "{half:.1} of the backend half, at most {BACKEND} are allowed");
    }
    Ok(())
}

/// What a request costs on one path as a share of another: of the driver with 2 and 4 devices, of QCOW2, over
/// large disks and stripes, with further reactors.
fn several(path: &Value) -> Result<()> {
    let cost = |name, depth| number(scenario(path, name, depth)?, "instructions_per_request");
    for (name, depth, one, most) in [
        ("devices-2", 32, "devices-1", DEVICES),
        ("devices-4", 32, "devices-1", DEVICES),
        ("reactors-2", 32, "reactors-1", REACTORS),
        ("read", 32, "raw-read", QCOW2),
        ("write", 32, "raw-write", QCOW2),
        ("read-far", 32, "read", FAR),
        ("read-stripe-2", 64, "read", STRIPES),
        ("read-stripe-4", 128, "read", STRIPES),
        ("read-satellite", 32, "read", SATELLITE),
        ("write-satellite", 32, "write", SATELLITE),
        ("read-home-1", 32, "read", HOME),
    ] {
        let share = cost(name, depth)? / cost(one, 32)?;
        say(&format!("gates:   {name} at {depth}: {share:.3} of {one} at 32, at most {most}"));
        ensure!(share <= most, "{name}: {share:.3} of {one}, at most {most} is allowed");
    }
    for name in ["read-stripe-2", "read-stripe-4"] {
        let more = cost(name, 32)? - cost("read", 32)?;
        say(&format!("gates:   {name}: {more:.1} more than read, at most {SHALLOW_STRIPES}"));
        ensure!(more <= SHALLOW_STRIPES, "{name}: {more:.1} more than read: too many");
    }
    Ok(())
}

/// What satellites that have nothing to say add to a turn of their home reactor.
fn idle(path: &Value) -> Result<()> {
    let cost = |name| number(scenario(path, name, 1)?, "instructions_per_request");
    let each = (cost("idle-home-8")? - cost("idle-home-0")?) / 8.0;
    say(&format!("gates:   {each:.1} instructions a satellite, at most {IDLE_SATELLITE}"));
    ensure!(each <= IDLE_SATELLITE, "{each:.1} instructions, at most {IDLE_SATELLITE} are allowed");
    for name in ["idle-home-8", "idle-satellite"] {
        let n = number(scenario(path, name, 1)?, "atomics")?;
        ensure!(n == 0.0, "{name}: {n} atomic read-modify-writes in an idle turn");
    }
    Ok(())
}

/// One for each batch of requests (the fence before a ring's final check), none for each request.
fn atomics(path: &Value) -> Result<()> {
    for name in [
        "read",
        "write",
        "read-stripe-4",
        "devices-1",
        "devices-4",
        "reactors-2",
        "read-satellite",
        "write-satellite",
        "read-home-8",
    ] {
        let n = number(scenario(path, name, 32)?, "atomics")?;
        ensure!(n <= 1.0 / 32.0 + 0.001, "{name}: {n} atomic read-modify-writes per request");
    }
    let n = number(scenario(path, "read", 1)?, "atomics")?;
    ensure!(n == 1.0, "read at depth 1: {n} atomic read-modify-writes per request: not counted?");
    Ok(())
}

fn path_is_quiet(path: &Value) -> Result<()> {
    for (name, depth) in [
        ("read", 1),
        ("read", 32),
        ("write", 1),
        ("write", 32),
        ("read-satellite", 1),
        ("read-satellite", 32),
        ("write-satellite", 32),
        ("hole-satellite", 32),
    ] {
        quiet(scenario(path, name, depth)?).with_context(|| format!("{name} at depth {depth}"))?;
    }
    Ok(())
}

/// No system call, allocation or lock, and all of them counted.
fn quiet(row: &Value) -> Result<()> {
    for key in ["syscalls", "allocations", "locks"] {
        let n = number(row, key)?;
        ensure!(n == 0.0, "{n} {key} per request");
    }
    Ok(())
}

fn fill(path: &Value) -> Result<()> {
    let rows = path["fill"].as_array().context("there is no fill")?;
    ensure!(rows.len() == 2, "fill was measured {} times", rows.len());
    for row in rows {
        let n = number(row, "writes_per_write")?;
        say(&format!("gates:   {n:.3} device writes per guest write: {row}"));
        ensure!((0.9..=FILL).contains(&n), "{n} device writes per guest write");
    }
    Ok(())
}

fn open(path: &Value) -> Result<()> {
    let (bytes, ms) =
        (number(&path["open_16t"], "memory_bytes")?, number(&path["open_16t"], "milliseconds")?);
    say(&format!("gates:   {:.1} MiB in {ms:.1} ms", bytes / 1_048_576.0));
    ensure!(bytes <= OPEN_BYTES, "{bytes} bytes");
    Ok(())
}

/// Each cold read is a miss, which costs one read of 4 KiB beside the guest's; no warm one is.
fn misses(full: &Value) -> Result<()> {
    let (cold, warm) = (&full["missing"], &full["warm"]);
    say(&format!("gates:   cold {cold}, warm {warm}"));
    let (reads, misses) = (number(cold, "reads")?, number(cold, "misses")?);
    ensure!(reads > 0.0 && misses == reads, "{misses} misses in {reads} cold reads");
    let (device, bytes) = (number(cold, "device_reads")?, number(cold, "device_bytes")?);
    ensure!(device == 2.0 * reads, "{device} reads of the device for {reads} cold reads");
    ensure!(bytes == 4096.0 * device, "{bytes} bytes in {device} reads");
    let (reads, misses) = (number(warm, "reads")?, number(warm, "misses")?);
    ensure!(reads > 0.0 && misses == 0.0, "{misses} misses in {reads} warm reads");
    let device = number(warm, "device_reads")?;
    ensure!(device == reads, "{device} reads of the device for {reads} warm reads");
    Ok(())
}

fn memory(full: &Value) -> Result<()> {
    let bytes = number(full, "bytes_per_cluster")?;
    ensure!(
        bytes <= CLUSTER_BYTES,
        "{bytes:.3} bytes for each cluster, {CLUSTER_BYTES} are allowed"
    );
    Ok(())
}

/// No more processor time than `qemu-img check` in the same run (a busy machine spoils other times), and
/// within its memory.
fn check(full: &Value) -> Result<()> {
    let (ours, theirs) = (&full["check"]["polldisk"], &full["check"]["qemu_img"]);
    say(&format!("gates:   {ours}, qemu-img {theirs}"));
    let most = number(&full["check"], "refcount_bytes")? * CHECK_SHARE + CHECK_BYTES;
    let peak = number(ours, "peak_bytes")?;
    ensure!(peak <= most, "{peak} bytes at most were resident, {most} are allowed");
    let (ours, theirs) = (number(ours, "cpu_seconds")?, number(theirs, "cpu_seconds")?);
    ensure!(ours <= theirs, "{ours:.2} s of processor time, qemu-img {theirs:.2} s");
    Ok(())
}

fn demo(polldisk: &Path, inject: Option<&str>, code: i32) -> Result<Value> {
    let mut args = vec!["demo", "--json", "--seconds", "2", "--size", "32M", "--policy", "poll"];
    if let Some(wrong) = inject {
        args.extend(["--inject", wrong]);
    }
    json(polldisk, &args, code)
}

fn demo_is_quiet(polldisk: &Path) -> Result<()> {
    let report = demo(polldisk, None, 0)?;
    ensure!(report["verified"] == true, "not verified: {}", report["failure"]);
    ensure!(number(&report, "verified_bytes")? > 0.0, "no byte was verified");
    quiet(&report)
}

/// A wrong thing done on purpose must show.
fn control(polldisk: &Path, wrong: &str) -> Result<()> {
    if wrong == "corrupt" {
        let report = demo(polldisk, Some(wrong), 1)?;
        ensure!(report["verified"] == false, "a changed byte went unnoticed");
        return Ok(());
    }
    let report = demo(polldisk, Some(wrong), 0)?;
    let key = match wrong {
        "syscall" => "syscalls",
        "alloc" => "allocations",
        _ => "locks",
    };
    ensure!(number(&report, key)? > 0.0, "{wrong} went unnoticed");
    ensure!(quiet(&report).is_err(), "the gate stayed green");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn bounds_are_kept_and_gaps_are_noticed() {
        let row = |n: f64| {
            json!({"scenarios": [{"name": "read", "depth": 32,
            "instructions_per_request": n, "layers": {"blkif": 1.0}}]})
        };
        assert!(instructions(&row(600.0), "read", 32, 600.0).is_ok());
        assert!(instructions(&row(600.1), "read", 32, 600.0).is_err());
        assert!(instructions(&row(1.0), "read", 1, 600.0).is_err());
        let mut blkif = row(600.0);
        blkif["scenarios"][0]["layers"]["blkif"] = json!(BACKEND);
        assert!(instructions(&blkif, "read", 32, 600.0).is_ok());
        blkif["scenarios"][0]["layers"]["blkif"] = json!(BACKEND + 0.1);
        assert!(instructions(&blkif, "read", 32, 600.0).is_err());
        blkif["scenarios"][0]["layers"] = json!({"other": 600.0});
        assert!(instructions(&blkif, "read", 32, 600.0).is_err());
        assert!(quiet(&json!({"syscalls": 0.0, "allocations": 0, "locks": 0})).is_ok());
        assert!(quiet(&json!({"syscalls": null, "allocations": 0, "locks": 0})).is_err());
        assert!(quiet(&json!({"syscalls": 0.001, "allocations": 0, "locks": 0})).is_err());
        assert!(
            fill(&json!({"fill": [{"writes_per_write": 1.0}, {"writes_per_write": 1.3}]})).is_err()
        );
        assert!(fill(&json!({"fill": []})).is_err());
        let full = |device: u64, misses: u64| {
            json!({
                "missing": {"reads": 8, "misses": 8, "device_reads": device,
                            "device_bytes": 4096 * device},
                "warm": {"reads": 9, "misses": misses, "device_reads": 9 + misses},
            })
        };
        assert!(super::misses(&full(16, 0)).is_ok());
        assert!(super::misses(&full(17, 0)).is_err());
        assert!(super::misses(&full(16, 1)).is_err());
        assert!(super::memory(&json!({"bytes_per_cluster": 8.1})).is_ok());
        assert!(super::memory(&json!({"bytes_per_cluster": 8.5})).is_err());
        let check = |peak: u64, seconds: f64| {
            json!({"check": {"refcount_bytes": 4096, "qemu_img": {"cpu_seconds": 1.0},
                             "polldisk": {"cpu_seconds": seconds, "peak_bytes": peak}}})
        };
        assert!(super::check(&check((64 << 20) + 1024, 1.0)).is_ok());
        assert!(super::check(&check((64 << 20) + 1025, 1.0)).is_err());
        assert!(super::check(&check(1, 1.1)).is_err());
    }
}
