//! `map`: the same JSON as qemu-img's.

use crate::Env;

#[track_caller]
fn same(env: &Env, args: &str) {
    let ours = env.image(&format!("map --json {args}")).json();
    let theirs = env.qemu_img(&format!("map --output=json {args}")).json();
    assert_eq!(ours, theirs, "{args}");
}

#[test]
fn json_is_qemus() {
    let Some(env) = Env::new() else { return };
    env.chain();
    for name in ["top.qcow2", "mid.qcow2"] {
        same(&env, &format!("-f qcow2 {name}"));
    }
    same(&env, "-f raw base.raw");
    same(&env, "-f qcow2 --start-offset=64k --max-length=5M top.qcow2");
    same(&env, "-f qcow2 --start-offset=5M top.qcow2");
    let matrix = [
        "compat=0.10",
        "cluster_size=512",
        "cluster_size=64k,refcount_bits=1",
        "compression_type=zstd",
    ];
    for (i, o) in matrix.iter().enumerate() {
        let name = format!("m{i}.qcow2");
        env.qemu_img(&format!("create -q -f qcow2 -o {o} {name} 8M")).ok();
        env.qemu_io(
            &name,
            "qcow2",
            "write 0 320k; write -z 2M 1M; write -z 128k 64k; write 6M 64k; write -z -u 6M 2M",
        );
        if !o.contains("512") {
            env.qemu_io(&name, "qcow2", "write -c -P 3 4M 2M");
        }
        same(&env, &format!("-f qcow2 {name}"));
        env.qemu_img(&format!("create -q -f qcow2 -b {name} -F qcow2 over{i}.qcow2 10M")).ok();
        env.qemu_io(
            &format!("over{i}.qcow2"),
            "qcow2",
            "write 64k 64k; discard 0 1M; write 9M 64k",
        );
        same(&env, &format!("-f qcow2 over{i}.qcow2"));
    }
    env.qemu_img("create -q -f qcow2 -o cluster_size=2M large.qcow2 40M").ok();
    env.qemu_io("large.qcow2", "qcow2", "write 2M 4M; write -z 4M 6M; write -c -P 3 20M 2M");
    same(&env, "-f qcow2 large.qcow2");
}

#[test]
fn people_see_what_is_data() {
    let Some(env) = Env::new() else { return };
    env.qemu_img("create -q -f qcow2 a.qcow2 8M").ok();
    env.qemu_io("a.qcow2", "qcow2", "write 64k 128k; write -z 1M 64k");
    let theirs = env.qemu_img("map -f qcow2 a.qcow2").ok();
    assert_eq!(env.image("map a.qcow2").ok(), theirs);
    env.qemu_io("a.qcow2", "qcow2", "write -c 2M 64k");
    let ours = env.image("map a.qcow2").ok();
    assert!(ours.contains("0x200000        0x10000         compressed      a.qcow2"), "{ours}");
    assert_eq!(ours.lines().count(), 3, "{ours}");
}
