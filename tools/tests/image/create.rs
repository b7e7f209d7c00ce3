//! `create`: what qemu-img then says about the image, and what is refused.

use crate::Env;

#[test]
fn options_are_in_the_image() {
    let Some(env) = Env::new() else { return };
    let cases = [
        ("", "64M"),
        ("-o compat=0.10", "1G"),
        ("-o compat=v3,lazy_refcounts=on", "3T"),
        ("-o cluster_size=512,refcount_bits=64", "100M"),
        ("-o cluster_size=2M -o refcount_bits=1", "8M"),
        ("-o compression_type=zstd", "0"),
        ("-o preallocation=metadata", "9M"),
        ("-o preallocation=full,cluster_size=4k", "4M"),
        ("-o size=5M", ""),
        ("", "1000001"),
    ];
    for (i, (options, size)) in cases.iter().enumerate() {
        let (ours, theirs) = (format!("ours{i}.qcow2"), format!("theirs{i}.qcow2"));
        env.image(&format!("create -q -f qcow2 {options} {ours} {size}")).ok();
        env.qemu_img(&format!("create -q -f qcow2 {options} {theirs} {size}")).ok();
        let info = |name: &str| {
            let info = env.qemu_img(&format!("info -f qcow2 --output=json {name}")).json();
            (
                info["virtual-size"].clone(),
                info["cluster-size"].clone(),
                info["format-specific"].clone(),
            )
        };
        assert_eq!(info(&ours), info(&theirs), "{options}");
        env.clean(&ours);
        env.same(&ours, "qcow2", &theirs, "qcow2");
        env.image(&format!("check {ours}")).ok();
    }
    for (i, (options, len)) in
        [("", 4096), ("-o preallocation=falloc", 4096), ("-o preallocation=full", 4096)]
            .iter()
            .enumerate()
    {
        let name = format!("r{i}.raw");
        env.image(&format!("create -q -f raw {options} {name} 4000")).ok();
        let meta = std::fs::metadata(env.path(&name)).unwrap();
        assert_eq!(meta.len(), *len, "{options}");
        let allocated = std::os::unix::fs::MetadataExt::blocks(&meta) > 0;
        assert_eq!(allocated, !options.is_empty(), "{options}");
    }
}

#[test]
fn over_a_backing_file() {
    let Some(env) = Env::new() else { return };
    env.chain();
    std::fs::create_dir(env.path("sub")).unwrap();
    let made = env.image("create --json -b ../top.qcow2 -F qcow2 sub/o.qcow2").json();
    assert_eq!(made["virtual-size"], 12 << 20);
    assert_eq!(made["backing-filename"], "../top.qcow2");
    env.same("sub/o.qcow2", "qcow2", "top.qcow2", "qcow2");
    env.image("create -q -o backing_file=base.raw,backing_fmt=raw o.qcow2 1M").ok();
    let info = env.qemu_img("info --output=json o.qcow2").json();
    assert_eq!(
        (&info["virtual-size"], &info["backing-filename-format"]),
        (&(1 << 20).into(), &"raw".into())
    );
    env.image("create -q -u -b missing -F qcow2 u.qcow2 1M").ok();

    env.image("create -b top.qcow2 n.qcow2").fails(2, "state its format with -F");
    env.image("create -b missing -F qcow2 n.qcow2").fails(1, "backing file \"missing\"");
    env.image("create -b base.raw -F qcow2 n.qcow2").fails(1, "magic");
    env.image("create -b nbd:x:1 -F raw n.qcow2").fails(1, "only paths can stand in an image");
    env.image("create -b top.qcow2 -F qcow2 top.qcow2").fails(1, "backing chain");
    env.image("create -b top.qcow2 -F qcow2 base.raw").fails(1, "backing chain");
    env.image("create -b top.qcow2 -F qcow2 --allow-backing sub n.qcow2")
        .fails(1, "--allow-backing");
    env.image("create -f raw -b top.qcow2 -F qcow2 n.raw").fails(2, "raw image cannot have");
    env.image("create -u -b top.qcow2 -F qcow2 n.qcow2").fails(2, "a size is needed");
    assert!(!env.path("n.qcow2").exists() && !env.path("n.raw").exists());
    assert_eq!(env.contents("top.qcow2").len(), 12 << 20);
}

#[test]
fn an_existing_file_is_overwritten_but_only_by_what_works() {
    let Some(env) = Env::new() else { return };
    std::fs::write(env.path("old"), vec![7; 3 << 20]).unwrap();
    let kept = |why: &str| {
        let old = std::fs::read(env.path("old")).unwrap();
        assert!(old == vec![7; 3 << 20], "{why}");
    };
    env.image("create -o cluster_size=1000 old 1G")
        .fails(1, "old: cluster_size=1000: powers of two");
    env.image("create -o cluster_size=512 old 1P").fails(1, "L1 table would be larger than 32 MiB");
    env.image("create -o nonsense=1 old 1G").fails(2, "option nonsense=1");
    env.image("create -o nonsense old 1G").fails(2, "no name=value");
    env.image("create old 1X").fails(2, "no size like");
    env.image("create old 9E").fails(2, "no size like");
    env.image("create old").fails(2, "a size is needed");
    kept("refused ones");
    env.image("create -q old 1M").ok();
    env.clean("old");
    assert!(std::fs::metadata(env.path("old")).unwrap().len() < 1 << 20);
    env.image("create no/folder 1M").fails(1, "no/folder: cannot be created: No such file");
    env.image("create -f raw mem:1M 2M").fails(1, "mem:1048576: has room for 1048576 bytes");
    env.image("create mem:64k 1M").fails(1, "mem:65536: has room for 65536 bytes");
    env.image("create -q mem:1M 1M").ok();
}

#[test]
fn through_a_model() {
    let Some(env) = Env::new() else { return };
    env.image("create -q model:m.qcow2?lba=4096&vwc=1 256M").ok();
    env.clean("m.qcow2");
    assert!(std::fs::metadata(env.path("m.qcow2")).unwrap().len() < 1 << 20);
    env.image("create -q -f raw model:m.raw 10000").ok();
    assert_eq!(std::fs::metadata(env.path("m.raw")).unwrap().len(), 10240);
    env.image("create model:small.qcow2?size=64k 256M").fails(1, "has room for 65536 bytes");
    assert!(!env.path("small.qcow2").exists());
    std::fs::write(env.path("old.qcow2"), "old").unwrap();
    let run = env.image("create model:old.qcow2?size=64k 256M");
    run.fails(1, "is left without a valid image, and what was in it before is lost");
}
