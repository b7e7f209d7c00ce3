//! `bitmap`: what qemu-img does, ours does.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::Env;

impl Env {
    /// The bitmaps as both programs list them.
    #[track_caller]
    fn bitmaps(&self, name: &str) -> Value {
        let ours = self.image(&format!("info --json {name}")).json();
        let theirs = self.qemu_img(&format!("info -f qcow2 --output=json {name}")).json();
        let of = |info: &Value| info["format-specific"]["data"]["bitmaps"].clone();
        assert_eq!(of(&ours), of(&theirs));
        self.clean(name);
        of(&ours)
    }
}

#[test]
fn bitmaps_as_qemu_img() {
    let Some(env) = Env::new() else { return };
    for name in ["ours", "theirs", "other"] {
        env.qemu_img(&format!("create -q -f qcow2 {name} 8M")).ok();
    }
    env.qemu_img("bitmap --add -g 4k other src").ok();
    env.qemu_io("other", "qcow2", "write 1M 1k; write 3M 64k");
    // Each line is done by both programs, each to its own image; then the lists are the same.
    for args in [
        "--add b0",
        "--add --disable -g 512 b1",
        "--clear --merge b0 b1",
        "--add --merge src -b other -F qcow2 b2",
        "--disable b2",
        "--enable b1",
        "--merge b2 --merge b1 --disable --enable b0",
        "--remove --add -g 2G b1",
        "--remove b0",
    ] {
        let (options, bitmap) = args.rsplit_once(' ').unwrap();
        assert_eq!(env.image(&format!("bitmap {options} ours {bitmap}")).ok(), "");
        env.qemu_img(&format!("bitmap {options} -f qcow2 theirs {bitmap}")).ok();
        let sorted = |mut v: Value| {
            let list = v.as_array_mut().unwrap();
            list.sort_by_key(|b| b["name"].to_string());
            v
        };
        assert_eq!(sorted(env.bitmaps("ours")), sorted(env.bitmaps("theirs")), "{args}");
    }
    // And what they do not do, neither does.
    env.qemu_img("create -q -f qcow2 larger 9M").ok();
    for (args, code, text) in [
        ("bitmap --add ours b2", 1, "already"),
        ("bitmap --disable --add ours new", 1, "no bitmap"),
        ("bitmap --remove ours none", 1, "no bitmap \"none\""),
        ("bitmap --merge none ours b2", 1, "no bitmap \"none\""),
        ("bitmap --merge src -b other larger b2", 1, "no bitmap \"b2\""),
        ("bitmap --add --merge src -b other larger b2", 1, "cannot be merged"),
        ("bitmap --add -g 256 ours x", 1, "granularity"),
        ("bitmap --add -g 3000 ours x", 1, "granularity"),
        ("bitmap ours b2", 2, "say what to do"),
        ("bitmap --clear -g 4k ours b2", 2, "--add"),
        ("bitmap --clear -b other ours b2", 2, "--merge"),
        ("bitmap --merge b1 -F qcow2 ours b2", 2, "source-file"),
        ("bitmap -f raw --add ours b2", 2, "qcow2"),
    ] {
        env.image(args).fails(code, text);
        let their = args.replace("bitmap ", "bitmap -f qcow2 ");
        assert_ne!(env.qemu_img(&their).code, 0, "{args}");
    }
    let before = env.bitmaps("ours");
    env.image("resize ours 12M").ok();
    env.image("snapshot -c s ours").ok();
    env.image("amend -o lazy_refcounts=on ours").ok();
    assert_eq!(env.bitmaps("ours"), before);
    env.image("snapshot -a s ours").fails(1, "bitmaps");
    assert_ne!(env.qemu_img("snapshot -a s ours").code, 0);
    for name in ["b1", "b2"] {
        env.image(&format!("bitmap --remove ours {name}")).ok();
    }
    assert_eq!(env.bitmaps("ours"), Value::Null);
    env.image("snapshot -a s ours").ok();
}

#[test]
fn damaged_bitmaps_are_found_as_qemu_img_finds_them() {
    let Some(env) = Env::new() else { return };
    env.qemu_img("create -q -f qcow2 good 8M").ok();
    env.image("bitmap --add good b").ok();
    env.qemu_io("good", "qcow2", "write 1M 1k");
    env.bitmaps("good");
    let header = env.peek("good", 0, 512);
    // The extension's place, whoever wrote the header.
    let at = header.windows(4).position(|w| w == [0x23, 0x85, 0x28, 0x75]).unwrap() as u64 + 8;
    let directory = env.word("good", at + 16);
    let table = env.word("good", directory);
    for (what, offset, bytes) in [
        ("directory", at + 16, &[0xff_u8, 0, 0, 0][..]),
        ("its size", at + 8, &[0, 0, 0, 1]),
        ("count", at, &[0, 0, 0, 9]),
        ("table", directory, &[0, 0, 0, 1]),
        ("table size", directory + 8, &[0, 0, 0, 2]),
        ("flags", directory + 12, &[0, 0, 0, 0x12]),
        ("granularity", directory + 17, &[77]),
        ("name", directory + 18, &[0xff, 0xff]),
        ("reserved bits", table, &[0x80]),
        ("entry", table + 6, &[2]),
    ] {
        std::fs::copy(env.path("good"), env.path("bad")).unwrap();
        env.patch("bad", offset, bytes);
        let ours = env.image("check bad");
        let theirs = env.qemu_img("check -f qcow2 bad");
        assert_ne!((ours.code, theirs.code), (0, 0), "{what}");
        assert_eq!(ours.code == 0, theirs.code == 0, "{what}: {ours:?} {theirs:?}");
        assert_ne!(env.image("bitmap --remove bad b").code, 0, "{what}");
        assert_ne!(env.image("resize bad 16M").code, 0, "{what}");
    }
    // A cluster of bits that something else has, too.
    std::fs::copy(env.path("good"), env.path("bad")).unwrap();
    env.patch("bad", table, &directory.to_be_bytes());
    assert_ne!(env.image("check bad").code, 0);
    env.image("bitmap --clear bad b").fails(1, "repaired");
}

/// Serves `image`, writes, and ends it with this signal.
fn served(env: &Env, option: &str, commands: &[&str], signal: &str) {
    let mut args = vec!["nbd", "--socket", "n", "image"];
    args.extend(Some(option).filter(|o| !o.is_empty()));
    let mut server = Command::new(env!("CARGO_BIN_EXE_polldisk"))
        .args(args)
        .current_dir(env.dir.path())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(server.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let mut args = vec!["-f", "raw", "nbd+unix:///?socket=n"];
    commands.iter().for_each(|c| args.extend(["-c", c]));
    let run = env.run("qemu-io", &args);
    let pid = server.id().to_string();
    assert!(Command::new("kill").args([signal, &pid]).status().unwrap().success());
    server.wait().unwrap();
    assert!(run.code == 0 && !run.out.contains("failed"), "{run:?}");
}

#[test]
fn what_is_written_over_nbd_is_recorded_and_a_kill_costs_durable_bitmaps_nothing() {
    let Some(env) = Env::new() else { return };
    let commands = ["write 1M 4k", "write -z 5M 128k", "discard 7M 64k", "flush"];
    for (option, signal, saved) in [
        ("", "-TERM", true),
        ("", "-KILL", false),
        ("--durable-bitmaps", "-TERM", true),
        ("--durable-bitmaps", "-KILL", true),
    ] {
        env.qemu_img("create -q -f qcow2 image 8M").ok();
        env.image("bitmap --add -g 64k image b").ok();
        served(&env, option, &commands, signal);
        let run = env.qemu_img("bitmap --disable -f qcow2 image b");
        assert_eq!(run.code == 0, saved, "{option} {signal}: {run:?}");
        if !saved {
            assert_eq!(env.bitmaps("image")[0]["flags"], serde_json::json!(["in-use", "auto"]));
            env.image("bitmap --clear image b").fails(1, "not saved");
            env.image("bitmap --remove --add image b").ok();
            continue;
        }
        let mut judge = Command::new("qemu-nbd")
            .args(["-r", "-f", "qcow2", "-B", "b", "image", "-k"])
            .arg(env.path("s"))
            .current_dir(env.dir.path())
            .spawn()
            .unwrap();
        let map = "map --output=json --image-opts driver=nbd,server.type=unix,server.path=s,\
                   x-dirty-bitmap=qemu:dirty-bitmap:b";
        // It may take a while until it listens.
        let mut tries = 0..500;
        let map = loop {
            let run = env.qemu_img(map);
            if run.code == 0 || tries.next().is_none() {
                break run;
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        };
        judge.wait().unwrap();
        std::fs::remove_file(env.path("s")).ok();
        let set: Vec<(u64, u64)> = map
            .json()
            .as_array()
            .unwrap()
            .iter()
            .filter(|e| e["data"] == false)
            .map(|e| (e["start"].as_u64().unwrap(), e["length"].as_u64().unwrap()))
            .collect();
        assert_eq!(set, [(1 << 20, 65536), (5 << 20, 131072), (7 << 20, 65536)], "{option}");
    }
}
