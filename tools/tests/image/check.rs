//! `check`: exit codes on damaged images, and repairs that qemu-img agrees with.

use crate::Env;

/// An image with data in 64 clusters.
fn image(env: &Env, name: &str) {
    env.qemu_img(&format!("create -q -f qcow2 {name} 64M")).ok();
    env.qemu_io(name, "qcow2", "write -P 5 0 4M; write -c -P 6 8M 64k");
}

#[track_caller]
fn both(env: &Env, name: &str, code: i32) {
    let ours = env.image(&format!("check {name}"));
    assert_eq!(ours.code, code, "{name}: {ours:?}");
    let theirs = env.qemu_img(&format!("check -f qcow2 {name}"));
    assert_eq!(theirs.code, code, "{name}: {theirs:?}");
    let ours = env.image(&format!("check --json {name}")).json();
    let theirs = env.qemu_img(&format!("check -f qcow2 --output=json {name}")).json();
    assert_eq!(ours, theirs, "{name}");
}

#[test]
fn clean_ones() {
    let Some(env) = Env::new() else { return };
    env.chain();
    image(&env, "a.qcow2");
    for name in ["a.qcow2", "top.qcow2", "mid.qcow2"] {
        both(&env, name, 0);
    }
    assert_eq!(env.image("check a.qcow2").out, env.qemu_img("check a.qcow2").out);
    assert_eq!(env.image("check -q a.qcow2").ok(), "");
    env.image("check model:a.qcow2").ok();
    env.qemu_img("create -q -f qcow2 -o extended_l2=on e.qcow2 1M").ok();
    both(&env, "e.qcow2", 0);
    // What cannot be checked.
    env.image("check -f raw base.raw").fails(63, "nothing that could be checked");
    env.image("check base.raw").fails(1, "magic");
    env.image("check missing").fails(1, "missing: ");
    env.image("check -r some a.qcow2").fails(2, "some");
    env.image("check -r all -U a.qcow2").fails(2, "cannot be used with");
}

#[test]
fn leaks() {
    let Some(env) = Env::new() else { return };
    image(&env, "a.qcow2");
    // An L2 entry that forgets its cluster.
    env.patch("a.qcow2", env.l2_entry("a.qcow2", 3), &[0; 8]);
    both(&env, "a.qcow2", 3);
    for repair in ["leaks", "all"] {
        std::fs::copy(env.path("a.qcow2"), env.path("b.qcow2")).unwrap();
        let out = env.image(&format!("check -r {repair} b.qcow2")).ok();
        assert!(out.contains("    1 leaked clusters\n    0 corruptions"), "{out}");
        env.clean("b.qcow2");
        env.same("a.qcow2", "qcow2", "b.qcow2", "qcow2");
    }
    std::fs::copy(env.path("a.qcow2"), env.path("b.qcow2")).unwrap();
    let json = env.image("check --json -r leaks model:b.qcow2").json();
    assert_eq!(json["leaks-fixed"], 1);
    env.clean("b.qcow2");
}

#[test]
fn corruption() {
    let Some(env) = Env::new() else { return };
    image(&env, "good.qcow2");
    let entry = |n| env.l2_entry("good.qcow2", n);
    let table = env.word("good.qcow2", 48);
    let block = env.word("good.qcow2", table);
    let host = |n| env.word("good.qcow2", entry(n)) & 0x00ff_ffff_ffff_fe00;
    // Name, offset, bytes, the code before repair. qemu-img judges what comes out.
    let cases: [(&str, u64, Vec<u8>); 6] = [
        ("refcount too low", block + host(5) / 65536 * 2, vec![0, 0]),
        ("COPIED flag missing", entry(7), vec![0]),
        ("two entries for one cluster", entry(9), env.peek("good.qcow2", entry(10), 8)),
        ("refcount block gone", table, vec![0; 8]),
        ("refcount block misplaced", table, vec![0, 0, 0, 0, 0, 0, 2, 0]),
        ("corrupt bit", 79, vec![2]),
    ];
    for (what, offset, bytes) in cases {
        std::fs::copy(env.path("good.qcow2"), env.path("bad.qcow2")).unwrap();
        env.patch("bad.qcow2", offset, &bytes);
        let flagged = what == "corrupt bit";
        let before = env.image("check bad.qcow2");
        assert_eq!(before.code, if flagged { 0 } else { 2 }, "{what}: {before:?}");
        if !flagged {
            assert!(before.err.contains("ERROR"), "{what}: {before:?}");
            assert!(before.out.contains("errors were found on the image"), "{what}: {before:?}");
            assert_ne!(env.qemu_img("check -f qcow2 bad.qcow2").code, 0, "{what}");
        }
        let contents = env.contents("bad.qcow2");
        let repaired = env.image("check -r all bad.qcow2");
        assert_eq!(repaired.code, 0, "{what}: {repaired:?}");
        env.clean("bad.qcow2");
        assert!(env.contents("bad.qcow2") == contents, "{what}");
        // It can be written to again.
        env.qemu_io("bad.qcow2", "qcow2", "write -P 9 0 6M");
        env.clean("bad.qcow2");
    }
}

#[test]
fn what_cannot_be_repaired_stays_reported() {
    let Some(env) = Env::new() else { return };
    image(&env, "a.qcow2");
    // An L2 entry that points past the file's end.
    env.patch("a.qcow2", env.l2_entry("a.qcow2", 3), &[0x80, 0x40]);
    let before = env.image("check a.qcow2");
    assert_eq!(before.code, 2, "{before:?}");
    let after = env.image("check -r leaks a.qcow2");
    assert_eq!(after.code, 2, "{after:?}");
    let theirs = env.qemu_img("check -f qcow2 a.qcow2");
    assert_eq!(theirs.code, 2, "{theirs:?}");
}

#[test]
fn findings_by_the_million_are_not_all_printed() {
    let Some(env) = Env::new() else { return };
    env.qemu_img("create -q -f qcow2 a.qcow2 1G").ok();
    env.qemu_io("a.qcow2", "qcow2", "write 0 64k");
    let rubbish: Vec<u8> =
        (0..8000u64).flat_map(|i| (0x80ff_0000_0000_0000 | i << 16).to_be_bytes()).collect();
    env.patch("a.qcow2", env.l2_entry("a.qcow2", 0), &rubbish);
    let run = env.image("check a.qcow2");
    assert_eq!(run.code, 2);
    assert!(run.err.lines().count() <= 1001 && run.err.contains("more lines like these"));
}
