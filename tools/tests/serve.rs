//! The daemon without Xen: images that come and go, what is done to them, and what it has given up.

use std::path::Path;
use std::process::Command;

#[path = "common/daemon.rs"]
mod daemon;

use daemon::{Daemon, POLLDISK};

fn create(dir: &Path, args: &[&str]) {
    let out = Command::new(POLLDISK).args(["image", "create"]).args(args).current_dir(dir).output();
    assert!(out.unwrap().status.success());
}

#[test]
fn images_come_and_go_and_change() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    create(dir, &["a.qcow2", "64M"]);
    create(dir, &["b.qcow2", "32M"]);
    let daemon = Daemon::start(dir, "policy = 'adaptive'");
    daemon.fine(&["attach", "a", "a.qcow2"]);
    daemon.fine(&["attach", "b", "b.qcow2", "--read-only"]);
    let list = daemon.fine(&["list"]);
    assert!(list.contains("image a open") && list.contains("67108864"), "{list}");
    assert!(daemon.refused(&["attach", "a", "a.qcow2"]).contains("already"));
    assert!(daemon.refused(&["attach", "c", "a.qcow2"]).contains("in use"));
    assert!(daemon.refused(&["attach", "c", "none.qcow2"]).contains("No such file"));
    assert!(daemon.refused(&["resize", "1G"]).contains("which image"));
    assert!(daemon.refused(&["--image", "z", "resize", "1G"]).contains("no image"));
    daemon.fine(&["--image", "a", "resize", "96M"]);
    daemon.fine(&["--image", "a", "snapshot", "over.qcow2"]);
    assert!(daemon.fine(&["--image", "a", "chain"]).contains("over.qcow2"));
    daemon.fine(&["--image", "a", "snapshot", "top.qcow2"]);
    daemon.fine(&["--image", "a", "commit", "1"]);
    daemon.fine(&["--image", "a", "stream"]);
    daemon.fine(&["--image", "a", "snapshot-internal", "create", "first"]);
    let stats = daemon.fine(&["--json", "stats"]);
    assert!(stats.contains("\"turns\""), "{stats}");
    daemon.fine(&["detach", "b"]);
    assert!(daemon.refused(&["detach", "b"]).contains("no image"));
    // Images that are attached are closed in order.
    daemon.stop();
    let check =
        Command::new(POLLDISK).args(["image", "check", "top.qcow2"]).current_dir(dir).output();
    assert!(check.unwrap().status.success());
}

/// A stripe of files is made, loaded and given up by a daemon that may do little: its reactor sleeps by a
/// descriptor of its own, which is made when the filter of system calls is there.
#[test]
fn an_image_on_a_stripe_of_files() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    for file in ["p0", "p1"] {
        std::fs::File::create(dir.join(file)).unwrap().set_len(64 << 20).unwrap();
    }
    create(dir, &["stripe:64k,p0,p1", "32M"]);
    let daemon = Daemon::start(dir, "policy = 'adaptive'");
    daemon.fine(&["attach", "s", "stripe:64k,p0,p1", "--nbd", "n"]);
    let load = "bench run --nbd n --rw randwrite --iodepth 8 --number-ios 2000 --verify";
    let out = Command::new(POLLDISK).args(load.split(' ')).current_dir(dir).output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    daemon.fine(&["detach", "s"]);
    daemon.stop();
    let check = ["image", "check", "stripe:64k,p0,p1"];
    let out = Command::new(POLLDISK).args(check).current_dir(dir).output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stdout));
}

/// No new privileges, few capabilities, a filter of system calls on every thread.
#[test]
fn it_gives_up_what_it_does_not_need() {
    let dir = tempfile::tempdir().unwrap();
    create(dir.path(), &["a.qcow2", "64M"]);
    let daemon = Daemon::start(dir.path(), "");
    daemon.fine(&["attach", "a", "a.qcow2"]);
    let tasks = std::fs::read_dir(format!("/proc/{}/task", daemon.child.id())).unwrap();
    let (mut seen, mut reactors) = (0, 0);
    for task in tasks {
        let status = std::fs::read_to_string(task.unwrap().path().join("status")).unwrap();
        let value = |key: &str| {
            let line = status.lines().find_map(|l| l.strip_prefix(key)).unwrap();
            line.trim().to_owned()
        };
        // A reactor has another list besides that of the process (Linux 5.9 counts them).
        let lists = if value("Name:").starts_with("reactor") { "2" } else { "1" };
        assert!(
            !status.contains("Seccomp_filters") || value("Seccomp_filters:") == lists,
            "{status}"
        );
        reactors += usize::from(lists == "2");
        assert_eq!((value("Seccomp:"), value("NoNewPrivs:")), ("2".into(), "1".into()), "{status}");
        let caps = u64::from_str_radix(&value("CapEff:"), 16).unwrap();
        // CAP_DAC_OVERRIDE and CAP_IPC_LOCK.
        assert_eq!(caps & !(1 << 1 | 1 << 14), 0, "{status}");
        seen += 1;
    }
    assert!(seen >= 4 && reactors == 1, "{seen} threads, {reactors} reactors");
    daemon.stop();
}

#[test]
fn the_configuration_is_checked() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("c.toml");
    let check = || {
        Command::new(POLLDISK).args(["serve", "--check", "--config"]).arg(&file).output().unwrap()
    };
    std::fs::write(&file, "policy = 'poll'\n").unwrap();
    assert!(check().status.success());
    std::fs::write(&file, "policy = 'pool'\n").unwrap();
    let out = check();
    assert_eq!(out.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&out.stderr).contains("policy"));
}
