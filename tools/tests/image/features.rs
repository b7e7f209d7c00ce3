//! Extended L2 entries and external data files in every command, with qemu-img and qemu-io beside
//! them.

use crate::Env;

/// What an image may be made with, beside the plain one.
const KINDS: [&str; 5] = [
    "extended_l2=on",
    "data_file=NAME.data",
    "extended_l2=on,data_file=NAME.data",
    "data_file=NAME.data,data_file_raw=on",
    "extended_l2=on,cluster_size=16k,data_file=NAME.data,data_file_raw=on",
];

fn options(kind: &str, name: &str) -> String {
    kind.replace("NAME", name)
}

#[test]
fn made_and_converted() {
    let Some(env) = Env::new() else { return };
    env.qemu_img("create -q -f qcow2 src.qcow2 5M").ok();
    env.qemu_io("src.qcow2", "qcow2", "write -P 1 0 100k; write -P 2 1M 3k; write -P 3 4900k 100k");
    for (i, kind) in KINDS.iter().enumerate() {
        let (ours, theirs) = (format!("ours{i}"), format!("theirs{i}"));
        env.image(&format!("create -q -o {} {ours} 3M", options(kind, "x"))).ok();
        env.qemu_img(&format!("create -q -f qcow2 -o {} {theirs} 3M", options(kind, "x"))).ok();
        let info = |name: &str| env.image(&format!("info -f qcow2 --json {name}")).json();
        let specific = |name: &str| info(name)["format-specific"].clone();
        assert_eq!(specific(&ours), specific(&theirs), "{kind}");
        let judge = env.qemu_img(&format!("info -f qcow2 --output=json {ours}")).json();
        assert_eq!(specific(&ours), judge["format-specific"], "{kind}");
        env.clean(&ours);
        env.qemu_io(&ours, "qcow2", "write -P 7 64k 5k; write -z 65k 1k; discard 0 64k");
        env.image(&format!("check {ours}")).ok();
        let name = format!("to{i}");
        env.image(&format!("convert -o {} src.qcow2 {name}", options(kind, &name))).ok();
        env.clean(&name);
        env.same("src.qcow2", "qcow2", &name, "qcow2");
        env.image(&format!("compare src.qcow2 {name}")).ok();
        env.image(&format!("convert -O raw {name} back.raw")).ok();
        env.same("src.qcow2", "qcow2", "back.raw", "raw");
        if kind.contains("raw=on") {
            env.same("src.qcow2", "qcow2", &format!("{name}.data"), "raw");
        }
        env.image(&format!("convert -n src.qcow2 {name}")).ok();
        env.clean(&name);
        env.same("src.qcow2", "qcow2", &name, "qcow2");
        env.image(&format!("map {name}")).ok();
    }
    env.image("create -o data_file_raw=on a 1M").fails(1, "data_file_raw=on needs data_file");
    env.image("create -o data_file=nbd:x a 1M").fails(1, "only paths can stand in an image");
    env.image("create -o data_file=a a 1M").fails(1, "data file \"a\"");
    assert!(!env.path("a").exists());
    env.image("convert -c -o data_file=a.data src.qcow2 a").fails(2, "cannot hold compressed");
    env.image("create -o extended_l2=on,cluster_size=8k a 1M").fails(1, "at least 16 KiB");
    std::fs::remove_file(env.path("to1.data")).unwrap();
    env.image("convert -O raw to1 back.raw").fails(1, "data file \"to1.data\"");
    assert!(env.image("info to1").ok().contains("data file: to1.data\n    data file raw: false"));
}

#[test]
fn changed_offline() {
    let Some(env) = Env::new() else { return };
    for (i, kind) in KINDS.iter().enumerate() {
        let raw = kind.contains("raw=on");
        let data = kind.contains("data_file");
        let grown = |name: &str, from: usize| {
            let bytes = env.contains_zeroes_from(name, from);
            assert!(bytes, "{kind}: what was added to {name} is zeroes");
        };
        // Size.
        let name = format!("r{i}");
        env.qemu_img(&format!("create -q -f qcow2 -o {} {name} 3000k", options(kind, &name))).ok();
        env.qemu_io(&name, "qcow2", "write -P 5 2900k 100k; write -P 6 0 64k");
        env.image(&format!("resize -q {name} 4000k")).ok();
        env.clean(&name);
        grown(&name, 3000 << 10);
        env.image(&format!("resize -q --shrink {name} 2950k")).ok();
        env.image(&format!("resize -q {name} 3M")).ok();
        env.clean(&name);
        grown(&name, 2950 << 10);
        if raw {
            env.same(&name, "qcow2", &format!("{name}.data"), "raw");
        }
        // Snapshots.
        let taken = env.image(&format!("snapshot -c one {name}"));
        if data {
            taken.fails(1, "external data file");
        } else {
            taken.ok();
            let before = env.contents(&name);
            env.qemu_io(&name, "qcow2", "write -P 9 10k 3k; write -z 1M 4k");
            env.clean(&name);
            env.image(&format!("snapshot -a one {name}")).ok();
            env.clean(&name);
            assert!(env.contents(&name) == before);
            env.image(&format!("snapshot -d one {name}")).ok();
            env.clean(&name);
            assert!(env.contents(&name) == before);
        }
        // Commit into such an image, from one.
        let (base, top) = (format!("b{i}"), format!("t{i}"));
        let o = if raw { "extended_l2=on".to_owned() } else { options(kind, &top) };
        let o = format!("-o {o} -b {base} -F qcow2 {top} 3M");
        env.make_overlay(&format!("create -q -f qcow2 {o}"), &base, kind);
        env.qemu_io(&top, "qcow2", "write -P 2 70k 2k; write -P 3 1M 70k; write -z 4k 5k");
        let before = env.contents(&top);
        env.image(&format!("commit -q {top}")).ok();
        for name in [&base, &top] {
            env.clean(name);
            assert!(env.contents(name) == before, "{kind}: {name}");
        }
        if raw {
            env.same(&base, "qcow2", &format!("{base}.data"), "raw");
        }
        // Rebase.
        env.qemu_io(&top, "qcow2", "write -P 8 9k 1k; write -P 8 200k 130k");
        let before = env.contents(&top);
        env.qemu_img("create -q -f qcow2 other 2M").ok();
        env.qemu_io("other", "qcow2", "write -P 2 64k 64k; write -P 1 1900k 100k");
        env.image(&format!("rebase -q -b other -F qcow2 {top}")).ok();
        env.clean(&top);
        assert!(env.contents(&top) == before, "{kind}");
        // Options.
        if data {
            std::fs::rename(env.path(&format!("{base}.data")), env.path("moved")).unwrap();
            env.image(&format!("amend -o data_file=moved,data_file_raw=off {base}")).ok();
            let info = env.qemu_img(&format!("info {base}")).ok();
            assert!(info.contains("data file: moved\n    data file raw: false"), "{info}");
            env.clean(&base);
            env.image(&format!("amend -o data_file_raw=on {base}")).fails(1, "new image");
        } else {
            env.image(&format!("amend -o data_file=x {base}")).fails(1, "no external data file");
        }
    }
}

impl Env {
    /// Makes an overlay over a base that gets some contents.
    fn make_overlay(&self, create: &str, base: &str, kind: &str) {
        let size = "3M";
        let o = options(kind, base);
        self.qemu_img(&format!("create -q -f qcow2 -o {o} {base} {size}")).ok();
        self.qemu_io(base, "qcow2", "write -P 1 0 128k; write -P 1 2M 100k");
        self.qemu_img(create).ok();
    }

    fn contains_zeroes_from(&self, name: &str, from: usize) -> bool {
        self.contents(name)[from..].iter().all(|&b| b == 0)
    }
}
