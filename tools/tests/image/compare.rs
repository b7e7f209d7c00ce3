//! `compare`: exit codes and offsets, as qemu-img has them.

use crate::Env;

#[test]
fn same_and_different() {
    let Some(env) = Env::new() else { return };
    env.chain();
    env.qemu_img("convert -O raw top.qcow2 flat.raw").ok();
    env.qemu_img("convert -O qcow2 -c top.qcow2 packed.qcow2").ok();
    let same = |args: &str| {
        let run = env.image(&format!("compare {args}"));
        assert_eq!((run.code, run.out.as_str()), (0, "Images are identical.\n"), "{args} {run:?}");
    };
    same("top.qcow2 packed.qcow2");
    same("-F raw top.qcow2 flat.raw");
    same("-f raw -F qcow2 flat.raw packed.qcow2");
    same("-s top.qcow2 top.qcow2");
    same("-p top.qcow2 model:packed.qcow2");
    assert_eq!(env.image("compare -q top.qcow2 packed.qcow2").ok(), "");

    // One byte in the middle of a sector.
    let mut bytes = std::fs::read(env.path("flat.raw")).unwrap();
    bytes[7_777_777] ^= 1;
    std::fs::write(env.path("other.raw"), &bytes).unwrap();
    let run = env.image("compare -F raw top.qcow2 other.raw");
    assert_eq!((run.code, run.out.as_str()), (1, "Content mismatch at offset 7777777!\n"));
    assert_eq!(env.qemu_img("compare -F raw top.qcow2 other.raw").code, 1);
    let run = env.image("compare --json -F raw top.qcow2 other.raw");
    assert_eq!(run.code, 1);
    let json = run.json();
    assert_eq!(json["identical"], false);
    assert_eq!((&json["difference"], &json["offset"]), (&"content".into(), &7_777_777.into()));
    let run = env.image("compare -q -F raw top.qcow2 other.raw");
    assert_eq!((run.code, run.out.as_str()), (1, ""));
}

#[test]
fn sizes_and_strict_mode() {
    let Some(env) = Env::new() else { return };
    env.qemu_img("create -q -f qcow2 a.qcow2 4M").ok();
    env.qemu_img("create -q -f qcow2 b.qcow2 5M").ok();
    for name in ["a.qcow2", "b.qcow2"] {
        env.qemu_io(name, "qcow2", "write -P 1 1M 64k");
    }
    for args in ["a.qcow2 b.qcow2", "b.qcow2 a.qcow2"] {
        let run = env.image(&format!("compare {args}"));
        assert_eq!(run.code, env.qemu_img(&format!("compare {args}")).code);
        assert!(run.code == 0 && run.out.starts_with("Warning: Image size mismatch!"), "{run:?}");
        let run = env.image(&format!("compare -s {args}"));
        assert!(
            run.code == 1 && run.out.starts_with("Strict mode: Image size mismatch!"),
            "{run:?}"
        );
    }
    env.qemu_io("b.qcow2", "qcow2", "write -P 1 4500k 1k");
    for args in ["a.qcow2 b.qcow2", "b.qcow2 a.qcow2"] {
        let run = env.image(&format!("compare {args}"));
        assert!(run.code == 1 && run.out.contains("at offset 4608000!"), "{run:?}");
    }
    // The same contents, allocated otherwise.
    env.qemu_img("create -q -f qcow2 c.qcow2 4M").ok();
    env.qemu_io("c.qcow2", "qcow2", "write -P 1 1M 64k; write -z 2M 64k");
    env.image("compare a.qcow2 c.qcow2").ok();
    let run = env.image("compare -s a.qcow2 c.qcow2");
    assert_eq!(run.out, "Strict mode: Offset 2097152 block status mismatch!\n");
    assert_eq!(run.code, 1);
    assert_eq!(env.qemu_img("compare -s a.qcow2 c.qcow2").code, 1);
    assert_eq!(env.image("compare --json -s a.qcow2 c.qcow2").json()["difference"], "allocation");
}

#[test]
fn failures_are_not_differences() {
    let Some(env) = Env::new() else { return };
    env.chain();
    env.image("compare top.qcow2 missing").fails(2, "missing");
    env.image("compare top.qcow2 base.raw").fails(2, "base.raw: header field magic");
    env.image("compare top.qcow2").fails(2, "IMAGE2");
    env.patch("top.qcow2", env.l2_entry("top.qcow2", 0), &[0, 0xff]);
    env.image("compare top.qcow2 mid.qcow2").fails(2, "data cluster at offset");
}
