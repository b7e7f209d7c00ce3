//! Real clients: nbdinfo, nbdcopy, qemu-img, qemu-io, fio. A tool that is not there skips its
//! test, unless `CI` says that it must be there.

mod common;

use std::process::{Command, Stdio};
use std::time::Duration;

use block::Op;
use common::*;

/// Runs a command and returns what it printed; it has to succeed.
fn run(tool: &str, args: &[&str]) -> String {
    let out = Command::new(tool).args(args).stdin(Stdio::null()).output().unwrap();
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let errors = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{tool} {args:?}: {}\n{text}{errors}", out.status);
    text
}

/// Data with holes: a third of its chunks of 64 KiB are empty.
fn sparse(len: usize) -> Vec<u8> {
    let mut random = Random(len as u64);
    let mut bytes = vec![0; len];
    for chunk in bytes.chunks_mut(65536) {
        if random.below(3) > 0 {
            chunk.copy_from_slice(&random.bytes(chunk.len()));
        }
    }
    bytes
}

#[test]
fn nbdinfo_sees_what_is_offered() {
    if !have("nbdinfo") {
        return;
    }
    let h = Harness::new(Setup::default());
    h.data.write(1 << 20, &[1; 65536]);
    let json = run("nbdinfo", &["--json", &h.uri()]);
    for field in [
        "\"export-size\": 16777216",
        "\"block_size_minimum\": 512",
        "\"block_size_maximum\": 33554432",
        "\"base:allocation\"",
        "\"can_df\": true",
        "\"can_fast_zero\": true",
        "\"can_flush\": true",
        "\"can_fua\": true",
        "\"can_multi_conn\": true",
        "\"can_trim\": true",
        "\"can_zero\": true",
        "\"is_read_only\": false",
        "\"structured\": true",
        "\"protocol\": \"newstyle-fixed\"",
    ] {
        assert!(json.contains(field), "{field} in {json}");
    }
    let map = run("nbdinfo", &["--map", &h.uri()]);
    let map: Vec<Vec<&str>> = map.lines().map(|l| l.split_whitespace().collect()).collect();
    assert_eq!(map[0][..3], ["0", "1048576", "3"]);
    assert_eq!(map[1][..3], ["1048576", "65536", "0"]);
    assert_eq!(map.len(), 3);
    let list = run("nbdinfo", &["--list", "--json", &h.uri()]);
    assert!(list.contains("a test disk"), "{list}");
    let other = format!("nbd+unix:///other?socket={}", h.path.display());
    let refused = Command::new("nbdinfo").arg(other).output().unwrap();
    assert!(!refused.status.success());

    let h = Harness::new(Setup { read_only: true, ..Setup::default() });
    let json = run("nbdinfo", &["--json", &h.uri()]);
    assert!(json.contains("\"is_read_only\": true") && json.contains("\"can_zero\": false"));
}

#[test]
fn clients_see_bitmaps() {
    let h = Harness::new(Setup { bitmaps: true, ..Setup::default() });
    if have("nbdinfo") {
        let json = run("nbdinfo", &["--json", &h.uri()]);
        assert!(json.contains("\"qemu:dirty-bitmap:half\""), "{json}");
        let map = run("nbdinfo", &["--map=qemu:dirty-bitmap:half", &h.uri()]);
        let map: Vec<Vec<&str>> = map.lines().map(|l| l.split_whitespace().collect()).collect();
        assert_eq!(map.len(), 32);
        assert_eq!(
            (&map[0][..3], &map[31][..3]),
            (&["0", "524288", "1"][..], &["16252928", "524288", "0"][..])
        );
    }
    if have("qemu-img") {
        // QEMU shows clear bits as data, and set ones as none.
        let image = format!(
            "driver=nbd,server.type=unix,server.path={},x-dirty-bitmap=qemu:dirty-bitmap:half",
            h.path.display()
        );
        let map = run("qemu-img", &["map", "--output=json", "--image-opts", &image]);
        assert_eq!(map.matches("\"length\": 524288").count(), 32, "{map}");
    }
}

#[test]
fn nbdcopy_copies_in_and_out() {
    if !have("nbdcopy") {
        return;
    }
    let h = Harness::new(Setup { size: 48 << 20, ..Setup::default() });
    let dir = tempfile::tempdir().unwrap();
    let (source, back) = (dir.path().join("in"), dir.path().join("out"));
    let bytes = sparse(48 << 20);
    std::fs::write(&source, &bytes).unwrap();
    // What was there before must be gone, also in the holes.
    h.data.write(0, &vec![0x5a; 48 << 20]);
    run("nbdcopy", &["--flush", source.to_str().unwrap(), &h.uri()]);
    assert!(h.bytes(0, 48 << 20) == bytes);
    assert!(!h.control.seen(Op::Flush).is_empty());
    assert!(h.server().totals().0 >= 2, "several connections");
    for options in [&[][..], &["--synchronous"], &["--connections=4", "--requests=64"]] {
        let (uri, out) = (h.uri(), back.to_str().unwrap());
        run("nbdcopy", &[options, &[uri.as_str(), out]].concat());
        assert!(std::fs::read(&back).unwrap() == bytes);
        std::fs::remove_file(&back).unwrap();
    }
}

#[test]
fn qemu_img_converts_and_compares() {
    if !have("qemu-img") {
        return;
    }
    let h = Harness::new(Setup { size: 48 << 20, ..Setup::default() });
    let dir = tempfile::tempdir().unwrap();
    let (source, back) = (dir.path().join("in"), dir.path().join("out.qcow2"));
    let (source, back, uri) = (source.to_str().unwrap(), back.to_str().unwrap(), h.uri());
    let bytes = sparse(48 << 20);
    std::fs::write(source, &bytes).unwrap();
    h.data.write(0, &vec![0x5a; 48 << 20]);
    run("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", source, &uri]);
    assert!(h.bytes(0, 48 << 20) == bytes);
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", source, &uri]);
    run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", &uri, back]);
    run("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", &uri, back]);
    h.data.write(40 << 20, b"difference");
    let out = Command::new("qemu-img")
        .args(["compare", "-f", "raw", "-F", "raw", source, &uri])
        .output()
        .unwrap();
    assert_eq!(out.status.code(), Some(1));
    let map = run("qemu-img", &["map", "-f", "raw", "--output=json", &uri]);
    assert!(map.contains("\"zero\": true") && map.contains("\"zero\": false"), "{map}");
}

#[test]
fn qemu_io_writes_zeroes_discards_and_flushes() {
    if !have("qemu-io") {
        return;
    }
    for block in [512, 4096] {
        let h = Harness::new(Setup { block, ..Setup::default() });
        let out = run(
            "qemu-io",
            &[
                "-f",
                "raw",
                "-c",
                "write -P 0xab 0 1M",
                "-c",
                "write -f -P 0xcd 64k 4k",
                "-c",
                "write -z 128k 64k",
                "-c",
                "write -z -u -f 256k 64k",
                "-c",
                "discard 512k 128k",
                "-c",
                "write -P 0x11 1000 3000",
                "-c",
                "flush",
                "-c",
                "read -P 0xcd 64k 4k",
                "-c",
                "read -P 0 128k 64k",
                "-c",
                "read -P 0x11 1000 3000",
                "-c",
                "aio_write -P 0x77 2M 8M",
                "-c",
                "aio_flush",
                "-c",
                "read -P 0x77 2M 8M",
                &h.uri(),
            ],
        );
        assert!(!out.contains("failed") && !out.contains("error"), "{out}");
        let mut want = vec![0; 2 << 20];
        want[..1 << 20].fill(0xab);
        want[64 << 10..68 << 10].fill(0xcd);
        want[128 << 10..192 << 10].fill(0);
        want[256 << 10..320 << 10].fill(0);
        want[512 << 10..640 << 10].fill(0);
        want[1000..4000].fill(0x11);
        assert!(h.bytes(0, 2 << 20) == want);
        assert!(h.control.seen(Op::Write).iter().any(|w| w.0.has(block::Flags::FUA)));
        assert!(h.control.seen(Op::WriteZeroes).iter().any(|w| w.0.has(block::Flags::NO_UNMAP)));
        assert!(!h.control.seen(Op::Discard).is_empty());
        assert!(!h.control.seen(Op::Flush).is_empty());
    }
}

/// A fio job that writes and verifies.
fn fio(h: &Harness, offset: &str, size: &str, more: &[&str]) -> Command {
    let mut command = Command::new("fio");
    command.args(["--name=t", "--ioengine=nbd", "--rw=randwrite", "--iodepth=32", "--thread"]);
    command.arg("--verify_state_save=0");
    command.arg(format!("--uri={}", h.uri()));
    command.args([&format!("--offset={offset}"), &format!("--size={size}")]);
    command.args(more).stdin(Stdio::null());
    command
}

#[test]
fn fio_verifies_what_it_wrote_from_several_clients() {
    if !have("fio") {
        return;
    }
    let h = Harness::new(Setup { size: 64 << 20, ..Setup::default() });
    let verify = ["--verify=crc32c", "--do_verify=1", "--verify_fatal=1"];
    let jobs: Vec<_> = ["--bs=4k", "--bs=16k", "--bs=68k", "--bs=1M"]
        .iter()
        .enumerate()
        .map(|(i, bs)| {
            let mut job = fio(&h, &format!("{}M", i * 16), "16M", &verify);
            job.arg(bs);
            job.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
        })
        .collect();
    for job in jobs {
        let out = job.wait_with_output().unwrap();
        let text = String::from_utf8_lossy(&out.stdout);
        assert!(out.status.success(), "{text}{}", String::from_utf8_lossy(&out.stderr));
        assert!(text.contains("err= 0"), "{text}");
    }
    h.wait_empty();
}

#[test]
fn a_killed_client_leaves_nothing_behind() {
    if !have("fio") {
        return;
    }
    let h = Harness::new(Setup { size: 64 << 20, ..Setup::default() });
    let mut steady = h.connect().go(true, false);
    for bs in ["--bs=4k", "--bs=1M", "--bs=256k"] {
        let before = h.server().totals().1.writes;
        let mut job = fio(&h, "0", "60M", &[bs, "--time_based", "--runtime=60"])
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        eventually("it writes", || h.server().totals().1.writes > before + 200);
        job.kill().unwrap();
        job.wait().unwrap();
        eventually("it is gone", || h.server().connections().len() == 1);
        assert_eq!(steady.write(60 << 20, &[5; 4096]), 0);
        assert_eq!(steady.read(60 << 20, 4096), [5; 4096]);
    }
    // The device hangs while clients are killed: their memory waits for its answers.
    h.control.hold(true);
    let mut job = fio(&h, "0", "60M", &["--bs=64k"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let before = h.control.log.lock().len();
    eventually("it writes", || h.control.log.lock().len() >= before + 16);
    job.kill().unwrap();
    job.wait().unwrap();
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(h.server().connections().len(), 2);
    h.control.hold(false);
    eventually("it is gone", || h.server().connections().len() == 1);
    assert_eq!(steady.read(60 << 20, 4096), [5; 4096]);
}
