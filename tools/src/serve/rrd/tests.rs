//! The file, read by a program that was written from rrdd's description of it.

use std::process::Command;

use reactor::Histogram;
use serde_json::Value as Json;

use super::*;

const READER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/rrdd.py");

/// What the reader finds; `None` if there is no Python here.
fn judged(path: &Path) -> Option<Json> {
    let Ok(out) = Command::new("python3").arg(READER).arg(path).output() else {
        tell!("skipped: python3 is not installed");
        return None;
    };
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    Some(serde_json::from_slice(&out.stdout).unwrap())
}

fn value(read: &Json, name: &str, owner: &str) -> f64 {
    let all = read["sources"].as_array().unwrap();
    let mut found = all.iter().filter(|s| s[0] == name && s[1] == owner);
    let source = found.next().unwrap_or_else(|| panic!("no {name} of {owner}"));
    source[5].as_f64().unwrap()
}

fn vm(n: u32) -> String {
    format!("{n:08x}-0f5d-4a47-9d0e-3b8c2f1a6d55")
}

fn disk(domid: u16, devid: u32, io: Io) -> Disk {
    let name = crate::serve::figures::vbd_name(devid);
    let user = User::Guest { id: Id { domid, devid }, name, vm: Some(vm(domid.into())) };
    Disk { image: format!("{domid}"), sr: None, user, io }
}

fn busy(n: u64) -> Io {
    let times = Histogram::default();
    (0..n).for_each(|_| times.record(50_000));
    Io {
        reads: n,
        writes: 2 * n,
        read_bytes: n << 20,
        written_bytes: n << 21,
        in_flight: 3,
        in_flight_ns: n * 300_000,
        read_latency: times.read(),
        ..Io::default()
    }
}

fn figures(disks: Vec<Disk>, busy_ns: u64) -> Figures {
    let reactor = OfReactor {
        turns: 0,
        idle_turns: 0,
        sleeps: 0,
        completions: 0,
        strays: 0,
        busy_ns,
        idle_ns: 1000,
    };
    Figures { reactors: vec![reactor], disks }
}

#[test]
fn a_reader_finds_what_was_done_since_the_last_time() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m/polldisk");
    let mut target = Target::open(&path).unwrap();
    assert_eq!(target.uid(), None, "rrdd does not look there");
    let mut put = |figures, last: &Last, at_ns, time| {
        let (list, now) = sources(figures, last, at_ns);
        target.write(&encode(&list, time).unwrap()).unwrap();
        (judged(&path), now)
    };
    let (a, b) = (vm(1), vm(2));
    let (owner_a, owner_b) = (format!("vm {a}"), format!("vm {b}"));
    let disks = vec![disk(1, 51712, busy(100)), disk(2, 51712, busy(7)), disk(2, 51728, busy(0))];
    let sr = Some("5ec0ffee-0f5d-4a47-9d0e-3b8c2f1a6d55".to_owned());
    let nobody = Disk { user: User::Nbd, sr: sr.clone(), ..disk(3, 51712, busy(4)) };
    let nameless = User::Guest { id: Id { domid: 9, devid: 1 }, name: "1".into(), vm: None };
    let nameless = Disk { user: nameless, ..disk(9, 1, busy(4)) };
    let all = [disks, vec![nobody.clone(), nameless]].concat();
    let (read, last) = put(figures(all, 0), &Last::default(), 1_000_000_000, 1.5e9);
    let Some(read) = read else { return };
    assert_eq!(read["time"], 1.5e9);
    assert_eq!(read["sources"].as_array().unwrap().len(), 4 * 14 + 1);
    assert_eq!(value(&read, "read_5ec0ffee", "host"), (4 << 20) as f64);
    assert_eq!(value(&read, "vbd_xvda_read", &owner_a), (100u64 << 20) as f64);
    assert_eq!(value(&read, "vbd_xvda_iops_read", &owner_a), 0.0, "nothing is known of before");
    // Two seconds later. One has done more, one has begun anew, one has gone.
    let disks = vec![
        Disk { sr, ..disk(1, 51712, busy(300)) },
        disk(2, 51712, busy(5)),
        Disk { io: busy(10), ..nobody },
    ];
    let (read, last) = put(figures(disks, 3000), &last, 3_000_000_000, 1.5e9 + 2.0);
    let read = read.unwrap();
    assert_eq!(read["sources"].as_array().unwrap().len(), 3 * 14 + 1);
    assert_eq!(value(&read, "iops_read_5ec0ffee", "host"), 206.0);
    assert_eq!(value(&read, "inflight_5ec0ffee", "host"), 6.0);
    for (what, a, b) in [
        ("read", (300u64 << 20) as f64, (5 << 20) as f64),
        ("write", (600u64 << 20) as f64, (10 << 20) as f64),
        ("read_latency", 50.0, 50.0),
        ("write_latency", 0.0, 0.0),
        ("io_throughput_read", 200.0, 5.0),
        ("io_throughput_write", 400.0, 10.0),
        ("io_throughput_total", 600.0, 15.0),
        ("iops_read", 200.0, 5.0),
        ("iops_write", 400.0, 10.0),
        ("iops_total", 600.0, 15.0),
        ("iowait", 0.06, 0.0015),
        ("inflight", 3.0, 3.0),
        ("latency", 100.0, 100.0),
        ("avgqu_sz", 0.03, 0.00075),
    ] {
        let name = format!("vbd_xvda_{what}");
        for (owner, expected) in [(&owner_a, a), (&owner_b, b)] {
            let found = value(&read, &name, owner);
            assert!((found - expected).abs() < 1e-9, "{name} of {owner}: {found}, not {expected}");
        }
    }
    assert_eq!(value(&read, "polldisk_reactor0_busy", "host"), 1.0);
    // Nothing but the reactors is left, and the file is the same one.
    let before = std::fs::metadata(&path).unwrap();
    let (read, _) = put(figures(Vec::new(), 3000), &last, 9_000_000_000, 1.5e9 + 8.0);
    assert_eq!(read.unwrap()["sources"].as_array().unwrap().len(), 1);
    let after = std::fs::metadata(&path).unwrap();
    assert_eq!((before.ino(), before.len()), (after.ino(), after.len()));
    drop(target);
    assert!(!path.exists());
}

#[test]
fn very_many_disks_and_the_largest_counters() {
    let dir = tempfile::tempdir().unwrap();
    let mut target = Target::open(&dir.path().join("polldisk")).unwrap();
    let most = Io {
        reads: u64::MAX,
        writes: u64::MAX,
        flushes: u64::MAX,
        read_bytes: u64::MAX,
        written_bytes: u64::MAX,
        in_flight: u64::MAX,
        in_flight_ns: u64::MAX,
        ..Io::default()
    };
    let disks = (0..3000u16).map(|n| disk(n, 1 << 28 | u32::from(n) << 8, most.clone())).collect();
    // As if all of it had come since the last time, which was just now.
    let mut last = Last::default();
    last.disks.extend((0..3000u16).map(|n| {
        let id = Id { domid: n, devid: 1 << 28 | u32::from(n) << 8 };
        ((format!("{n}"), Some(id)), Io::default())
    }));
    let (list, _) = sources(figures(disks, u64::MAX), &last, 0);
    target.write(&encode(&list, 1.0).unwrap()).unwrap();
    let Some(read) = judged(&target.path) else { return };
    assert_eq!(read["sources"].as_array().unwrap().len(), 3000 * 14 + 1);
    let owner = format!("vm {}", vm(2999));
    assert_eq!(value(&read, "vbd_xvddkj_read", &owner), i64::MAX as f64);
}

#[test]
fn what_is_not_ours_alone_is_not_written_to() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    std::fs::write(at("other"), "precious").unwrap();
    std::os::unix::fs::symlink(at("other"), at("link")).unwrap();
    std::fs::hard_link(at("other"), at("hard")).unwrap();
    std::fs::create_dir(at("folder")).unwrap();
    nix::unistd::mkfifo(&at("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    for name in ["link", "hard", "folder", "pipe", "other/x"] {
        let error = format!("{:#}", Target::open(&at(name)).err().unwrap());
        assert!(error.contains(name.split('/').next().unwrap()), "{error}");
        assert!(at(name.split('/').next().unwrap()).exists());
    }
    assert_eq!(std::fs::read(at("other")).unwrap(), b"precious");
    for (path, fine) in [
        ("/dev/shm/metrics/polldisk", true),
        ("metrics/polldisk", false),
        ("/dev/shm/metrics/..", false),
        ("/dev/shm/metrics/a\nb", false),
        ("/", false),
    ] {
        assert_eq!(check(Path::new(path)).is_ok(), fine, "{path}");
    }
}
