//! `polldisk bench compare` with the peers that are here, and with stand-ins for some that are not.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

const POLLDISK: &str = env!("CARGO_BIN_EXE_polldisk");

fn has(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(program).is_file())
}

/// `false` if a peer is not here, which only a developer's machine may lack.
fn here(programs: &[&str]) -> bool {
    let missing = programs.iter().find(|p| !has(p));
    if let Some(missing) = missing {
        assert!(std::env::var("CI").as_deref() != Ok("true"), "{missing} is not installed");
        println!("skipped: {missing} is not installed");
    }
    missing.is_none()
}

/// A very short comparison, with the programs of `first` before all others.
fn compare(dir: &Path, first: &Path, args: &[&str]) -> Output {
    let path = std::env::var("PATH").unwrap_or_default();
    let mut command = Command::new(POLLDISK);
    command.env("PATH", format!("{}:{path}", first.display()));
    command.args([
        "bench",
        "compare",
        "--profile",
        "latency",
        "--quick",
        "--json",
        "--rounds",
        "2",
    ]);
    command.arg("--scratch").arg(dir).args(args).output().unwrap()
}

#[track_caller]
fn json(out: &Output) -> Value {
    let errors = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{errors}");
    serde_json::from_slice(&out.stdout).unwrap()
}

/// A program of that name: a shell script.
fn program(dir: &Path, name: &str, script: &str) {
    let path = dir.join(name);
    std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
}

fn rows<'a>(c: &'a Value, peer: &str, frontend: &str) -> Vec<&'a Value> {
    let all = c["results"].as_array().unwrap().iter();
    all.filter(|r| r["peer"] == peer && r["frontend"] == frontend).collect()
}

#[test]
fn peers_that_are_here_are_compared_and_others_are_named() {
    if !here(&["qemu-storage-daemon", "nbdkit"]) {
        return;
    }
    let (dir, none) = (tempfile::tempdir().unwrap(), Path::new("/nonexistent"));
    let results = dir.path().join("out");
    let out = results.to_string_lossy();
    let c = json(&compare(dir.path(), none, &["--budget", "3", "--out", &out]));
    let kept: Value =
        serde_json::from_slice(&std::fs::read(results.join("results.json")).unwrap()).unwrap();
    assert_eq!(kept, c);
    for peer in c["peers"].as_array().unwrap() {
        let name = peer["name"].as_str().unwrap();
        let program = if name == "tapdisk" { "tap-ctl" } else { name };
        if name != "polldisk" && !has(program) {
            assert!(peer["absent"].as_str().unwrap().contains("is not on PATH"), "{peer}");
            assert!(rows(&c, name, "nbd").is_empty());
        }
    }
    for row in c["results"].as_array().unwrap() {
        assert!(row["iops"].as_f64().unwrap() > 0.0, "{row}");
        assert!(row["latency_ns"].as_u64().unwrap() > 0, "{row}");
        assert!(row["cpu_us_per_io"].as_f64().unwrap() > 0.0, "{row}");
        assert_eq!(row["rounds"].as_array().unwrap().len(), 2);
        assert_eq!((&row["block_size"], &row["depth"]), (&Value::from(4096), &Value::from(1)));
    }
    // Reads and writes.
    let (ring, nbd) = (rows(&c, "polldisk", "ring"), rows(&c, "polldisk", "nbd"));
    assert_eq!((ring.len(), nbd.len()), (2, 2));
    for row in &ring {
        assert_eq!(row["ratio"], 1.0);
        if let Some(syscalls) = row["syscalls_per_io"].as_f64() {
            // On a busy machine the reactor sleeps at times.
            assert!(syscalls < 3.0, "{row}");
        }
        assert!(row["cpu_us_per_io_polling"].as_f64() >= row["cpu_us_per_io"].as_f64(), "{row}");
    }
    for row in rows(&c, "qemu-storage-daemon", "nbd") {
        let same = |r: &&&Value| r["workload"] == row["workload"];
        let ours = nbd.iter().find(same).unwrap()["cpu_us_per_io"].as_f64().unwrap();
        let (cpu, ratio) = (row["cpu_us_per_io"].as_f64().unwrap(), row["ratio"].as_f64().unwrap());
        assert!((ratio - cpu / ours).abs() < 1e-9, "{row}");
        let interval: Vec<f64> = serde_json::from_value(row["ratio_interval"].clone()).unwrap();
        assert!(interval[0] <= ratio && ratio <= interval[1], "{row}");
        let floor = rows(&c, "nbdkit", "nbd").into_iter();
        let mut floor = floor.filter(|r| r["variant"] == "memory").filter(|r| same(&r));
        let floor = floor.next().unwrap()["cpu_us_per_io"].as_f64().unwrap();
        let above = row["cpu_us_above_floor"].as_f64().unwrap();
        assert!((above - (cpu - floor)).abs() < 1e-9, "{row}");
    }
    assert!(!rows(&c, "qemu-storage-daemon", "nbd").is_empty());
    // Nothing is left.
    let left: Vec<_> =
        std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["out"]);
}

#[test]
fn a_peer_that_dies_under_load_is_an_error_that_names_its_log() {
    if !here(&["nbdkit"]) {
        return;
    }
    let (dir, bin) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let path = std::env::var_os("PATH").unwrap_or_default();
    let nbdkit = std::env::split_paths(&path).map(|d| d.join("nbdkit")).find(|p| p.is_file());
    let nbdkit = nbdkit.unwrap().display().to_string();
    let script = format!(
        "[ \"$1\" = --version ] && exec {nbdkit} --version\n\
         {nbdkit} \"$@\" & sleep 2\necho out of luck >&2\nkill -9 $!\nexit 7"
    );
    program(bin.path(), "nbdkit", &script);
    let out = compare(dir.path(), bin.path(), &["--budget", "60", "--peer", "nbdkit"]);
    let errors = String::from_utf8_lossy(&out.stderr);
    assert!(!out.status.success());
    let last = errors.lines().last().unwrap();
    for text in ["nbdkit memory", "exit status: 7", "nbdkit.log", "out of luck"] {
        assert!(last.contains(text), "{errors}");
    }
}

#[test]
fn a_peer_that_does_not_start_is_left_out_with_a_note() {
    let (dir, bin) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    program(
        bin.path(),
        "qemu-nbd",
        "[ \"$1\" = --version ] && echo qemu-nbd 1.0 && exit\necho no >&2\nexit 1",
    );
    let c = json(&compare(dir.path(), bin.path(), &["--budget", "1", "--peer", "qemu-nbd"]));
    assert!(rows(&c, "qemu-nbd", "nbd").is_empty());
    let notes = c["notes"].to_string();
    assert!(notes.contains("qemu-nbd") && notes.contains("does not start"), "{notes}");
    assert_eq!(rows(&c, "polldisk", "nbd").len(), 2);
}

/// qemu-storage-daemon understands the QMP of qemu-dp; its command line is made to.
#[test]
fn qemu_dp_is_driven_by_qmp() {
    if !here(&["qemu-storage-daemon"]) {
        return;
    }
    let (dir, bin) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let script = "[ \"$1\" = --version ] && echo qemu-dp 2.11 && exit\n\
                  exec qemu-storage-daemon --chardev socket,id=m,path=\"$1\",server=on,wait=off \
                  --monitor chardev=m";
    program(bin.path(), "qemu-dp", script);
    let c = json(&compare(dir.path(), bin.path(), &["--budget", "1", "--peer", "qemu-dp"]));
    let all = rows(&c, "qemu-dp", "nbd");
    assert_eq!(all.len(), 2, "{}", c["notes"]);
    assert!(all.iter().all(|r| r["variant"] == "aio=native"));
}

/// tap-ctl as of a stand-in: tapdisk is a process that waits for its image and becomes qemu-nbd, which has VHD
/// images, too, and listens where tapdisk would.
const TAP_CTL: &str = r#"echo "$1" >> "$STATE/verbs"
case $1 in
allocate) echo /dev/xen/blktap-2/tapdisk-7 ;;
spawn)
    sh -c 'while [ ! -e "$STATE/open" ]; do sleep 0.05; done
        exec qemu-nbd --persistent --shared=4 -x "" -f vpc --cache=none --aio=native \
            -k /run/blktap-control/nbd$$.7 "$(cat "$STATE/open")"' > /dev/null 2>&1 < /dev/null &
    echo $! ;;
attach) [ "$2 $4 $5" = "-p -m 7" ] && kill -0 "$3" ;;
open)
    image=${7#vhd:}
    [ "$6" = -a ] && [ -f "$image" ] && echo "$image" > "$STATE/new" && mv "$STATE/new" "$STATE/open" ;;
close) kill "$3" && rm "$STATE/open" ;;
detach) ;;
free) [ "$2 $3" = "-m 7" ] ;;
*) exit 1 ;;
esac"#;

/// In namespaces of its own: tapdisk's sockets have their place below /run, and it is nobody's child.
#[test]
fn tapdisk_is_driven_by_tap_ctl() {
    if !here(&["qemu-nbd", "unshare"]) {
        return;
    }
    let (dir, bin) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let state = tempfile::tempdir().unwrap();
    program(bin.path(), "tap-ctl", TAP_CTL);
    program(bin.path(), "tapdisk", "exit 1");
    let path = std::env::var("PATH").unwrap_or_default();
    let mut command = Command::new("unshare");
    command.args(["--mount", "--pid", "--fork", "--mount-proc", "sh", "-c"]);
    let script = "mount -t tmpfs run /run && mkdir /run/blktap-control || exit 77; \"$@\"";
    command.args([script, "sh", POLLDISK, "bench", "compare", "--profile", "latency", "--quick"]);
    command.args(["--json", "--rounds", "2", "--budget", "2", "--peer", "tapdisk", "--scratch"]);
    command.arg(dir.path()).env("STATE", state.path());
    let out = command.env("PATH", format!("{}:{path}", bin.path().display())).output().unwrap();
    let said = String::from_utf8_lossy(&out.stderr);
    if out.status.code() == Some(77) || said.contains("unshare failed") {
        assert!(std::env::var("CI").as_deref() != Ok("true"), "{said}");
        println!("skipped: namespaces cannot be made: {said}");
        return;
    }
    let c = json(&out);
    let all = rows(&c, "tapdisk", "nbd");
    assert_eq!(all.len(), 2, "{}", c["notes"]);
    assert!(all.iter().all(|r| r["variant"] == "vhd" && r["iops"].as_f64().unwrap() > 0.0));
    let verbs = std::fs::read_to_string(state.path().join("verbs")).unwrap();
    let verbs: Vec<&str> = verbs.lines().collect();
    let once = ["allocate", "spawn", "attach", "open", "close", "detach", "free"];
    assert!(verbs.chunks(once.len()).all(|all| all == once), "{verbs:?}");
    assert_eq!(verbs.len(), 3 * once.len(), "two rounds, and one in which calls are counted");
}

/// Each kind of disk, content and load, however shortly; of a peer that is always here.
#[test]
fn every_profile_runs() {
    let list = Command::new(POLLDISK).args(["bench", "compare", "--list", "--json"]).output();
    let list: Value = serde_json::from_slice(&list.unwrap().stdout).unwrap();
    let profiles = list["profiles"].as_array().unwrap();
    assert_eq!(profiles.len(), 10);
    for profile in profiles {
        let (dir, name) = (tempfile::tempdir().unwrap(), profile["name"].as_str().unwrap());
        let mut command = Command::new(POLLDISK);
        command.args(["bench", "compare", "--quick", "--json", "--rounds", "1", "--budget", "0.5"]);
        command.args(["--peer", "polldisk", "--profile", name]).arg("--scratch").arg(dir.path());
        let c = json(&command.output().unwrap());
        assert!(rows(&c, "polldisk", "ring").iter().all(|r| r["iops"].as_f64().unwrap() > 0.0));
        assert!(!rows(&c, "polldisk", "ring").is_empty(), "{name}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "{name}");
    }
}

#[test]
fn profiles_and_peers_are_listed() {
    let run = |args: &[&str]| Command::new(POLLDISK).args(["bench", "compare"]).args(args).output();
    let out = run(&["--list"]).unwrap();
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    for word in ["l2-cache", "snapshot-chain", "many-disks", "polldisk", "spdk_nvme_perf"] {
        assert!(text.lines().any(|l| l.starts_with(word)), "{text}");
    }
    for wrong in [
        &["--profile", "all"][..],
        &["--profile", "random", "--peer", "qemu"],
        &["--profile", "random", "--rounds", "0"],
        &["--profile", "random", "--cores", "1"],
        &[],
    ] {
        assert_eq!(run(wrong).unwrap().status.code(), Some(2), "{wrong:?}");
    }
}
