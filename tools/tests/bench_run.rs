//! `polldisk bench run`, as users run it: on a ring, a node and NBD servers. Counts are asserted, not times.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use serde_json::Value;

fn polldisk(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_polldisk"));
    command.args(args).stdin(Stdio::null());
    command
}

/// Runs a job; its exit code and what it prints on both outputs.
fn attempt(args: &[&str]) -> (Option<i32>, String, String) {
    let out = polldisk(&[&["bench", "run"], args].concat()).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (out.status.code(), text(&out.stdout), text(&out.stderr))
}

fn json(args: &[&str]) -> Value {
    let (code, out, err) = attempt(&[&["--json"], args].concat());
    assert_eq!(code, Some(0), "{args:?}: {out} {err}");
    serde_json::from_str(&out).unwrap()
}

/// A server, ended when dropped.
struct Served(Child);

impl Served {
    /// One that says on which socket it listens.
    fn polldisk(image: &str, socket: &str) -> Served {
        let args = ["nbd", "--socket", socket, "--export", "disk", image];
        let mut child = polldisk(&args).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert!(line.starts_with("listening on "), "{line:?}");
        Served(child)
    }

    fn stop(mut self) {
        let pid = nix::unistd::Pid::from_raw(self.0.id() as i32);
        nix::sys::signal::kill(pid, nix::sys::signal::SIGTERM).unwrap();
        assert_eq!(self.0.wait().unwrap().code(), Some(0));
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn create(dir: &Path) -> String {
    let image = dir.join("disk.qcow2").display().to_string();
    assert!(polldisk(&["image", "create", &image, "16M"]).status().unwrap().success());
    image
}

fn check(image: &str) {
    let checked = polldisk(&["image", "check", image]).stdout(Stdio::null()).status().unwrap();
    assert_eq!(checked.code(), Some(0), "{image} does not check clean");
}

/// What every outcome has.
fn whole(r: &Value) {
    let o = &r["outcome"];
    assert!(o["requests"].as_u64().unwrap() > 0 && o["bytes"].as_u64().unwrap() > 0, "{r}");
    assert_eq!(o["errors"], 0, "{r}");
    for key in ["seconds", "iops"] {
        assert!(o[key].as_f64().unwrap() > 0.0, "{key}");
    }
    for key in ["min", "p50", "p90", "p99", "p99_9", "p99_99", "p99_999", "max"] {
        assert!(o["latency_ns"][key].as_u64().unwrap() > 0, "{key}");
    }
    let cdf = o["cdf"].as_array().unwrap();
    assert!((1..=200).contains(&cdf.len()) && cdf.last().unwrap()[1] == 1.0, "{cdf:?}");
    assert!(o["windows"].is_array());
}

#[test]
fn a_ring_is_loaded_without_a_system_call() {
    let dir = tempfile::tempdir().unwrap();
    let image = format!("model:{}", create(dir.path()));
    // All of it is written and read back, so that what is counted later are hits.
    #[rustfmt::skip]
    let r = json(&["--ring", &image, "--rw", "write", "--bs", "64k", "--iodepth", "32", "--verify",
        "--number_ios", "256", "--runtime", "60", "--fsync", "50"]);
    whole(&r);
    assert_eq!(
        (&r["outcome"]["requests"], &r["outcome"]["verified_bytes"]),
        (&256.into(), &(16 << 20).into())
    );
    assert!(r["outcome"]["flushes"].is_object() && r["outcome"]["writes"].is_object(), "{r}");
    #[rustfmt::skip]
    let r = json(&["--ring", &image, "--iodepth", "32", "--runtime", "0.3", "--counts",
        "--ramp_time", "0.05", "--policy", "poll", "--random_distribution", "zipf:0.9"]);
    whole(&r);
    assert!(r["missing"].is_string() || r["server_per_request"]["syscalls"] == 0.0, "{r}");
    assert_eq!(r["server_per_request"]["allocations"], 0.0);
    for key in ["cpu_us", "busy_us"] {
        assert!(r["server_per_request"][key].as_f64().unwrap() > 0.0, "{key}");
    }
    assert_eq!(r["job"]["shape"]["depth"], 32);
    check(&image);
}

#[test]
fn a_node_is_loaded_and_verified() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("disk");
    std::fs::File::create(&file).unwrap().set_len(8 << 20).unwrap();
    for node in [format!("model:{}", file.display()), file.display().to_string(), "mem:8M".into()] {
        #[rustfmt::skip]
        let r = json(&["--node", &node, "--rw", "randrw", "--rwmixread", "30", "--iodepth", "16",
            "--bssplit", "4k/50:32k/50", "--verify", "--number-ios", "600", "--runtime", "60"]);
        whole(&r);
        assert_eq!(r["outcome"]["requests"], 600);
        assert!(r["outcome"]["verified_bytes"].as_u64().unwrap() > 1 << 20, "{r}");
        assert!(r["outcome"]["server"]["cpu_ns"].is_null());
    }
    // It must have written for this to be checked; what is only read needs no right to write.
    let mut permissions = std::fs::metadata(&file).unwrap().permissions();
    permissions.set_readonly(true);
    std::fs::set_permissions(&file, permissions).unwrap();
    whole(&json(&["--node", &file.display().to_string(), "--number_ios", "10"]));
    let (code, _, err) = attempt(&["--node", "mem:1M", "--offset", "1M"]);
    assert!(code == Some(1) && err.contains("range of 0 bytes"), "{err}");
}

#[test]
fn servers_of_nbd_are_loaded_and_measured() {
    let dir = tempfile::tempdir().unwrap();
    let (image, socket) = (create(dir.path()), dir.path().join("socket").display().to_string());
    let served = Served::polldisk(&image, &socket);
    let pid = served.0.id().to_string();
    let at = ["--nbd", &socket, "--export", "disk"];
    #[rustfmt::skip]
    let r = json(&[&at[..], &["--rw", "randrw", "--rwmixtrim", "10", "--bssplit", "4k/70:1m/30",
        "--iodepth", "8", "--verify", "--fsync", "20", "--number_ios", "500", "--runtime", "60"]].concat());
    whole(&r);
    assert_eq!(r["outcome"]["requests"], 500);
    for key in ["reads", "writes", "trims", "flushes"] {
        assert!(r["outcome"][key]["p50"].as_u64().unwrap() > 0, "{key}");
    }
    assert!(r["outcome"]["verified_bytes"].as_u64().unwrap() > 1 << 20, "{r}");
    #[rustfmt::skip]
    let r = json(&[&at[..], &["--rate_iops", "2000", "--iodepth", "64", "--runtime", "0.5",
        "--ramp-time", "0.05", "--pid",
        &pid, "--counts"]].concat());
    whole(&r);
    // Half a second at that rate: less only if the machine is very busy.
    assert!((1..=1001).contains(&r["outcome"]["requests"].as_u64().unwrap()), "{r}");
    let each = &r["server_per_request"];
    assert!(each["cpu_us"].as_f64().unwrap() > 0.0 && each["switches"].is_number(), "{each}");
    // A reply is one at least.
    let calls = each["syscalls"].as_f64();
    assert!(calls.map_or(r["missing"].is_string(), |n| n >= 0.9), "{r}");
    for (bad, text) in
        [("--export=other", "no export \"other\""), ("--pid=4000000", "process 4000000")]
    {
        let (code, _, err) = attempt(&["--nbd", &socket, bad]);
        assert!(code == Some(1) && err.contains(text), "{err}");
    }
    served.stop();
    check(&image);
    let (code, _, err) = attempt(&at);
    assert!(code == Some(1) && err.contains(&socket), "{err}");
}

#[test]
fn qemu_s_servers_are_loaded_as_ours() {
    let there = Command::new("qemu-nbd").arg("--version").stdout(Stdio::null()).status();
    if !there.is_ok_and(|s| s.success()) {
        assert!(std::env::var_os("CI").is_none_or(|v| v.is_empty()), "qemu-nbd is not installed");
        println!("skipped: qemu-nbd is not installed");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (image, socket) = (create(dir.path()), dir.path().join("socket").display().to_string());
    let mut command = Command::new("qemu-nbd");
    command.args(["--socket", &socket, "--export-name", "disk", "--format", "qcow2"]);
    command.args(["--persistent", "--discard", "unmap", &image]).stdin(Stdio::null());
    let served = Served(command.spawn().unwrap());
    for _ in 0..1000 {
        if Path::new(&socket).exists() {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    #[rustfmt::skip]
    let r = json(&["--nbd", &socket, "--export", "disk", "--rw", "randrw", "--rwmixtrim", "10",
        "--bssplit", "4k/70:1m/30", "--iodepth", "16", "--verify", "--fsync", "20", "--number_ios",
        "300", "--runtime", "60", "--pid", &served.0.id().to_string()]);
    whole(&r);
    assert_eq!(r["outcome"]["requests"], 300);
    assert!(r["outcome"]["verified_bytes"].as_u64().unwrap() > 1 << 20, "{r}");
    assert!(r["server_per_request"]["cpu_us"].as_f64().unwrap() > 0.0);
    drop(served);
}

#[test]
fn people_are_told_what_came_of_it() {
    let job = ["--node", "mem:1M", "--rw", "randwrite", "--number_ios", "100", "--verify"];
    let (code, out, err) = attempt(&job);
    assert_eq!(code, Some(0), "{err}");
    for text in [
        "randwrite, 4096 bytes, depth 1, on node mem:1048576",
        "100 requests in",
        "p99.999",
        "verified: ",
    ] {
        assert!(out.contains(text), "{text}: {out}");
    }
    // A command line that is wrong, and a job that is.
    assert_eq!(attempt(&["--rw", "randread"]).0, Some(2));
    assert_eq!(attempt(&["--node", "mem:1M", "--ring", "mem:1M"]).0, Some(2));
    assert_eq!(attempt(&["--node", "mem:1M", "--bs", "4k", "--bssplit", "4k/100"]).0, Some(2));
    assert_eq!(attempt(&["--node", "mem:1M", "--bssplit", "4k/50"]).0, Some(1));
    assert_eq!(attempt(&["--node", "mem:1M", "--iodepth", "0"]).0, Some(1));
}
