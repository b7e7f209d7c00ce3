//! `convert`: every way round, judged by qemu-img.

use std::os::unix::fs::MetadataExt;

use crate::Env;

/// Bytes that a file takes on its disk.
fn allocated(env: &Env, name: &str) -> u64 {
    std::fs::metadata(env.path(name)).unwrap().blocks() * 512
}

/// Data that compresses, data that does not, and zeroes, at odd places: `mix.raw`.
fn mix(env: &Env) {
    let mut bytes = vec![0u8; (9 << 20) + 512];
    let mut x = 3u64;
    for (i, b) in bytes.iter_mut().enumerate() {
        x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        match i >> 18 {
            2..5 | 30 => *b = (x >> 33) as u8,
            8..20 | 36 => *b = ((i / 11) ^ (i >> 9)) as u8 & 0x1f,
            _ => {}
        }
    }
    bytes[7_000_000] = 1;
    std::fs::write(env.path("mix.raw"), bytes).unwrap();
}

#[test]
fn round_trips() {
    let Some(env) = Env::new() else { return };
    env.chain();
    mix(&env);
    env.qemu_img("convert -O qcow2 mix.raw mix.qcow2").ok();
    let outputs = [
        "-O raw",
        "-O qcow2",
        "-O qcow2 -o compat=0.10",
        "-O qcow2 -o cluster_size=512,refcount_bits=64",
        "-O qcow2 -o cluster_size=2M,lazy_refcounts=on",
        "-O qcow2 -o preallocation=metadata",
        "-c",
        "-c -o cluster_size=4k,refcount_bits=1",
        "-c -o cluster_size=2M",
        "-c -o compat=0.10",
        "-c -o compression_type=zstd",
        "-c -o compression_type=zstd,cluster_size=512",
        "-c -o compression_type=zstd,cluster_size=2M",
    ];
    let sources = [("mix.raw", "raw"), ("mix.qcow2", "qcow2"), ("top.qcow2", "qcow2")];
    for (name, format) in sources {
        for options in outputs {
            let out = if options.contains("raw") { "raw" } else { "qcow2" };
            env.image(&format!("convert -f {format} {options} {name} to")).ok();
            env.same(name, format, "to", out);
            if out == "qcow2" {
                env.clean("to");
                // And what we wrote, we read.
                env.image("convert -O raw to back.raw").ok();
                env.same(name, format, "back.raw", "raw");
            }
            if options.contains("-c") {
                let json = env.qemu_img("check -f qcow2 --output=json to").json();
                assert!(json["compressed-clusters"].as_u64() > Some(0), "{name} {options}");
            }
        }
    }
    // What qemu-img wrote, we read.
    for options in
        ["-c", "-c -o compression_type=zstd", "-o cluster_size=512", "-o extended_l2=off"]
    {
        env.qemu_img(&format!("convert -f raw -O qcow2 {options} mix.raw theirs.qcow2")).ok();
        env.image("convert -O raw theirs.qcow2 back.raw").ok();
        env.same("mix.raw", "raw", "back.raw", "raw");
    }
}

#[test]
fn compressed_images_are_small_and_can_be_written_to() {
    let Some(env) = Env::new() else { return };
    let text: Vec<u8> = (0..8u64 << 20)
        .map(|i| b"the quick brown fox jumps "[((i * i) >> 7) as usize % 26])
        .collect();
    std::fs::write(env.path("text.raw"), &text).unwrap();
    for kind in ["zlib", "zstd"] {
        let make = |program: &str| {
            let args =
                format!("convert -f raw -O qcow2 -c -o compression_type={kind} text.raw {program}");
            if program == "ours" {
                env.image(&args).ok()
            } else {
                env.qemu_img(&args).ok()
            };
            std::fs::metadata(env.path(program)).unwrap().len()
        };
        let (ours, theirs) = (make("ours"), make("theirs"));
        assert!(ours < theirs * 3 / 2, "{kind}: {ours} bytes, qemu-img makes {theirs}");
        env.qemu_io("ours", "qcow2", "write -P 3 100k 300k; discard 2M 1M; write -c -P 4 2M 64k");
        env.clean("ours");
        env.image("convert -n -f raw text.raw ours").ok();
        env.clean("ours");
        env.same("text.raw", "raw", "ours", "qcow2");
    }
}

#[test]
fn zeroes_and_holes_take_no_space() {
    let Some(env) = Env::new() else { return };
    mix(&env);
    let data = 4 << 20;
    for (options, format) in [("-O raw", "raw"), ("", "qcow2")] {
        env.image(&format!("convert -f raw {options} mix.raw to")).ok();
        let least = allocated(&env, "to");
        assert!((data..6 << 20).contains(&least), "{options}: {least}");
        env.image(&format!("convert -f raw {options} -S 0 mix.raw to")).ok();
        env.same("mix.raw", "raw", "to", format);
        assert!(allocated(&env, "to") >= 9 << 20, "{options}");
        env.image(&format!("convert -f raw {options} -S 2M mix.raw to")).ok();
        env.same("mix.raw", "raw", "to", format);
        assert!(allocated(&env, "to") >= least, "{options}");
    }
    // A sparse source is not read where nothing is: 8 TiB would take hours.
    let file = std::fs::File::create(env.path("huge.raw")).unwrap();
    file.set_len(8 << 40).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, b"x", 5 << 40).unwrap();
    env.image("convert -f raw huge.raw huge.qcow2").ok();
    env.clean("huge.qcow2");
    env.image("convert -O raw huge.qcow2 back.raw").ok();
    env.same("huge.raw", "raw", "back.raw", "raw");
    env.image("compare -f raw huge.raw huge.qcow2").ok();
    assert!(allocated(&env, "back.raw") < 1 << 20);
    env.image("convert -S 1000 -f raw mix.raw n.qcow2").fails(2, "multiple of 512");
}

#[test]
fn with_a_backing_file() {
    let Some(env) = Env::new() else { return };
    env.chain();
    let kept = |args: &str| {
        let done = env.image(&format!("convert --json {args}")).json();
        done["backing-bytes"].as_u64().unwrap()
    };
    // Each layer of the chain, and files that are no part of it: the result is always the source.
    env.qemu_img("convert -O raw mid.qcow2 copy.raw").ok();
    env.qemu_img("create -q -f qcow2 empty.qcow2 20M").ok();
    for (backing, format) in
        [("mid.qcow2", "qcow2"), ("base.raw", "raw"), ("copy.raw", "raw"), ("empty.qcow2", "qcow2")]
    {
        for options in ["", "-o compat=0.10", "-c", "-o cluster_size=4k", "-S 0"] {
            let args = format!("-B {backing} -F {format} {options} top.qcow2 to.qcow2");
            assert!(kept(&args) > 1 << 20, "{args}");
            env.clean("to.qcow2");
            env.same("to.qcow2", "qcow2", "top.qcow2", "qcow2");
            let info = env.qemu_img("info --output=json to.qcow2").json();
            assert_eq!(info["backing-filename"], backing);
        }
    }
    // A layer in between that ends before the others hides what is below.
    env.qemu_img("create -q -f qcow2 long.qcow2 4M").ok();
    env.qemu_io("long.qcow2", "qcow2", "write -P 1 0 4M");
    env.qemu_img("create -q -f qcow2 -b long.qcow2 -F qcow2 short.qcow2 1M").ok();
    env.qemu_img("create -q -f qcow2 -b short.qcow2 -F qcow2 over.qcow2 6M").ok();
    assert_eq!(kept("-B long.qcow2 -F qcow2 over.qcow2 to.qcow2"), 3 << 20);
    env.same("to.qcow2", "qcow2", "over.qcow2", "qcow2");

    env.image("convert -B mid.qcow2 top.qcow2 n.qcow2").fails(2, "state its format with -F");
    env.image("convert -O raw -B mid.qcow2 -F qcow2 top.qcow2 n").fails(2, "raw image cannot have");
    env.image("convert -B n.qcow2 -F qcow2 top.qcow2 n.qcow2").fails(1, "n.qcow2");
    env.image("convert top.qcow2 base.raw").fails(1, "base.raw: is the source, or one of");
    env.image("convert top.qcow2 ./top.qcow2").fails(1, "./top.qcow2: is the source, or one of");
    assert!(!env.path("n.qcow2").exists() && !env.path("n").exists());
}

#[test]
fn into_an_image_that_exists() {
    let Some(env) = Env::new() else { return };
    env.chain();
    let nodes = ["to.qcow2", "model:to.qcow2?lba=4096&vwc=1"];
    for node in nodes {
        for options in ["", "-o cluster_size=4k", "-o compat=0.10", "-b mid.qcow2 -F qcow2"] {
            env.qemu_img(&format!("create -q -f qcow2 {options} to.qcow2 12M")).ok();
            env.qemu_io("to.qcow2", "qcow2", "write -P 99 0 12M");
            env.image(&format!("convert -n top.qcow2 {node}")).ok();
            env.clean("to.qcow2");
            env.same("to.qcow2", "qcow2", "top.qcow2", "qcow2");
        }
    }
    std::fs::write(env.path("to.raw"), vec![99; 13 << 20]).unwrap();
    env.image("convert -n -O raw top.qcow2 to.raw").ok();
    let bytes = std::fs::read(env.path("to.raw")).unwrap();
    assert!(bytes.len() == 13 << 20 && bytes[12 << 20..].iter().all(|&b| b == 99));
    assert!(bytes[..12 << 20] == env.contents("top.qcow2"));
    // With the promise that all is zero, nothing but data is written.
    env.qemu_img("create -q -f qcow2 to.qcow2 12M").ok();
    env.image("convert -n --target-is-zero top.qcow2 to.qcow2").ok();
    env.same("to.qcow2", "qcow2", "top.qcow2", "qcow2");

    env.qemu_img("create -q -f qcow2 small.qcow2 11M").ok();
    env.image("convert -n top.qcow2 small.qcow2").fails(1, "small.qcow2: has 11534336 bytes, but");
    env.image("convert -n top.qcow2 missing").fails(1, "missing");
    env.image("convert -n -c top.qcow2 to.qcow2").fails(2, "cannot be used with");
    env.image("convert --target-is-zero top.qcow2 to.qcow2").fails(2, "--no-create");
}

#[test]
fn through_models() {
    let Some(env) = Env::new() else { return };
    env.chain();
    mix(&env);
    env.image("convert model:top.qcow2?lba=4096 model:m.qcow2?lba=4096&vwc=1").ok();
    env.clean("m.qcow2");
    env.same("m.qcow2", "qcow2", "top.qcow2", "qcow2");
    env.image("convert -O raw model:m.qcow2 model:m.raw").ok();
    env.same("m.raw", "raw", "top.qcow2", "qcow2");
    env.image("convert -c -f raw mix.raw model:c.qcow2?mdts=1").ok();
    env.clean("c.qcow2");
    env.same("c.qcow2", "qcow2", "mix.raw", "raw");
}

#[test]
fn failures_say_what_is_left() {
    let Some(env) = Env::new() else { return };
    env.chain();
    let entry = env.l2_entry("top.qcow2", 168);
    let host = env.word("top.qcow2", entry);
    env.patch("top.qcow2", entry, &(host | 0x00ff_0000_0000_0000).to_be_bytes());
    // The source is bad: nothing is left of a destination that was not there before …
    env.image("convert top.qcow2 new.qcow2").fails(1, "top.qcow2: data cluster at offset");
    env.image("convert -O raw top.qcow2 new.raw").fails(1, "top.qcow2: data cluster at offset");
    assert!(!env.path("new.qcow2").exists() && !env.path("new.raw").exists());
    // … and one that was is no image any more, which is said.
    env.qemu_img("create -q -f qcow2 old.qcow2 1M").ok();
    let run = env.image("convert top.qcow2 old.qcow2");
    run.fails(1, "old.qcow2: is left without a valid image, and what was in it before is lost");
    env.image("check old.qcow2").fails(1, "old.qcow2: header field magic");
    env.qemu_img("create -q -f qcow2 old.qcow2 12M").ok();
    env.image("convert -n top.qcow2 old.qcow2").fails(1, "old.qcow2: a part of it was overwritten");
    env.clean("old.qcow2");
    // A device that fails.
    let run = env.image("convert mid.qcow2 model:bad.qcow2?fault=status=281:op=write,nth=3");
    assert_eq!(run.code, 1, "{run:?}");
    assert!(!env.path("bad.qcow2").exists());
    env.image("convert -O raw mid.qcow2 mem:1M")
        .fails(1, "mem:1048576: has room for 1048576 bytes");
    env.image("convert mid.qcow2 mem:1M").fails(1, "mem:1048576: has room for 1048576 bytes");
}

#[test]
fn progress_goes_to_standard_error() {
    let Some(env) = Env::new() else { return };
    env.chain();
    let run = env.image("convert -p top.qcow2 to.qcow2");
    assert!(run.code == 0 && run.out.is_empty() && run.err.contains("(100.00/100%)"), "{run:?}");
    let run = env.image("convert --output=json top.qcow2 to.qcow2");
    assert_eq!(run.err, "");
    let json = run.json();
    assert_eq!((&json["virtual-size"], &json["format"]), (&(12 << 20).into(), &"qcow2".into()));
}
