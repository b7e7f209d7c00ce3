//! `polldisk ctl` against a running `polldisk nbd --control`, with a real NBD client: snapshot,
//! commit, stream and size, while the client's data stays what it is.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

const POLLDISK: &str = env!("CARGO_BIN_EXE_polldisk");

struct Served {
    child: Child,
    dir: PathBuf,
}

impl Served {
    fn start(dir: &Path, image: &str, more: &[&str]) -> Served {
        let mut child = Command::new(POLLDISK)
            .args(["nbd", "--socket", "nbd.sock", "--control", "ctl.sock"])
            .args(more)
            .arg(image)
            .current_dir(dir)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert!(line.starts_with("listening"), "{line}");
        Served { child, dir: dir.to_owned() }
    }

    fn ctl(&self, args: &[&str]) -> Output {
        let mut all = vec!["ctl", "--socket", "ctl.sock"];
        all.extend(args);
        Command::new(POLLDISK).args(all).current_dir(&self.dir).output().unwrap()
    }

    fn fine(&self, args: &[&str]) -> String {
        let out = self.ctl(args);
        let text = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(out.status.success(), "{args:?}: {text}");
        String::from_utf8(out.stdout).unwrap()
    }

    /// Runs commands of qemu-io over NBD.
    fn io(&self, commands: &[&str]) {
        let uri = format!("nbd+unix:///?socket={}", self.dir.join("nbd.sock").display());
        let mut io = Command::new("qemu-io");
        io.args(["-f", "raw"]);
        commands.iter().for_each(|c| {
            io.args(["-c", c]);
        });
        let out = io.arg(uri).output().unwrap();
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        assert!(out.status.success() && !text.contains("failed"), "{commands:?}: {text}");
    }

    fn stop(mut self) {
        let pid = nix::unistd::Pid::from_raw(self.child.id() as i32);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
        assert!(self.child.wait().unwrap().success());
        assert!(!self.dir.join("ctl.sock").exists(), "the control socket is left");
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn has_qemu() -> bool {
    let there = Command::new("qemu-io").arg("--version").output().is_ok();
    if !there {
        println!("skipped: qemu-io is not installed");
    }
    there
}

fn create(dir: &Path, name: &str) {
    let made = Command::new(POLLDISK)
        .args(["image", "create", "-q", "-f", "qcow2", name, "64M"])
        .current_dir(dir)
        .status();
    assert!(made.unwrap().success());
}

#[test]
fn a_chain_is_changed_while_it_is_served() {
    if !has_qemu() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    create(dir.path(), "base.qcow2");
    let two = std::thread::available_parallelism().is_ok_and(|n| n.get() > 1);
    let served =
        Served::start(dir.path(), "base.qcow2", if two { &["--cores", "0,1"] } else { &[] });
    served.io(&["write -P 1 0 1M", "flush"]);
    served.fine(&["snapshot", "a.qcow2"]);
    served.io(&["read -P 1 0 1M", "write -P 2 512k 1M"]);
    served.fine(&["snapshot", "b.qcow2"]);
    served.io(&["write -P 3 1M 64k", "read -P 1 0 512k", "read -P 2 512k 512k"]);
    let chain = served.fine(&["chain"]);
    let names: Vec<&str> = chain.lines().map(|l| l.rsplit('/').next().unwrap()).collect();
    assert_eq!(names.len(), 3, "{chain}");
    assert!(names[0].ends_with("b.qcow2") && names[2].ends_with("base.qcow2"), "{chain}");
    // a goes down into the base.
    let done = served.fine(&["commit", "1"]);
    assert!(done.contains("commit done"), "{done}");
    served.io(&["read -P 1 0 512k", "read -P 2 512k 512k", "read -P 3 1M 64k"]);
    served.fine(&["--json", "stream"]);
    assert_eq!(served.fine(&["chain"]).lines().count(), 1);
    served.io(&["read -P 1 0 512k", "read -P 2 512k 512k", "read -P 3 1M 64k"]);
    create(dir.path(), "other.qcow2");
    served.fine(&["rebase", "-b", "other.qcow2"]);
    assert!(served.fine(&["chain"]).contains("other.qcow2"));
    served.io(&["read -P 1 0 512k", "read -P 2 512k 512k", "read -P 3 1M 64k"]);
    served.fine(&["rebase", "-b", ""]);
    served.fine(&["resize", "128M"]);
    served.io(&["write -P 4 100M 64k", "read -P 4 100M 64k"]);
    let jobs = served.fine(&["jobs"]);
    assert_eq!(jobs.lines().filter(|l| l.contains("done")).count(), 4, "{jobs}");
    served.stop();
    for gone in ["base.qcow2", "a.qcow2"] {
        std::fs::remove_file(dir.path().join(gone)).unwrap();
    }
    let check = ["check", "b.qcow2"];
    let out = Command::new("qemu-img").args(check).current_dir(dir.path()).output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stdout));
    let last = ["-f", "qcow2", "-c", "read -P 3 1M 64k", "-c", "read -P 4 100M 64k", "b.qcow2"];
    let out = Command::new("qemu-io").args(last).current_dir(dir.path()).output().unwrap();
    assert!(!String::from_utf8_lossy(&out.stdout).contains("failed"));
}

#[test]
fn internal_snapshots_of_a_served_image() {
    if !has_qemu() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    create(dir.path(), "a.qcow2");
    let served = Served::start(dir.path(), "a.qcow2", &[]);
    served.io(&["write -P 1 0 1M", "flush"]);
    assert_eq!(served.fine(&["snapshot-internal", "list"]), "");
    served.fine(&["snapshot-internal", "create", "first"]);
    served.io(&["read -P 1 0 1M", "write -P 2 0 512k", "write -z 512k 128k", "discard 640k 64k"]);
    let json = served.fine(&["--json", "snapshot-internal", "create", "second"]);
    assert!(json.contains(r#""id": "2""#), "{json}");
    served.io(&["write -P 3 0 1M"]);
    let list = served.fine(&["snapshot-internal", "list"]);
    assert!(list.contains("first") && list.contains("second") && list.lines().count() == 4);
    served.fine(&["snapshot-internal", "delete", "first"]);
    let out = served.ctl(&["snapshot-internal", "delete", "first"]);
    assert!(String::from_utf8_lossy(&out.stderr).contains("has no snapshot \"first\""));
    assert!(!out.status.success());
    served.io(&["read -P 3 0 1M"]);
    served.stop();
    // Served again, as it is.
    let served = Served::start(dir.path(), "a.qcow2", &[]);
    served.io(&["read -P 3 0 1M", "write -P 4 256k 64k"]);
    served.stop();
    let run = |tool: &str, args: &[&str]| {
        let out = Command::new(tool).args(args).current_dir(dir.path()).output().unwrap();
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        assert!(out.status.success() && !text.contains("failed"), "{args:?}: {text}");
    };
    run("qemu-img", &["check", "a.qcow2"]);
    run("qemu-io", &["-r", "-f", "qcow2", "-c", "read -P 4 256k 64k", "a.qcow2"]);
    run("qemu-img", &["snapshot", "-a", "second", "a.qcow2"]);
    let reads = ["read -P 2 0 512k", "read -P 0 512k 192k", "read -P 1 704k 320k"];
    let mut args = vec!["-r", "-f", "qcow2", "a.qcow2"];
    reads.iter().for_each(|r| args.extend(["-c", r]));
    run("qemu-io", &args);
}

#[test]
fn jobs_are_slowed_and_stopped() {
    if !has_qemu() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    create(dir.path(), "base.qcow2");
    let served = Served::start(dir.path(), "base.qcow2", &[]);
    served.io(&["write -P 1 0 8M"]);
    served.fine(&["snapshot", "a.qcow2"]);
    let begun = served.fine(&["stream", "--rate", "64k", "--detach"]);
    assert_eq!(begun.trim(), "job 1");
    // One at a time.
    let out = served.ctl(&["snapshot", "b.qcow2"]);
    assert_eq!(out.status.code(), Some(1));
    let text = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(text.contains("job 1 (stream) is under way"), "{text}");
    served.io(&["read -P 1 0 8M"]);
    served.fine(&["cancel", "1"]);
    for tries in 0.. {
        if served.fine(&["jobs"]).contains("stopped") {
            break;
        }
        assert!(tries < 200, "the job goes on");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    assert_eq!(served.fine(&["chain"]).lines().count(), 2);
    // It is stopped by the end of the server, too.
    served.fine(&["stream", "--rate", "64k", "--detach"]);
    served.stop();
    let out = Command::new("qemu-img").args(["check", "a.qcow2"]).current_dir(dir.path()).output();
    assert!(out.unwrap().status.success());
}

#[test]
fn wrong_calls_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    create(dir.path(), "base.qcow2");
    let served = Served::start(dir.path(), "base.qcow2", &[]);
    for (args, code, why) in [
        (&["commit", "1"][..], 1, "no layer 1 below the top"),
        (&["snapshot", "base.qcow2"], 1, "in the chain already"),
        (&["snapshot", "no/such/file"], 1, "No such file"),
        (&["rebase", "-b", "no/such/file"], 1, "No such file"),
        (&["rebase", "-b", "base.qcow2", "-F", "vhd"], 2, "qcow2"),
        (&["resize", "100"], 1, "multiple of 512"),
        (&["resize", "much"], 2, "a size like"),
        (&["cancel", "7"], 1, "no job 7"),
        (&[], 2, "Usage"),
    ] {
        let out = served.ctl(args);
        let text = String::from_utf8_lossy(&out.stderr).into_owned();
        assert_eq!(out.status.code(), Some(code), "{args:?}: {text}");
        assert!(text.contains(why), "{args:?}: {text}");
    }
    let out = Command::new(POLLDISK).args(["ctl", "--socket", "none", "jobs"]).output().unwrap();
    assert!(String::from_utf8_lossy(&out.stderr).contains("is the server running"));
    served.stop();
}

#[test]
fn what_changing_chains_costs_is_measured() {
    let out = Command::new(POLLDISK).args(["bench", "chain", "--mib", "8", "--json"]).output();
    let out = out.unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let report: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(report["snapshot_stalls_ms"].as_array().unwrap().len(), 5);
    for key in ["stream_mib_s", "commit_mib_s", "copy_mib_s", "snapshot_stall_ms"] {
        assert!(report[key].as_f64().unwrap() > 0.0, "{key}");
    }
}
