//! Nodes end to end: files and models, written through a reactor, judged by qemu-img.

use std::path::Path;
use std::process::Command;

use block::{Flags, Op, Status};
use dma::Pool;
use node::{Disk, DiskOptions, NodeSpec, OpenOptions, Parts, open_chain};
use qcow::create::{CreateOptions, create};
use qcow::open::Format;
use reactor::{Clock, Policy, PortalRequest, Start};

fn options() -> DiskOptions {
    DiskOptions {
        reactors: vec![Start { cpu: None, policy: Policy::Adaptive }],
        image: qcow::run::Options::default(),
    }
}

fn make(path: &Path, size: u64) {
    let file = std::fs::File::options().create_new(true).read(true).write(true).open(path).unwrap();
    let mut storage = node::HostStorage::of(file, false).unwrap();
    create(&mut storage, "test", &CreateOptions::new(size)).unwrap();
}

fn serve(spec: &str, format: Format) -> Disk {
    let spec = NodeSpec::parse(spec).unwrap();
    let chain = open_chain(&spec, &OpenOptions::write(format)).unwrap();
    Disk::start(Parts::new(chain).unwrap(), options(), Clock::real()).unwrap()
}

/// Writes a pattern over the first 32 MiB and reads it back, 16 deep.
fn exercise(disk: &Disk, seed: u8) {
    let mut pool = Pool::new(16, 65536).unwrap();
    let region = pool.region().clone();
    let mut portal = disk.portal(16, vec![region.clone()]).unwrap();
    for op in [Op::Write, Op::Read] {
        let (mut next, mut done) = (0u64, 0);
        let mut bufs: std::collections::HashMap<u64, dma::Buf> = Default::default();
        while done < 512 {
            while next < 512 && portal.room() > 0 {
                let buf = pool.take().unwrap();
                if op == Op::Write {
                    region.write_seg(&buf.seg(), &vec![next as u8 ^ seed; 65536]);
                }
                let request = PortalRequest {
                    id: next,
                    op,
                    flags: Flags::NONE,
                    offset: next * 65536,
                    len: 65536,
                    seg: Some(buf.seg()),
                };
                portal.send(request).unwrap();
                bufs.insert(next, buf);
                next += 1;
            }
            let reply = portal.wait();
            assert_eq!(reply.status, Status::Ok);
            let buf = bufs.remove(&reply.id).unwrap();
            if op == Op::Read {
                let mut data = vec![0; 65536];
                region.read_seg(&buf.seg(), &mut data);
                assert!(data.iter().all(|&b| b == reply.id as u8 ^ seed), "cluster {}", reply.id);
            }
            pool.give(buf);
            done += 1;
        }
    }
    let flush =
        PortalRequest { id: 0, op: Op::Flush, flags: Flags::NONE, offset: 0, len: 0, seg: None };
    assert_eq!(portal.call(flush), Status::Ok);
}

fn qemu_check(path: &Path) {
    let Ok(out) = Command::new("qemu-img").arg("check").arg(path).output() else {
        println!("skipped: qemu-img is not installed");
        return;
    };
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stdout));
}

#[test]
fn qcow2_on_files_and_models() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    make(&path, 64 << 20);
    let p = path.display();
    let nodes = [
        format!("file:{p}"),
        format!("model:{p}"),
        format!("model:{p}?lba=4096&vwc=1&mdts=1"),
        format!("{p}"),
    ];
    for (i, node) in nodes.iter().enumerate() {
        let disk = serve(node, Format::Qcow2);
        exercise(&disk, i as u8 + 1);
        disk.close().unwrap();
        qemu_check(&path);
        let len = std::fs::metadata(&path).unwrap().len();
        assert!(len < 40 << 20, "{node}: the file was left {len} bytes long");
    }
}

#[test]
fn raw_on_memory_and_files() {
    let disk = serve("mem:64M", Format::Raw);
    exercise(&disk, 1);
    disk.close().unwrap();
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(64 << 20).unwrap();
    let disk = serve(&format!("file:{}", file.path().display()), Format::Raw);
    exercise(&disk, 9);
    disk.close().unwrap();
    let data = std::fs::read(file.path()).unwrap();
    assert!(data.len() == 64 << 20 && data[70000] == 1 ^ 9);
}

#[test]
fn an_image_in_use_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    make(&path, 1 << 20);
    let disk = serve(&format!("model:{}", path.display()), Format::Qcow2);
    let spec = NodeSpec::parse(path.to_str().unwrap()).unwrap();
    for options in [OpenOptions::write(Format::Qcow2), OpenOptions::read(Format::Qcow2)] {
        let e = open_chain(&spec, &options).err().unwrap().to_string();
        assert!(e.contains("in use") && e.contains("a.qcow2"), "{e}");
    }
    let share = OpenOptions { force_share: true, ..OpenOptions::read(Format::Qcow2) };
    drop(open_chain(&spec, &share).unwrap());
    disk.close().unwrap();
    drop(open_chain(&spec, &OpenOptions::read(Format::Qcow2)).unwrap());
}

/// Whoever is waited for may write until he lets go: what a killed server has in flight ends so.
#[test]
fn a_length_is_that_under_the_lock() {
    let dir = tempfile::tempdir().unwrap();
    let paths = ["base.qcow2", "top.qcow2"].map(|name| dir.path().join(name));
    make(&paths[0], 1 << 20);
    let mut options = CreateOptions::new(1 << 20);
    options.backing = Some((paths[0].display().to_string(), Format::Qcow2));
    let open = |path: &Path| {
        std::fs::File::options().create(true).truncate(false).read(true).write(true).open(path)
    };
    let top = open(&paths[1]).unwrap();
    create(&mut node::HostStorage::of(top, false).unwrap(), "test", &options).unwrap();
    let held = paths.each_ref().map(|path| {
        let file = open(path).unwrap();
        (file::ImageLock::exclusive(&file).unwrap(), file)
    });
    let spec = NodeSpec::parse(paths[1].to_str().unwrap()).unwrap();
    let opens = std::thread::spawn(move || open_chain(&spec, &OpenOptions::write(Format::Qcow2)));
    std::thread::sleep(std::time::Duration::from_millis(150));
    for (lock, file) in held.into_iter().rev() {
        file.set_len(5 << 20).unwrap();
        drop((lock, file));
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    let chain = opens.join().unwrap().unwrap();
    let lens = chain.layers.iter().map(|l| block::Storage::len(&l.storage));
    assert_eq!(lens.collect::<Vec<_>>(), [5 << 20; 2]);
}

#[test]
fn qcow2_on_stripes_lies_where_the_layout_says() {
    const CHUNK: usize = 16 << 10;
    let dir = tempfile::tempdir().unwrap();
    // A member keeps its length: also the only model, and files, which could grow.
    for kinds in [
        vec!["model:", "model:"],
        vec!["model:", "file:", "model:", ""],
        vec!["file:", "model:"],
        vec!["file:", "", "file:"],
    ] {
        let paths: Vec<_> = (0..kinds.len()).map(|i| dir.path().join(format!("m{i}"))).collect();
        let members = paths.iter().zip(&kinds).map(|(path, kind)| {
            std::fs::File::create(path).unwrap().set_len(48 << 20).unwrap();
            let lba = if *kind == "model:" { "?lba=4096&vwc=1" } else { "" };
            format!(",{kind}{}{lba}", path.display())
        });
        let node = format!("stripe:16k{}", members.collect::<String>());
        let spec = NodeSpec::parse(&node).unwrap();
        let mut bytes = node::open_source(&spec, &OpenOptions::write(Format::Raw)).unwrap();
        create(&mut bytes, "test", &CreateOptions::new(64 << 20)).unwrap();
        bytes.close().unwrap();
        let disk = serve(&node, Format::Qcow2);
        exercise(&disk, 77);
        disk.close().unwrap();
        // Put together by hand, it is an image like any other.
        let contents: Vec<Vec<u8>> = paths.iter().map(|p| std::fs::read(p).unwrap()).collect();
        assert!(contents.iter().all(|c| c.len() == 48 << 20), "{node}");
        let whole: Vec<u8> = (0..(48 << 20) / CHUNK)
            .flat_map(|row| contents.iter().flat_map(move |c| &c[row * CHUNK..(row + 1) * CHUNK]))
            .copied()
            .collect();
        let path = dir.path().join("whole.qcow2");
        std::fs::write(&path, whole).unwrap();
        qemu_check(&path);
        let disk = serve(path.to_str().unwrap(), Format::Qcow2);
        let mut pool = Pool::new(1, 65536).unwrap();
        let region = pool.region().clone();
        let mut portal = disk.portal(1, vec![region.clone()]).unwrap();
        let buf = pool.take().unwrap();
        for cluster in [0, 1, 300, 511u64] {
            let offset = cluster * 65536;
            let (op, flags, seg) = (Op::Read, Flags::NONE, Some(buf.seg()));
            let read = PortalRequest { id: 0, op, flags, offset, len: 65536, seg };
            assert_eq!(portal.call(read), Status::Ok);
            let mut data = vec![0; 65536];
            region.read_seg(&buf.seg(), &mut data);
            assert!(data.iter().all(|&b| b == cluster as u8 ^ 77), "cluster {cluster}");
        }
        drop(portal);
        disk.close().unwrap();
    }
}
