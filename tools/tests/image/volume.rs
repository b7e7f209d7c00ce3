//! `vol:` nodes: every command on images in volumes of a group, whose devices are files.

use node::HostStorage;
use volume::{Author, Group, Id, NewGroup, Shape};

use crate::Env;

const MIB: u64 = 1 << 20;

/// A group `vg` on the files `pv0` and `pv1`, with these volumes: name, MiB, stripes, writable.
fn group(env: &Env, volumes: &[(&str, u64, u32, bool)]) {
    let open = |name: &str| {
        let path = env.path(name);
        std::fs::File::create(&path).unwrap().set_len(128 * MIB).unwrap();
        HostStorage::open(&path, true).unwrap()
    };
    let author = Author { host: "here".to_owned(), time: 1 };
    let (name, system_id) = ("vg".to_owned(), None);
    let new = NewGroup { name, system_id, extent: MIB, metadata: MIB, tags: Vec::new() };
    let mut group = Group::create(vec![open("pv0"), open("pv1")], &new, &author).unwrap();
    let edit = |vg: &mut volume::Vg| {
        for &(name, extents, stripes, writable) in volumes {
            let shape = Shape { stripes, stripe_size: 128 };
            vg.create_lv(Id::random().unwrap(), name, extents, shape, &author)?;
            if let (false, Some(lv)) = (writable, vg.lvs.last_mut()) {
                lv.status.retain(|flag| flag != "WRITE");
            }
        }
        Ok(())
    };
    group.change(&author, "", edit).unwrap();
}

/// The volume's bytes, not read by a queue.
fn extract(env: &Env, volume: &str, to: &str) {
    use block::Storage;
    let open = |name: &str| HostStorage::open(&env.path(name), false).unwrap();
    let mut group = Group::open(vec![open("pv0"), open("pv1")], None).unwrap();
    let mut view = group.volume(volume).unwrap();
    let mut bytes = vec![0; view.len() as usize];
    view.read_at(0, &mut bytes).unwrap();
    std::fs::write(env.path(to), bytes).unwrap();
}

#[test]
fn every_command_takes_images_in_volumes() {
    let Some(env) = Env::new() else { return };
    group(
        &env,
        &[
            ("a", 24, 2, true),
            ("b", 40, 1, true),
            ("c", 20, 1, true),
            ("ro", 1, 1, false),
            ("small", 8, 1, true),
        ],
    );
    let at = |volume: &str| format!("vol:vg/{volume}@pv0,pv1");
    let (a, b, c) = (at("a"), at("b"), at("c"));
    let byte = |i: u64| if i >> 20 & 3 == 1 { 0 } else { (i / 777) as u8 };
    let bytes: Vec<u8> = (0..16 * MIB).map(byte).collect();
    std::fs::write(env.path("flat"), bytes).unwrap();
    // A disk that is larger than its volume.
    env.image(&format!("create {a} 1G")).ok();
    let info = env.image(&format!("info --output json {a}")).json();
    assert_eq!(info["virtual-size"], 1 << 30);
    env.image(&format!("check {a}")).ok();
    env.image(&format!("convert -f raw -O qcow2 flat {b}")).ok();
    env.image(&format!("check {b}")).ok();
    env.image(&format!("compare -f raw -F qcow2 flat {b}")).ok();
    let map = env.image(&format!("map --output json {b}")).json();
    assert!(map.as_array().unwrap().len() > 2);
    // From volume to volume of one group, and out again.
    env.image(&format!("convert -O qcow2 {b} {a}")).ok();
    env.image(&format!("compare {a} {b}")).ok();
    env.image(&format!("convert -O raw {a} out")).ok();
    env.same("flat", "raw", "out", "raw");
    env.image(&format!("snapshot -c one {a}")).ok();
    env.image(&format!("resize {a} 20M")).ok();
    for volume in ["a", "b"] {
        extract(&env, volume, "extracted");
        env.clean("extracted");
    }
    // A raw image goes into a volume that is large enough.
    env.image(&format!("convert -f raw -O raw flat {c}")).ok();
    env.image(&format!("compare -f raw -F raw flat {c}")).ok();
    let small = at("small");
    env.image(&format!("convert -f raw -O raw flat {small}")).fails(1, "has room for 8388608");
    env.image(&format!("convert -f raw -O qcow2 flat {small}")).fails(1, "needs more");
    let read_only = at("ro");
    env.image(&format!("create {read_only} 1M")).fails(1, "may only be read");
    env.image(&format!("info -f raw {read_only}")).ok();
    env.image(&format!("info {}", at("none"))).fails(1, "no volume vg/none");
    env.image("info vol:vg/a@pv1").fails(1, "not among the nodes");
    env.image("info vol:vg/a").fails(2, "is needed");
    for name in ["pv0", "pv1"] {
        assert_eq!(std::fs::metadata(env.path(name)).unwrap().len(), 128 * MIB);
    }
}
