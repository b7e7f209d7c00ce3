//! Volumes of groups as nodes, on files and models: images in them through reactors, judged by
//! qemu-img; who may open what at once; and what is refused.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use block::{Flags, Op, Status, Storage};
use dma::Pool;
use node::{
    Disk, DiskOptions, Error, GroupDevices, HostStorage, NodeSpec, OpenOptions, Parts, Reactors,
    Source, open_chain, open_source,
};
use qcow::create::{CreateOptions, create};
use qcow::open::Format;
use reactor::{Clock, Policy, PortalRequest, Start};
use volume::{Author, Group, Id, NewGroup, Shape, Vg};

const MIB: u64 = 1 << 20;

fn author() -> Author {
    Author { host: "here".to_owned(), time: 1_700_000_000 }
}

/// A group `vg` on files.
struct Rig {
    folder: tempfile::TempDir,
    paths: Vec<PathBuf>,
}

impl Rig {
    fn new(devices: usize, system_id: Option<&str>) -> Rig {
        let folder = tempfile::tempdir().unwrap();
        let paths: Vec<_> = (0..devices).map(|n| folder.path().join(format!("pv{n}"))).collect();
        for path in &paths {
            File::create(path).unwrap().set_len(100 * MIB).unwrap();
        }
        let rig = Rig { folder, paths };
        let (name, system_id) = ("vg".to_owned(), system_id.map(str::to_owned));
        let new = NewGroup { name, system_id, extent: MIB, metadata: MIB, tags: Vec::new() };
        Group::create(rig.storages(true), &new, &author()).unwrap();
        rig
    }

    fn storages(&self, writable: bool) -> Vec<HostStorage> {
        self.paths.iter().map(|path| HostStorage::open(path, writable).unwrap()).collect()
    }

    fn group(&self) -> Group<HostStorage> {
        Group::open(self.storages(true), None).unwrap()
    }

    fn change(&self, edit: impl FnOnce(&mut Vg) -> volume::Result<()>) {
        self.group().change(&author(), "", edit).unwrap();
    }

    /// A volume of so many MiB.
    fn volume(&self, name: &str, extents: u64, stripes: u32) {
        let shape = Shape { stripes, stripe_size: 32 };
        let id = Id::random().unwrap();
        self.change(|vg| vg.create_lv(id, name, extents, shape, &author()));
    }

    /// The devices for one who changes the group.
    fn managed(&self, kind: &str) -> GroupDevices {
        let nodes = self.list(kind);
        let nodes: Vec<_> = nodes.split(',').map(|node| NodeSpec::parse(node).unwrap()).collect();
        GroupDevices::open(&nodes).unwrap()
    }

    fn list(&self, kind: &str) -> String {
        let nodes = self.paths.iter().map(|path| format!("{kind}{}", path.display()));
        nodes.collect::<Vec<_>>().join(",")
    }

    fn node(&self, name: &str) -> String {
        format!("vol:vg/{name}@{}", self.list(""))
    }

    /// The volume as a file by itself, not by the queues.
    fn extract(&self, name: &str) -> PathBuf {
        let mut group = Group::open(self.storages(false), None).unwrap();
        let mut view = group.volume(name).unwrap();
        let mut bytes = vec![0; view.len() as usize];
        view.read_at(0, &mut bytes).unwrap();
        let path = self.folder.path().join(format!("{name}.extracted"));
        std::fs::write(&path, bytes).unwrap();
        path
    }
}

fn open(node: &str, options: &OpenOptions) -> Result<Source, Error> {
    open_source(&NodeSpec::parse(node).unwrap(), options)
}

fn writes() -> OpenOptions {
    OpenOptions::write(Format::Raw)
}

fn reads() -> OpenOptions {
    OpenOptions::read(Format::Raw)
}

fn refused(node: &str, options: &OpenOptions) -> String {
    match open(node, options) {
        Ok(_) => panic!("{node} was opened"),
        Err(e) => e.to_string(),
    }
}

fn make_image(node: &str, size: u64) {
    let mut bytes = open(node, &writes()).unwrap();
    create(&mut bytes, "test", &CreateOptions::new(size)).unwrap();
    bytes.close().unwrap();
}

fn serve(node: &str, format: Format, reactors: usize) -> Disk {
    let chain = open_chain(&NodeSpec::parse(node).unwrap(), &OpenOptions::write(format)).unwrap();
    let start = || Start { cpu: None, policy: Policy::Adaptive };
    let options = DiskOptions {
        reactors: (0..reactors).map(|_| start()).collect(),
        image: qcow::run::Options::default(),
    };
    let mut parts = Parts::new(chain).unwrap();
    parts.reserve(reactors - 1).unwrap();
    Disk::start(parts, options, Clock::real()).unwrap()
}

fn pattern(cluster: u64, seed: u8) -> u8 {
    (cluster as u8).wrapping_mul(31) ^ (cluster >> 8) as u8 ^ seed
}

/// Writes (or reads and compares) so many clusters, each with bytes of its own, one by one through
/// portals, which go to the reactors by turns.
fn clusters(disk: &Disk, op: Op, count: u64, seed: u8) {
    let mut pool = Pool::new(1, 65536).unwrap();
    let region = pool.region().clone();
    let buf = pool.take().unwrap();
    let mut portals: Vec<_> =
        (0..2).map(|_| disk.portal(4, vec![region.clone()]).unwrap()).collect();
    for cluster in 0..count {
        if op == Op::Write {
            region.write_seg(&buf.seg(), &vec![pattern(cluster, seed); 65536]);
        }
        let (offset, seg) = (cluster * 65536, Some(buf.seg()));
        let request = PortalRequest { id: 1, op, flags: Flags::NONE, offset, len: 65536, seg };
        assert_eq!(portals[cluster as usize % 2].call(request), Status::Ok, "{cluster}");
        if op == Op::Read {
            let mut data = vec![0; 65536];
            region.read_seg(&buf.seg(), &mut data);
            assert!(data.iter().all(|&b| b == pattern(cluster, seed)), "cluster {cluster}");
        }
    }
    let flush =
        PortalRequest { id: 0, op: Op::Flush, flags: Flags::NONE, offset: 0, len: 0, seg: None };
    assert_eq!(portals[0].call(flush), Status::Ok);
    pool.give(buf);
}

fn qemu_check(path: &Path) {
    let Ok(out) = Command::new("qemu-img").args(["check", "-f", "qcow2"]).arg(path).output() else {
        println!("skipped: qemu-img is not installed");
        return;
    };
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stdout));
}

#[test]
fn qcow2_in_volumes_of_all_shapes_is_an_image_like_any_other() {
    for (devices, stripes, kind, reactors) in
        [(1, 1, "", 1), (2, 2, "file:", 2), (2, 1, "model:", 2), (4, 4, "model:", 1)]
    {
        let rig = Rig::new(devices, None);
        rig.volume("below", 3, 1);
        rig.volume("disk", 24, stripes);
        rig.volume("between", devices as u64, devices as u32);
        // A second segment.
        rig.change(|vg| vg.extend_lv("disk", 16));
        assert!(rig.group().vg().lv("disk").unwrap().segments.len() >= 2);
        let node = format!("vol:vg/disk@{}", rig.list(kind));
        make_image(&node, 30 * MIB);
        let disk = serve(&node, Format::Qcow2, reactors);
        clusters(&disk, Op::Write, 480, 77);
        clusters(&disk, Op::Read, 480, 77);
        disk.close().unwrap();
        for path in &rig.paths {
            assert_eq!(path.metadata().unwrap().len(), 100 * MIB, "a device keeps its length");
        }
        let whole = rig.extract("disk");
        qemu_check(&whole);
        let disk = serve(whole.to_str().unwrap(), Format::Qcow2, 1);
        clusters(&disk, Op::Read, 480, 77);
        disk.close().unwrap();
        // Once more by another order of the devices.
        let turned: Vec<_> = rig.list("").split(',').rev().map(str::to_owned).collect();
        let disk = serve(&format!("vol:vg/disk@{}", turned.join(",")), Format::Qcow2, 1);
        clusters(&disk, Op::Read, 480, 77);
        disk.close().unwrap();
    }
}

#[test]
fn a_volume_grows_while_its_image_is_written_to() {
    for (kind, reactors, stripes) in [("", 2, 2), ("model:", 1, 1)] {
        let rig = Rig::new(2, None);
        rig.volume("disk", 16, stripes);
        rig.volume("behind", 2, 2);
        let node = format!("vol:vg/disk@{}", rig.list(kind));
        make_image(&node, 1 << 30);
        let disk = serve(&node, Format::Qcow2, reactors);
        let growing = disk.growing().unwrap();
        let devices = rig.managed(kind);
        let mut group = Group::open(devices.members().unwrap(), None).unwrap();
        let mut pool = Pool::new(1, 65536).unwrap();
        let region = pool.region().clone();
        let buf = pool.take().unwrap();
        let (mut cluster, mut sizes) = (0, vec![16 * MIB]);
        while cluster < 560 {
            let portals = (0..2).map(|_| disk.portal(4, vec![region.clone()]).unwrap());
            let mut portals: Vec<_> = portals.collect();
            let mut write = |cluster: u64| {
                region.write_seg(&buf.seg(), &vec![pattern(cluster, 9); 65536]);
                let (op, offset, seg) = (Op::Write, cluster * 65536, Some(buf.seg()));
                let (id, flags, len) = (1, Flags::NONE, 65536);
                portals[cluster as usize % 2].call(PortalRequest {
                    id,
                    op,
                    flags,
                    offset,
                    len,
                    seg,
                })
            };
            loop {
                match write(cluster) {
                    Status::Ok => cluster += 1,
                    Status::NoSpace => break,
                    other => panic!("{cluster}: {other}"),
                }
                if cluster == 560 {
                    break;
                }
            }
            if cluster < 560 {
                // It stays so until there is space.
                assert_eq!(write(cluster), Status::NoSpace);
                assert!(cluster * 65536 < *sizes.last().unwrap());
                group.change(&author(), "", |vg| vg.grow_lv("disk", 8).map(drop)).unwrap();
                let map = group.map("disk").unwrap();
                sizes.push(map.len());
                let volume = group.vg().lv("disk").unwrap().id;
                assert!(growing.has_grown(volume, &map).unwrap());
            }
        }
        pool.give(buf);
        assert!(sizes.len() >= 3 && sizes.is_sorted(), "{sizes:?}");
        clusters(&disk, Op::Read, 560, 9);
        let (disks, other) =
            (group.vg().lv("disk").unwrap().id, group.vg().lv("behind").unwrap().id);
        let map = group.map("behind").unwrap();
        let said = growing.has_grown(disks, &map).unwrap_err().to_string();
        assert!(said.contains("was moved"), "{said}");
        // The image is elsewhere by now, as far as that one knows.
        assert!(!growing.has_grown(other, &map).unwrap());
        let said = disk.volume_has_grown(disks, &map).unwrap_err().to_string();
        assert!(said.contains("was moved"), "{said}");
        let said = disk.volume_has_grown(other, &map).unwrap_err().to_string();
        assert!(said.contains("no layer lies in that volume"), "{said}");
        clusters(&disk, Op::Read, 560, 9);
        disk.close().unwrap();
        drop(group);
        devices.close().unwrap();
        let vg = rig.group().vg().clone();
        assert_eq!(vg.lv("disk").unwrap().extents() * MIB, *sizes.last().unwrap());
        let whole = rig.extract("disk");
        qemu_check(&whole);
        let disk = serve(whole.to_str().unwrap(), Format::Qcow2, 1);
        clusters(&disk, Op::Read, 560, 9);
        disk.close().unwrap();
    }
    // What lies in no volume has nothing to grow.
    let disk = serve("mem:1M", Format::Raw, 1);
    let rig = Rig::new(1, None);
    rig.volume("disk", 16, 1);
    let group = rig.group();
    let (id, map) = (group.vg().lv("disk").unwrap().id, group.map("disk").unwrap());
    let said = disk.volume_has_grown(id, &map).unwrap_err().to_string();
    assert!(said.contains("no layer lies in that volume"), "{said}");
    assert!(disk.growing().is_none());
    disk.close().unwrap();
}

/// Who pauses an image may be the one who would make its volume larger. And a close is for good.
#[test]
fn neither_a_pause_nor_a_close_waits_for_space() {
    let rig = Rig::new(1, None);
    rig.volume("disk", 16, 1);
    let node = format!("vol:vg/disk@{}", rig.list(""));
    make_image(&node, 1 << 30);
    let mut disk = serve(&node, Format::Qcow2, 1);
    let growing = disk.growing().unwrap();
    growing.may_grow(true);
    let mut pool = Pool::new(1, 65536).unwrap();
    let buf = pool.take().unwrap();
    let mut portal = disk.portal(400, vec![pool.region().clone()]).unwrap();
    let write = |portal: &mut reactor::Portal, cluster: u64| {
        let (op, offset, seg) = (Op::Write, cluster * 65536, Some(buf.seg()));
        let (id, flags, len) = (cluster, Flags::NONE, 65536);
        portal.send(PortalRequest { id, op, flags, offset, len, seg }).unwrap();
    };
    // More than the image has slots.
    let (mut sent, mut answered) = (0, 0);
    while sent - answered < 300 {
        while sent - answered < 300 {
            write(&mut portal, sent);
            sent += 1;
        }
        std::thread::sleep(Duration::from_millis(50));
        while let Some(reply) = portal.receive() {
            assert_eq!(reply.status, Status::Ok);
            answered += 1;
        }
    }
    assert!(growing.space().waiting() > 200 && growing.space().used() == 16 * MIB);
    let clock = Clock::real();
    let began = clock.now();
    let said = disk.resize(2 << 30).unwrap_err().to_string();
    assert!(said.contains("wait for space"), "{said}");
    let took = (clock.now() - began) / 1_000_000;
    assert!((2000..10_000).contains(&took), "{took} ms");
    // It goes on as before.
    let devices = rig.managed("");
    let mut group = Group::open(devices.members().unwrap(), None).unwrap();
    group.change(&author(), "", |vg| vg.grow_lv("disk", 8).map(drop)).unwrap();
    let (volume, map) = (group.vg().lv("disk").unwrap().id, group.map("disk").unwrap());
    assert_eq!(growing.volume(), Some((volume, 16 * MIB)));
    assert!(growing.has_grown(volume, &map).unwrap());
    assert_eq!(growing.volume(), Some((volume, 24 * MIB)));
    let mut more = 0;
    while more < 100 {
        assert_eq!(portal.wait().status, Status::Ok);
        more += 1;
    }
    // The portal is still there, and what it has sent waits.
    let close = std::thread::spawn(move || disk.close());
    while portal.in_flight() > 0 {
        let status = portal.wait().status;
        assert!(matches!(status, Status::Ok | Status::NoSpace | Status::Gone), "{status}");
    }
    drop(portal);
    close.join().unwrap().unwrap();
    assert_eq!(growing.volume(), None);
    assert!(!growing.has_grown(volume, &map).unwrap());
    growing.may_grow(true);
    pool.give(buf);
    drop(group);
    devices.close().unwrap();
    qemu_check(&rig.extract("disk"));
}

/// On reactors that serve many images a group needs one queue for each of them, and one for control
/// code, however many volumes are in use.
#[test]
fn volumes_share_the_queues_of_reactors() {
    const VOLUMES: usize = 20;
    for kind in ["model:", ""] {
        let rig = Rig::new(2, None);
        for n in 0..VOLUMES {
            rig.volume(&format!("v{n}"), 8, 1 + (n as u32 & 1));
            make_image(&rig.node(&format!("v{n}")), 4 * MIB);
        }
        let start = Start { cpu: None, policy: Policy::Adaptive };
        let reactors = Reactors::start(&[start, start], Clock::real()).unwrap();
        let devices = rig.managed(kind);
        let group = Group::open(devices.members().unwrap(), None).unwrap();
        let serve = |n: usize| {
            let source = devices.volume(&group, &format!("v{n}"), true).unwrap();
            let opened = qcow::open::Opened {
                storage: source,
                path: None,
                name: format!("vg/v{n}"),
                id: None,
            };
            let options = qcow::open::ChainOptions {
                format: Some(Format::Qcow2),
                writable: true,
                ..Default::default()
            };
            let chain = node::Chain::open(opened, options, &mut |_| unreachable!()).unwrap();
            let parts = Parts::on(chain, &reactors).unwrap();
            Disk::start_on(parts, &reactors, &[n & 1, 1 - (n & 1)], Default::default()).unwrap()
        };
        let mut disks: Vec<Option<Disk>> = (0..VOLUMES).map(|n| Some(serve(n))).collect();
        for (n, disk) in disks.iter().flatten().enumerate() {
            clusters(disk, Op::Write, 40, n as u8);
        }
        assert!(devices.volume(&group, "v3", false).is_err(), "it is in use");
        // Some go, and others come into their places.
        for n in [3, 7, 19] {
            disks[n].take().unwrap().close().unwrap();
        }
        assert_eq!(devices.uses(group.vg().lv("v3").unwrap().id), 0);
        assert!(devices.uses(group.vg().lv("v4").unwrap().id) == 1);
        for n in [19, 3] {
            disks[n] = Some(serve(n));
        }
        for (n, disk) in disks.iter().enumerate() {
            let Some(disk) = disk else { continue };
            clusters(disk, Op::Read, 40, n as u8);
        }
        // Whoever changes the group may let go of it before its volumes do.
        drop(group);
        devices.close().unwrap();
        for disk in disks.into_iter().flatten() {
            disk.close().unwrap();
        }
        open(rig.paths[0].to_str().unwrap(), &writes()).unwrap().close().unwrap();
        reactors.stop();
        for n in 0..VOLUMES {
            qemu_check(&rig.extract(&format!("v{n}")));
        }
    }
}

#[test]
fn volumes_of_one_group_are_in_use_together_and_each_once() {
    let rig = Rig::new(2, None);
    for name in ["a", "b", "c"] {
        rig.volume(name, 8, 2);
    }
    let a = serve(&rig.node("a"), Format::Raw, 1);
    // By another name of the same file.
    let link = rig.folder.path().join("link");
    std::os::unix::fs::symlink(&rig.paths[1], &link).unwrap();
    let b = format!("vol:vg/b@file:{},{}", link.display(), rig.paths[0].display());
    let b = serve(&b, Format::Raw, 1);
    clusters(&a, Op::Write, 128, 1);
    clusters(&b, Op::Write, 128, 2);
    for options in [writes(), reads()] {
        let said = refused(&rig.node("a"), &options);
        assert!(said.contains("in use by this process already"), "{said}");
    }
    // Others may have nothing of it but by leave.
    for path in &rig.paths {
        assert!(matches!(open(path.to_str().unwrap(), &reads()), Err(Error::InUse { .. })));
    }
    let mut free = reads();
    free.force_share = true;
    let mut seen = [0; 4096];
    open(&rig.node("a"), &free).unwrap().read_at(65536, &mut seen).unwrap();
    assert!(seen.iter().all(|&s| s == pattern(1, 1)));
    // A third, for reading, is read and not written to.
    let mut c = open(&rig.node("c"), &reads()).unwrap();
    assert!(c.read_only());
    let e = c.write_at(0, &[1; 512]).unwrap_err();
    assert_eq!(e.status, Status::ReadOnly);
    let again = open(&rig.node("c"), &reads()).unwrap();
    again.close().unwrap();
    clusters(&a, Op::Read, 128, 1);
    a.close().unwrap();
    clusters(&b, Op::Read, 128, 2);
    b.close().unwrap();
    c.close().unwrap();
    // Now all is given back.
    open(rig.paths[0].to_str().unwrap(), &writes()).unwrap();
    let a = serve(&rig.node("a"), Format::Raw, 1);
    clusters(&a, Op::Read, 128, 1);
    a.close().unwrap();
}

#[test]
fn a_group_that_is_read_is_written_to_when_a_volume_is() {
    let rig = Rig::new(2, None);
    rig.volume("a", 8, 2);
    rig.volume("b", 8, 1);
    let mut a = open(&rig.node("a"), &reads()).unwrap();
    let mut b = open(&rig.node("b"), &writes()).unwrap();
    b.write_at(4096, &[7; 4096]).unwrap();
    let mut seen = [1; 4096];
    a.read_at(0, &mut seen).unwrap();
    assert_eq!(seen, [0; 4096]);
    assert!(matches!(
        open(rig.list("").split_once(',').unwrap().0, &reads()),
        Err(Error::InUse { .. })
    ));
    b.close().unwrap();
    a.close().unwrap();
    // Where somebody else reads it is left as it is.
    let mut a = open(&rig.node("a"), &reads()).unwrap();
    let other = open(rig.paths[1].to_str().unwrap(), &reads()).unwrap();
    assert!(matches!(open(&rig.node("b"), &writes()), Err(Error::InUse { .. })));
    a.read_at(0, &mut seen).unwrap();
    drop(other);
    assert!(matches!(open(rig.paths[1].to_str().unwrap(), &writes()), Err(Error::InUse { .. })));
    a.close().unwrap();
    open(rig.paths[1].to_str().unwrap(), &writes()).unwrap();
    // A model is for reading from its start.
    let a = open(&format!("vol:vg/a@{}", rig.list("model:")), &reads()).unwrap();
    let said = refused(&format!("vol:vg/b@{}", rig.list("model:")), &writes());
    assert!(said.contains("for reading only"), "{said}");
    a.close().unwrap();
}

#[test]
fn what_is_not_the_group_that_is_meant_is_refused_and_left_alone() {
    let rig = Rig::new(2, None);
    rig.volume("a", 8, 2);
    rig.volume("ro", 2, 1);
    rig.change(|vg| {
        let lv = vg.lvs.iter_mut().find(|lv| lv.name == "ro").unwrap();
        lv.status.retain(|flag| flag != "WRITE");
        Ok(())
    });
    let foreign = Rig::new(1, Some("another-host"));
    let empty = rig.folder.path().join("empty");
    File::create(&empty).unwrap().set_len(100 * MIB).unwrap();
    let before: Vec<Vec<u8>> =
        rig.paths.iter().chain(&foreign.paths).map(|p| std::fs::read(p).unwrap()).collect();
    let (p0, p1) = (rig.paths[0].display(), rig.paths[1].display());
    let copy = rig.folder.path().join("copy");
    std::fs::copy(&rig.paths[0], &copy).unwrap();
    for (node, why) in [
        (rig.node("b"), "no volume vg/b"),
        (format!("vol:gv/a@{p0},{p1}"), "is in volume group vg, not in gv"),
        (format!("vol:vg/a@{p0}"), "these are not among the nodes: pv1"),
        (format!("vol:vg/a@{p0},{}", copy.display()), "the same physical volume as"),
        (format!("vol:vg/a@{p0},{p1},{}", copy.display()), "the same physical volume as"),
        (format!("vol:vg/a@{p0},{p1},{}", empty.display()), "no physical volume"),
        (
            format!("vol:vg/a@{p0},{p1},{}", foreign.paths[0].display()),
            "another volume group of the name",
        ),
        (format!("vol:vg/a@{}", foreign.paths[0].display()), "the system `another-host`"),
        (format!("vol:vg/a@{p0},{p1},mem:64M"), "is empty"),
        (format!("vol:vg/a@{p0},{p1},/none/such"), "No such file"),
    ] {
        for options in [reads(), writes()] {
            let said = refused(&node, &options);
            assert!(said.contains(why), "{node}: {said}");
        }
    }
    // The same twice: whoever only reads gets past the locks.
    let twice = format!("vol:vg/a@{p0},{p0}");
    assert!(refused(&twice, &reads()).contains("the same physical volume as"));
    assert!(matches!(open(&twice, &writes()), Err(Error::InUse { .. })));
    assert!(refused(&rig.node("ro"), &writes()).contains("may only be read"));
    open(&rig.node("ro"), &reads()).unwrap().close().unwrap();
    let after: Vec<Vec<u8>> =
        rig.paths.iter().chain(&foreign.paths).map(|p| std::fs::read(p).unwrap()).collect();
    assert!(before == after, "something was written");
    // A device that has become shorter.
    File::options().write(true).open(&rig.paths[1]).unwrap().set_len(50 * MIB).unwrap();
    for options in [reads(), writes()] {
        let said = refused(&rig.node("a"), &options);
        assert!(said.contains("smaller than its extents"), "{said}");
    }
    // Nothing of it is held.
    for path in &rig.paths {
        open(path.to_str().unwrap(), &writes()).unwrap();
    }
}
