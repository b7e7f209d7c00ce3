//! `info`: the same JSON as qemu-img's, and the options around it.

use serde_json::Value;

use crate::Env;

/// Makes file names comparable: each program has its own way to write the same path.
fn canonical(env: &Env, value: &mut Value) {
    match value {
        Value::Object(map) => {
            for (key, value) in map.iter_mut() {
                match value {
                    Value::String(s) if key == "filename" || key == "full-backing-filename" => {
                        let path = env.path(s).canonicalize().unwrap();
                        *s = path.display().to_string();
                    }
                    _ => canonical(env, value),
                }
            }
        }
        Value::Array(list) => list.iter_mut().for_each(|v| canonical(env, v)),
        _ => {}
    }
}

#[track_caller]
fn same(env: &Env, args: &str) {
    let mut ours = env.image(&format!("info --json {args}")).json();
    let mut theirs = env.qemu_img(&format!("info --output=json {args}")).json();
    canonical(env, &mut ours);
    canonical(env, &mut theirs);
    assert_eq!(ours, theirs, "{args}");
}

#[test]
fn json_is_qemus_field_by_field() {
    let Some(env) = Env::new() else { return };
    env.chain();
    let options = [
        "compat=0.10",
        "compat=1.1,lazy_refcounts=on",
        "cluster_size=512,refcount_bits=1",
        "cluster_size=2M,refcount_bits=64,preallocation=metadata",
        "compression_type=zstd",
    ];
    for (i, o) in options.iter().enumerate() {
        env.qemu_img(&format!("create -q -f qcow2 -o {o} o{i}.qcow2 8M")).ok();
        same(&env, &format!("-f qcow2 o{i}.qcow2"));
    }
    for name in ["top.qcow2", "mid.qcow2"] {
        same(&env, &format!("-f qcow2 {name}"));
        same(&env, &format!("-f qcow2 --backing-chain {name}"));
    }
    same(&env, "-f raw base.raw");
    // Snapshots, bitmaps, the dirty bit, a length that is no multiple of 512.
    env.qemu_img("snapshot -c first o0.qcow2").ok();
    env.qemu_img("snapshot -c first o1.qcow2").ok();
    env.qemu_img("snapshot -c second o1.qcow2").ok();
    env.qemu_img("bitmap --add -g 128k o1.qcow2 b0").ok();
    env.qemu_img("bitmap --add --disable o1.qcow2 b1").ok();
    same(&env, "-f qcow2 o0.qcow2");
    same(&env, "-f qcow2 o1.qcow2");
    env.patch("o4.qcow2", 79, &[1 | 8]);
    same(&env, "-f qcow2 -U o4.qcow2");
    std::fs::write(env.path("odd.raw"), vec![1; 1001]).unwrap();
    same(&env, "-f raw odd.raw");
}

#[test]
fn a_format_that_is_not_stated_is_looked_for_and_this_is_said() {
    let Some(env) = Env::new() else { return };
    env.chain();
    for (name, format) in [("top.qcow2", "qcow2"), ("base.raw", "raw")] {
        let run = env.image(&format!("info --json {name}"));
        assert!(run.err.contains(&format!("taken for {format}")), "{run:?}");
        assert_eq!(run.json()["format"], format);
        let run = env.image(&format!("info --json -f {format} {name}"));
        assert_eq!((run.code, run.err.as_str()), (0, ""));
    }
    // Stated formats are believed.
    let raw = env.image("info --json -f raw top.qcow2").json();
    assert_eq!(raw["virtual-size"], std::fs::metadata(env.path("top.qcow2")).unwrap().len());
    env.image("info -f qcow2 base.raw").fails(1, "base.raw: header field magic at offset 0");
    env.image("info -f vmdk base.raw").fails(2, "there are qcow2, raw and vhd");
}

#[test]
fn human_output() {
    let Some(env) = Env::new() else { return };
    env.chain();
    env.qemu_img("snapshot -c snap mid.qcow2").ok();
    let ours = env.image("info -f qcow2 top.qcow2").ok();
    let theirs = env.qemu_img("info -f qcow2 top.qcow2").ok();
    assert_eq!(ours.trim(), theirs.trim());
    let ours = env.image("info -f qcow2 mid.qcow2").ok();
    assert!(ours.contains("Snapshot list:") && ours.contains("snap "), "{ours}");
    let chain = env.image("info -f qcow2 --backing-chain top.qcow2").ok();
    assert_eq!(chain.matches("image: ").count(), 3, "{chain}");
}

#[test]
fn models_and_memory_are_images_too() {
    let Some(env) = Env::new() else { return };
    env.chain();
    let info = env.image("info --json -f qcow2 model:top.qcow2?lba=4096").json();
    assert_eq!(info["virtual-size"], 12 << 20);
    assert_eq!(info["filename"], "model:top.qcow2");
    assert_eq!(env.image("info --json -f raw mem:1M").json()["virtual-size"], 1 << 20);
    env.image("info no:such").fails(2, "unknown kind");
    env.image("info missing.qcow2").fails(1, "missing.qcow2: ");
    env.image("info .").fails(1, "is neither a regular file nor a block device");
}

#[test]
fn locks() {
    let Some(env) = Env::new() else { return };
    env.chain();
    let mut child = std::process::Command::new("qemu-io")
        .args(["-f", "qcow2", "top.qcow2"])
        .current_dir(env.dir.path())
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    {
        use std::io::{BufRead, BufReader, Write};
        let mut input = child.stdin.take().unwrap();
        writeln!(input, "read 0 512").unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        assert!(lines.any(|l| l.unwrap().contains("read 512/512")));
        for command in ["info -f qcow2", "check", "map", "check -r all", "create -q"] {
            let size = if command.starts_with("create") { "1M" } else { "" };
            env.image(&format!("{command} top.qcow2 {size}"))
                .fails(1, "top.qcow2: the image is in use");
        }
        env.image("convert top.qcow2 new.qcow2").fails(1, "in use");
        env.image("compare top.qcow2 mid.qcow2").fails(2, "in use");
        env.image("convert mid.qcow2 top.qcow2").fails(1, "in use");
        assert!(!env.path("new.qcow2").exists());
        for command in ["info -U -f qcow2", "check -U", "map -U"] {
            env.image(&format!("{command} top.qcow2")).ok();
        }
        env.image("convert -U top.qcow2 new.qcow2").ok();
        env.image("compare -U top.qcow2 new.qcow2").ok();
        // Others may read its backing file, but not write to it.
        env.image("map mid.qcow2").ok();
        env.image("check -r all mid.qcow2").fails(1, "in use");
        drop(input);
    }
    child.wait().unwrap();
    env.image("check -r all top.qcow2").ok();
}
