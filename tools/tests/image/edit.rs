//! `resize`, `snapshot`, `commit`, `rebase`, `amend`: what qemu-img does, ours does.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

use crate::Env;

impl Env {
    /// `top.qcow2` over `mid.qcow2` over `base.raw` in two copies, in folders of the same names.
    fn two_chains(&self) {
        self.chain();
        for folder in ["ours", "theirs"] {
            std::fs::create_dir(self.path(folder)).unwrap();
            for name in ["top.qcow2", "mid.qcow2", "base.raw"] {
                std::fs::copy(self.path(name), self.path(&format!("{folder}/{name}"))).unwrap();
            }
        }
    }
}

#[test]
fn resize_as_qemu_img() {
    let Some(env) = Env::new() else { return };
    env.two_chains();
    for size in ["+1M", "20M", "+512", "16M"] {
        let shrink = if size == "16M" { "--shrink" } else { "" };
        let text = env.image(&format!("resize {shrink} ours/top.qcow2 {size}")).ok();
        assert_eq!(text, "Image resized.\n");
        env.qemu_img(&format!("resize {shrink} theirs/top.qcow2 {size}")).ok();
        env.same("ours/top.qcow2", "qcow2", "theirs/top.qcow2", "qcow2");
        env.clean("ours/top.qcow2");
    }
    let run = env.image("resize ours/top.qcow2 -1M");
    run.fails(1, "say --shrink");
    env.image("resize ours/top.qcow2 1001").fails(1, "say --shrink");
    env.image("resize --shrink ours/top.qcow2 1001").fails(1, "no multiple of 512");
    env.image("resize --shrink ours/top.qcow2 -1T").fails(2, "cannot get the size");
    env.image("resize --preallocation full ours/top.qcow2 20M").fails(2, "off");
    let json = env.image("resize --json --shrink ours/top.qcow2 -15M").json();
    assert_eq!(json["old-virtual-size"], 16 << 20);
    assert_eq!(json["virtual-size"], 1 << 20);
    env.qemu_img("resize -q --shrink theirs/top.qcow2 1M").ok();
    env.same("ours/top.qcow2", "qcow2", "theirs/top.qcow2", "qcow2");

    env.image("resize -f raw ours/base.raw +1M").ok();
    env.image("resize -f raw ours/base.raw -512").fails(1, "say --shrink");
    env.image("resize -f raw --shrink ours/base.raw 2M").ok();
    env.qemu_img("resize -q -f raw --shrink theirs/base.raw 2M").ok();
    env.same("ours/base.raw", "raw", "theirs/base.raw", "raw");
    env.image("resize mem:1M 2M").fails(1, "");
}

#[test]
fn snapshots_as_qemu_img() {
    let Some(env) = Env::new() else { return };
    env.qemu_img("create -q -f qcow2 a.qcow2 8M").ok();
    assert_eq!(env.image("snapshot -l a.qcow2").ok(), "");
    for n in 1..4u8 {
        env.qemu_io("a.qcow2", "qcow2", &format!("write -P {n} 0 {n}M"));
        env.image(&format!("snapshot -c s{n} a.qcow2")).ok();
        std::fs::copy(env.path("a.qcow2"), env.path(&format!("s{n}"))).unwrap();
        env.clean("a.qcow2");
    }
    let listed = env.qemu_img("info -f qcow2 --output=json a.qcow2").json();
    assert_eq!(env.image("snapshot -l --json a.qcow2").json(), listed["snapshots"]);
    let rows = |text: String| -> Vec<String> {
        text.lines().skip(2).map(|l| l.split_whitespace().collect::<Vec<_>>().join(" ")).collect()
    };
    let theirs = Command::new("qemu-img")
        .env("TZ", "UTC")
        .args(["snapshot", "-l", "a.qcow2"])
        .current_dir(env.dir.path())
        .output()
        .unwrap();
    let theirs = String::from_utf8(theirs.stdout).unwrap();
    assert_eq!(rows(env.image("snapshot a.qcow2").ok()), rows(theirs));

    // Read from, by all names.
    for (name, file) in [("s1", "s1"), ("snapshot.name=s2", "s2"), ("snapshot.id=3", "s3")] {
        env.image(&format!("convert -O raw -l {name} a.qcow2 to.raw")).ok();
        env.same("to.raw", "raw", file, "qcow2");
        env.qemu_img(&format!("convert -O raw -l {name} a.qcow2 theirs.raw")).ok();
        env.same("to.raw", "raw", "theirs.raw", "raw");
    }
    env.image("convert -O raw -l snapshot.id=s1 a.qcow2 to.raw").fails(1, "no snapshot \"s1\"");

    env.image("snapshot -a s1 a.qcow2").ok();
    env.same("a.qcow2", "qcow2", "s1", "qcow2");
    env.image("snapshot -d s1 a.qcow2").ok();
    env.same("a.qcow2", "qcow2", "s1", "qcow2");
    env.image("snapshot -a 2 a.qcow2").ok();
    env.same("a.qcow2", "qcow2", "s2", "qcow2");
    env.clean("a.qcow2");
    env.image("snapshot -d none a.qcow2").fails(1, "no snapshot \"none\"");
    env.image("snapshot -c x -d y a.qcow2").fails(2, "cannot be used with");
    env.image("snapshot -f raw -l a.qcow2").fails(2, "only qcow2");
    env.qemu_img("create -q -f qcow2 -o refcount_bits=1 one.qcow2 1M").ok();
    env.qemu_io("one.qcow2", "qcow2", "write 0 64k");
    let before = std::fs::read(env.path("one.qcow2")).unwrap();
    env.image("snapshot -c x one.qcow2").fails(1, "refcounts have 1 bits");
    assert!(std::fs::read(env.path("one.qcow2")).unwrap() == before);
    // What only a snapshot held is given back to the file system.
    use std::os::unix::fs::MetadataExt;
    env.qemu_img("create -q -f qcow2 holes.qcow2 64M").ok();
    env.qemu_io("holes.qcow2", "qcow2", "write -P 1 0 16M");
    env.image("snapshot -c x holes.qcow2").ok();
    env.qemu_io("holes.qcow2", "qcow2", "write -P 2 0 16M");
    env.image("snapshot -d x holes.qcow2").ok();
    env.clean("holes.qcow2");
    let taken = std::fs::metadata(env.path("holes.qcow2")).unwrap().blocks() * 512;
    assert!(taken < 18 << 20, "{taken}");
    // A device has no end that could be cut.
    env.image("snapshot -c over model:a.qcow2").ok();
    env.image("snapshot -d over model:a.qcow2").ok();
    env.clean("a.qcow2");
    env.same("a.qcow2", "qcow2", "s2", "qcow2");
}

/// Serves an image until it is dropped.
struct Served(Child);

impl Served {
    fn new(env: &Env, args: &str) -> Served {
        let mut child = Command::new(env!("CARGO_BIN_EXE_polldisk"))
            .args(["nbd", "--socket", "nbd.sock"])
            .args(args.split_whitespace())
            .current_dir(env.dir.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert!(line.starts_with("listening"), "{line}");
        Served(child)
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let pid = nix::unistd::Pid::from_raw(self.0.id() as i32);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
        self.0.wait().unwrap();
    }
}

#[test]
fn a_snapshot_is_served_and_locked() {
    let Some(env) = Env::new() else { return };
    env.qemu_img("create -q -f qcow2 a.qcow2 8M").ok();
    env.qemu_io("a.qcow2", "qcow2", "write -P 1 0 3M");
    std::fs::copy(env.path("a.qcow2"), env.path("then.qcow2")).unwrap();
    env.image("snapshot -c then a.qcow2").ok();
    env.qemu_io("a.qcow2", "qcow2", "write -P 2 1M 5M");
    env.image("resize a.qcow2 12M").ok();
    let served = Served::new(&env, "--snapshot then a.qcow2");
    let json = env.qemu_img("info --output=json nbd:unix:nbd.sock").json();
    assert_eq!(json["virtual-size"], 8 << 20);
    env.same("nbd:unix:nbd.sock", "raw", "then.qcow2", "qcow2");
    for change in ["snapshot -c x", "snapshot -d then", "resize", "rebase -u -b x -F raw"] {
        let size = if change == "resize" { "1G" } else { "" };
        env.image(&format!("{change} a.qcow2 {size}")).fails(1, "in use");
    }
    env.image("snapshot -l a.qcow2").ok();
    drop(served);
    env.image("snapshot -d then a.qcow2").ok();
    env.clean("a.qcow2");
}

#[test]
fn commit_as_qemu_img() {
    let Some(env) = Env::new() else { return };
    env.two_chains();
    let before = env.contents("top.qcow2");
    let json = env.image("commit --json ours/top.qcow2").json();
    assert!(json["emptied"] == true && json["data-bytes"].as_u64() > Some(300 << 10), "{json}");
    env.qemu_img("commit -q theirs/top.qcow2").ok();
    for name in ["top.qcow2", "mid.qcow2"] {
        env.same(&format!("ours/{name}"), "qcow2", &format!("theirs/{name}"), "qcow2");
        env.clean(&format!("ours/{name}"));
    }
    assert!(env.contents("ours/top.qcow2") == before);
    let map = env.qemu_img("map --output=json ours/top.qcow2").json();
    assert!(map.as_array().unwrap().iter().all(|e| e["depth"] != 0), "{map}");
    let text = env.image("commit -p ours/mid.qcow2");
    assert!(text.err.contains("(100.00/100%)"), "{text:?}");
    env.qemu_img("commit -q theirs/mid.qcow2").ok();
    env.same("ours/base.raw", "raw", "theirs/base.raw", "raw");
    assert!(env.contents("ours/top.qcow2") == before);
    env.image("commit base.raw").fails(1, "base.raw");

    // Over a layer, and without emptying.
    env.image("commit -b base.raw top.qcow2").ok();
    assert!(env.contents("top.qcow2") == before);
    env.same("base.raw", "raw", "top.qcow2", "qcow2");
    env.image("commit -b nothing top.qcow2").fails(1, "none of its backing files");
    env.image("commit -d mid.qcow2").ok();
    let map = env.qemu_img("map --output=json mid.qcow2").json();
    assert!(map.as_array().unwrap().iter().any(|e| e["depth"] == 0), "{map}");
    env.qemu_img("create -q -f qcow2 alone.qcow2 1M").ok();
    env.image("commit alone.qcow2").fails(1, "has no backing file");
}

#[test]
fn rebase_as_qemu_img() {
    let Some(env) = Env::new() else { return };
    env.two_chains();
    let before = env.contents("top.qcow2");
    // Onto the file below, one with other contents, and none.
    env.qemu_img("create -q -f qcow2 other.qcow2 9M").ok();
    env.qemu_io("other.qcow2", "qcow2", "write -P 99 0 8M");
    for folder in ["ours", "theirs"] {
        let to = env.path(&format!("{folder}/other.qcow2"));
        std::fs::copy(env.path("other.qcow2"), to).unwrap();
    }
    for (backing, format) in [("base.raw", "raw"), ("other.qcow2", "qcow2"), ("", "")] {
        let options: Vec<&str> =
            if backing.is_empty() { vec!["-b", ""] } else { vec!["-b", backing, "-F", format] };
        let ours = [&["image", "rebase"], &options[..], &["ours/top.qcow2"]].concat();
        env.run(env!("CARGO_BIN_EXE_polldisk"), &ours).ok();
        assert!(env.contents("ours/top.qcow2") == before, "{backing}");
        env.clean("ours/top.qcow2");
        let info = env.qemu_img("info -f qcow2 --output=json ours/top.qcow2").json();
        let name = info["backing-filename"].as_str().unwrap_or_default();
        assert_eq!(name, backing, "{info}");
    }
    // The layer below holds nearly all: little is copied.
    let json = env.image("rebase --json -b base.raw -F raw theirs/top.qcow2").json();
    assert!(json["data-bytes"].as_u64() < Some(3 << 20), "{json}");
    assert!(env.contents("theirs/top.qcow2") == before);

    env.image("rebase -b mid.qcow2 top.qcow2").fails(2, "state its format");
    env.image("rebase -b nothing -F raw top.qcow2").fails(1, "nothing");
    env.image("rebase -b top.qcow2 -F qcow2 mid.qcow2").fails(1, "is in the backing chain");
    assert!(env.contents("top.qcow2") == before);
    env.image("rebase -u -b nothing -F raw top.qcow2").ok();
    let info = env.image("info --json -f qcow2 top.qcow2").json();
    assert_eq!(info["backing-filename"], "nothing");
    assert_eq!(info["backing-filename-format"], "raw");
    env.image("rebase -u -b mid.qcow2 -F qcow2 top.qcow2").ok();
    assert!(env.contents("top.qcow2") == before);
}

#[test]
fn amend_as_qemu_img() {
    let Some(env) = Env::new() else { return };
    env.qemu_img("create -q -f qcow2 -o compat=0.10 a.qcow2 8M").ok();
    env.qemu_io("a.qcow2", "qcow2", "write -P 1 0 3M");
    env.qemu_img("snapshot -c x a.qcow2").ok();
    let before = env.contents("a.qcow2");
    env.image("amend -o compat=1.1,lazy_refcounts=on a.qcow2").ok();
    let info = env.qemu_img("info a.qcow2").ok();
    assert!(info.contains("compat: 1.1") && info.contains("lazy refcounts: true"), "{info}");
    env.image("amend -o lazy_refcounts=off a.qcow2").ok();
    assert!(env.qemu_img("info a.qcow2").ok().contains("lazy refcounts: false"));
    env.clean("a.qcow2");
    assert!(env.contents("a.qcow2") == before);
    env.image("amend -o compat=0.10 a.qcow2").fails(1, "version 2");
    env.image("amend -o size=3 a.qcow2").fails(2, "can be changed");
}
