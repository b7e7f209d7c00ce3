//! What is refused, and what is said then. Nothing is changed by any of it.

use super::*;

/// No command of these changes a byte.
#[track_caller]
fn unchanged(env: &Env, act: impl FnOnce()) {
    let before = (env.bytes("a"), env.bytes("b"));
    act();
    assert!(before == (env.bytes("a"), env.bytes("b")), "devices were written to");
}

#[test]
fn what_cannot_be_done_says_why_and_what_next() {
    let env = Env::group();
    env.run("create vg/v --size 8M a b").ok();
    env.run("create vg/s --size 8M --stripes 2 a b").ok();
    let lists = "volume list";
    unchanged(&env, || {
        for (line, texts) in [
            (
                "create vg/x --size 1G a b",
                &["vg/x: no space", "256 extents wanted, 18 free", lists][..],
            ),
            ("create vg/x --size 72M --stripes 2 a b", &["not on as many devices at once"]),
            ("create vg/v --size 4M a b", &["vg/v: exists already"]),
            ("create other/x --size 4M a b", &["in volume group vg, not in other"]),
            ("extend vg/v --size 4M a b", &["vg/v: has 8 MiB", "not made smaller"]),
            ("extend vg/v --size +1T a b", &["vg/v: no space"]),
            ("extend vg/nix --size +4M a b", &["no volume vg/nix; volume group vg has s, v"]),
            ("remove vg/nix a b", &["no volume vg/nix"]),
            ("rename vg/nix x a b", &["no volume vg/nix"]),
            ("rename vg/v s a b", &["the name s is taken"]),
            ("remove-group vg a b", &["vg has 2 volumes"]),
            ("list a", &["has 2 devices, and one is not among those that are named: pv1"]),
            ("list a b lvm.conf", &["lvm.conf: is in no volume group"]),
            ("list a no-such-file", &["no-such-file: No such file"]),
            ("check a", &["device pv1", "is not among those that are named"]),
            (
                "create-group x a",
                &[
                    "a: holds an LVM2 physical volume of volume group vg of the system `me` with 2 volumes, at byte 512",
                    "--force",
                ],
            ),
            ("create-group x /dev/null", &["neither a regular file nor a block device"]),
        ] {
            env.run(line).fails(1, texts);
        }
        for (line, text) in [
            ("list", "NODE"),
            ("list a b a", "a: is named twice"),
            ("list a b ./a", "./a: is named twice (as a too)"),
            ("create vg --size 4M a b", "is no GROUP/NAME"),
            ("create vg/-x --size 4M a b", "is no name for a volume"),
            ("create vg/x_tdata --size 4M a b", "has a meaning for LVM"),
            ("create vg/x --size 0 a b", "is no size"),
            ("create vg/x --size 4M --tag a,b a b", "is no tag"),
            ("create vg/x --size 4M --stripes 3 a b", "--stripes 3, but the volume group has 2"),
            ("create vg/x --size 4M --stripes 2 --stripe-size 5000 a b", "a power of two from 4k"),
            ("create vg/x --size 4M --stripes 2 --stripe-size 8M a b", "a power of two from 4k"),
            ("create vg/x --size 4M --stripe-size 64k a b", "is for --stripes"),
            ("rename vg/v a/b a b", "is no name for a volume"),
            ("extend vg/v --size +9999P a b", "is no size"),
            ("create-group a/b a b", "is no name"),
            ("create-group x a b --extent-size 5M", "a power of two from 4k"),
            ("create-group x a b --metadata-size 4k", "from 1M to 1G"),
            ("create-group x a b --system-id localhost", "is no system ID"),
        ] {
            env.run(line).fails(2, &[text]);
        }
    });
    File::create(env.path("empty")).unwrap();
    env.run("create-group x empty").fails(1, &["empty: has 0 B", "truncate -s"]);
    env.disk("small", 18);
    env.run("create-group x small").fails(1, &["small: has 18 MiB", "22 MiB are needed"]);
    // Two groups at once.
    env.disk("c", 64);
    env.run("create-group other c").ok();
    env.run("list a b c").fails(1, &["c: is in volume group other, but a in vg"]);
    env.run("check a b c").fails(1, &["c, metadata at 4096: is of volume group"]);
}

#[test]
fn a_device_that_is_in_use_is_left_alone() {
    let env = Env::group();
    env.run("create vg/v --size 8M a b").ok();
    let file = File::options().read(true).write(true).open(env.path("b")).unwrap();
    let lock = file::ImageLock::exclusive(&file).unwrap();
    unchanged(&env, || {
        // Each waits a second for a process that may be ending.
        for line in [
            "create vg/x --size 4M a b",
            "remove vg/v a b",
            "create-group x a b --force",
            "list a b",
        ] {
            env.run(line).fails(1, &["b: the image is in use by another process", "ctl list"]);
        }
        // A look is possible all the same.
        assert_eq!(env.run("list -U --json a b").json()["volumes"][0]["name"], "v");
        env.run("check -U a b").ok();
        env.run("export-text -U a b").ok();
    });
    drop(lock);
    env.run("remove vg/v a b").ok();
}

#[test]
fn another_hosts_group_is_only_looked_at_until_it_is_taken_over() {
    let env = Env::group();
    env.run("create vg/v --size 8M a b").ok();
    env.called("you", "");
    unchanged(&env, || {
        for line in ["create vg/x --size 4M a b", "remove vg/v a b", "extend vg/v --size +4M a b"] {
            env.run(line)
                .fails(1, &["belongs to the system `me`, and this host is `you`", "take-over vg"]);
        }
        env.run("remove-group vg a b").fails(1, &["belongs to the system `me`"]);
        let list = env.run("list --json a b").json();
        assert_eq!(
            (&list["group"]["ours"], &list["volumes"][0]["name"]),
            (&json!(false), &json!("v"))
        );
        assert!(env.run("list a b").ok().contains("belongs to: me, another host"));
        env.run("check a b").ok();
        env.run("take-over other a b").fails(1, &["in volume group vg, not in other"]);
    });
    // By either name of this host.
    env.run("extend vg/v --size +4M --system-id me a b").ok();
    env.called("you", "local { extra_system_ids = [ \"x\", \"me\" ] }");
    env.run("extend vg/v --size +4M a b").ok();
    env.called("you", "");
    let done = env.run("take-over vg --json a b").json();
    assert_eq!(done, json!({ "group": "vg", "old-system-id": "me", "system-id": "you" }));
    env.run("extend vg/v --size +4M a b").ok();
    assert_eq!(env.run("take-over vg a b").ok(), "Volume group vg belongs to `you` already.\n");
    env.called("me", "");
    env.run("remove vg/v a b").fails(1, &["belongs to the system `you`"]);
}

#[test]
fn damage_is_found_and_named() {
    let env = Env::group();
    env.run("create vg/v --size 8M a b").ok();
    let list = |nodes: &str| env.run(&format!("list {nodes}"));
    let a = File::options().read(true).write(true).open(env.path("a")).unwrap();
    let mut header = vec![0; 512];
    a.read_exact_at(&mut header, 4096).unwrap();
    env.run("rename vg/v w a b").ok();
    let mut newer = vec![0; 512];
    a.read_exact_at(&mut newer, 4096).unwrap();

    // One copy is old: as after a crash between two headers.
    a.write_all_at(&header, 4096).unwrap();
    env.run("check a b").fails(1, &["a, metadata at 4096: has state 2, but the newest is 3"]);
    assert!(list("a b").ok().contains("w: 8 MiB"));
    env.run("check a b").fails(1, &["has state 2"]);
    env.run("extend vg/w --size 8M a b").ok();
    env.run("check a b").ok();

    // A damaged header, and a damaged text.
    a.read_exact_at(&mut newer, 4096).unwrap();
    let mut torn = newer.clone();
    torn[45] ^= 1;
    a.write_all_at(&torn, 4096).unwrap();
    env.run("check a b")
        .fails(1, &["a: the metadata area at 4096: a metadata area's header has a wrong checksum"]);
    let report = env.run("check a b --json");
    assert_eq!(report.code, 1);
    let report: Value = serde_json::from_str(&report.out).unwrap();
    assert_eq!(
        (&report["sound"], &report["devices"][0]["copies"][0]["seqno"]),
        (&json!(false), &Value::Null)
    );
    assert!(list("a b").ok().contains("w: 8 MiB"));
    a.write_all_at(&newer, 4096).unwrap();
    let text = u64::from_le_bytes(newer[40..48].try_into().unwrap());
    let mut byte = [0];
    a.read_exact_at(&mut byte, 4096 + text + 20).unwrap();
    a.write_all_at(&[byte[0] ^ 1], 4096 + text + 20).unwrap();
    env.run("check a b").fails(1, &["the metadata in force has a wrong checksum"]);
    a.write_all_at(&byte, 4096 + text + 20).unwrap();
    env.run("check a b").ok();
    // The next change repairs it, whatever it is.
    a.write_all_at(&torn, 4096).unwrap();
    env.run("extend vg/w --size +4M a b").ok();
    env.run("check a b").ok();

    // The label; the device's size.
    let mut label = vec![0; 512];
    a.read_exact_at(&mut label, 512).unwrap();
    a.write_all_at(&[0xff], 512 + 40).unwrap();
    env.run("check a b").fails(1, &["a: the label in sector 1 has a wrong checksum"]);
    list("a b").fails(1, &["a: the label in sector 1 has a wrong checksum"]);
    a.write_all_at(&label, 512).unwrap();
    a.set_len(32 * MIB).unwrap();
    env.run("check a b").fails(1, &["a: has 33554432 bytes, but had 67108864"]);
}
