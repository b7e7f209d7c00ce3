//! Other backing files below an image that is served.

use super::*;

/// Writes the same byte to so many MiB, or has them be zeroes.
fn fill(image: &Path, offset: u64, mib: u64, byte: u8) {
    let disk = serve(image.to_str().unwrap(), 1);
    let pool = Pool::new(1, 1 << 20).unwrap();
    let data = pool.region().seg(0, 1 << 20).unwrap();
    pool.region().write_seg(&data, &vec![byte; 1 << 20]);
    let mut portal = disk.door().open(1, vec![pool.region().clone()]).unwrap();
    let (op, seg) = if byte == 0 { (Op::WriteZeroes, None) } else { (Op::Write, Some(data)) };
    for n in 0..mib {
        let (flags, offset, len) = (Flags::NONE, offset + (n << 20), 1 << 20);
        let r = PortalRequest { id: 0, op, flags, offset, len, seg };
        assert_eq!(portal.call(r), Status::Ok);
    }
    drop(portal);
    disk.close().unwrap();
}

/// An empty image over a raw file of which nothing is zero, half as long and a bit.
fn over_raw(path: &Path) {
    let raw = vec![0xbb; (SIZE / 2 + 512) as usize];
    std::fs::write(path.with_file_name("raw"), raw).unwrap();
    let mut options = CreateOptions::new(SIZE);
    options.backing = Some(("raw".to_owned(), Format::Raw));
    let file = std::fs::File::options().create_new(true).read(true).write(true).open(path);
    let mut storage = node::HostStorage::of(file.unwrap(), false).unwrap();
    create(&mut storage, "over raw", &options).unwrap();
}

#[test]
fn another_backing_file_shows_nowhere() {
    let _alone = ALONE.lock();
    let dir = tempfile::tempdir().unwrap();
    let [base, a, b, thin] = files(dir.path(), ["base", "a", "b", "thin"]);
    make(&base, SIZE);
    over_raw(&thin);
    fill(&base, 1 << 20, 3, 0xaa);
    fill(&base, 20 << 20, 1, 0xaa);
    let mut disk = serve(base.to_str().unwrap(), 1);
    disk.snapshot(&a).unwrap();
    disk.close().unwrap();
    fill(&a, 2 << 20, 1, 0);
    let mut disk = serve(a.to_str().unwrap(), 1);
    disk.snapshot(&b).unwrap();
    disk.rebase(Some(("thin", Format::Qcow2)), &[], &mut Freely).unwrap();
    disk.close().unwrap();
    let mut held = vec![0; (SIZE / PIECE) as usize];
    for mib in [1, 3, 20] {
        held[mib * 256..(mib + 1) * 256].fill(0xaa);
    }
    compare(&b, &held);
    qemu_agrees(&[&b], &held);
}

/// Zeroes cluster after cluster of so many MiB.
fn zero_slowly(door: &Door, offset: u64, mib: u64) {
    let mut portal = door.open(1, Vec::new()).unwrap();
    for n in 0..mib * 16 {
        let (op, flags, len) = (Op::WriteZeroes, Flags::NONE, 65536);
        let r = PortalRequest { id: 0, op, flags, offset: offset + n * len, len, seg: None };
        assert_eq!(portal.call(r), Status::Ok);
        std::thread::sleep(std::time::Duration::from_micros(100));
    }
}

#[test]
fn a_first_backing_file_shows_nowhere() {
    let _alone = ALONE.lock();
    for version in [2, 3] {
        let dir = tempfile::tempdir().unwrap();
        let [one, thin, _, _] = files(dir.path(), ["one", "thin", "", ""]);
        let mut options = CreateOptions::new(SIZE);
        options.version = version;
        let file = std::fs::File::options().create_new(true).read(true).write(true).open(&one);
        let mut storage = node::HostStorage::of(file.unwrap(), false).unwrap();
        create(&mut storage, "one", &options).unwrap();
        over_raw(&thin);
        fill(&one, 1 << 20, 12, 0xaa);
        let mut disk = serve(one.to_str().unwrap(), 2);
        // Stopped: then all is as before.
        let to = Some(("raw", Format::Raw));
        let e = disk.rebase(to, &[], &mut Stops(40)).unwrap_err().to_string();
        assert!(e.contains("stopped"), "{e}");
        let e = disk.rebase(to, &[dir.path().join("none")], &mut Freely).unwrap_err().to_string();
        assert!(e.contains("none"), "{e}");
        let door = disk.door();
        std::thread::scope(|scope| {
            scope.spawn(|| zero_slowly(&door, 1 << 20, 11));
            disk.rebase(to, &[dir.path().to_owned()], &mut Freely).unwrap();
        });
        disk.close().unwrap();
        let mut held = vec![0; (SIZE / PIECE) as usize];
        held[12 * 256..13 * 256].fill(0xaa);
        compare(&one, &held);
        qemu_agrees(&[&one], &held);
    }
}

#[test]
fn a_name_that_does_not_fit_changes_nothing() {
    let _alone = ALONE.lock();
    let dir = tempfile::tempdir().unwrap();
    let [small, thin, a, _] = files(dir.path(), ["small", "thin", "a", ""]);
    over_raw(&thin);
    let mut options = CreateOptions::new(SIZE);
    options.cluster_size = 512;
    options.backing = Some(("raw".to_owned(), Format::Raw));
    let file = std::fs::File::options().create_new(true).read(true).write(true).open(&small);
    let mut storage = node::HostStorage::of(file.unwrap(), false).unwrap();
    create(&mut storage, "small", &options).unwrap();
    fill(&small, 1 << 20, 1, 0xaa);
    let mut disk = serve(small.to_str().unwrap(), 2);
    // The header's cluster has no room for it.
    let long = format!("{}thin", "./".repeat(240));
    let e = disk.rebase(Some((&long, Format::Qcow2)), &[], &mut Freely).unwrap_err().to_string();
    assert!(e.contains("backing file"), "{e}");
    assert_eq!(disk.chain().count(), 2);
    disk.snapshot(&a).unwrap();
    disk.close().unwrap();
    let mut held = vec![0; (SIZE / PIECE) as usize];
    held[..SIZE as usize / 8192].fill(0xbb);
    held[256..512].fill(0xaa);
    // The raw file's odd last sector.
    fill(&a, SIZE / 2, 1, 0);
    compare(&a, &held);
    qemu_agrees(&[&a, &small], &held);
}

#[test]
fn other_backing_files() {
    let _alone = ALONE.lock();
    let dir = tempfile::tempdir().unwrap();
    let [base, a, nearly, thin] = files(dir.path(), ["base", "a", "nearly", "thin"]);
    make(&base, SIZE);
    over_raw(&thin);
    let mut disk = serve(base.to_str().unwrap(), 2);
    let held = Load::during(&mut disk, |disk, load| {
        load.go_on(150);
        disk.snapshot(&a).unwrap();
        std::fs::copy(&base, &nearly).unwrap();
        fill(&nearly, 3 << 20, 2, 0xcc);
        load.go_on(20);
        let refused = |disk: &mut Disk, name: &str, format, why: &str| {
            let e = disk.rebase(Some((name, format)), &[], &mut Freely).unwrap_err().to_string();
            assert!(e.contains(why), "{name}: {e}");
            assert_eq!(disk.chain().count(), 2);
        };
        refused(disk, "no/such", Format::Raw, "No such file");
        refused(disk, "raw", Format::Qcow2, "QFI");
        refused(disk, "a", Format::Qcow2, "in use");
        let to = Some(("nearly", Format::Qcow2));
        let e = disk.rebase(to, &[], &mut Stops(40)).unwrap_err().to_string();
        assert!(e.contains("stopped") && disk.chain().count() == 2, "{e}");
        load.go_on(5);
        let size = std::fs::metadata(&a).unwrap().len();
        disk.rebase(to, &[], &mut Freely).unwrap();
        assert!(disk.chain().eq([a.to_str().unwrap(), nearly.to_str().unwrap()]));
        // What both have is not taken up.
        assert!(std::fs::metadata(&a).unwrap().len() < size + (16 << 20));
        std::fs::remove_file(&base).unwrap();
        load.go_on(20);
        disk.rebase(Some(("thin", Format::Qcow2)), &[], &mut Freely).unwrap();
        assert_eq!(disk.chain().count(), 3);
        load.go_on(20);
        disk.snapshot(&dir.path().join("b")).unwrap();
        disk.stream(Some(2), &mut Freely).unwrap();
        load.go_on(20);
    });
    disk.close().unwrap();
    let b = dir.path().join("b");
    std::fs::remove_file(&a).unwrap();
    compare(&b, &held);
    qemu_agrees(&[&b, &thin], &held);
    let mut disk = serve(b.to_str().unwrap(), 1);
    disk.rebase(None, &[], &mut Freely).unwrap();
    disk.rebase(Some(("nearly", Format::Qcow2)), &[], &mut Freely).unwrap();
    disk.rebase(None, &[], &mut Freely).unwrap();
    disk.close().unwrap();
    for gone in [&nearly, &thin] {
        std::fs::remove_file(gone).unwrap();
    }
    compare(&b, &held);
    qemu_agrees(&[&b], &held);
}
