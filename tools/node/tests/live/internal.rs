//! Internal snapshots while clients write from several reactors.

use std::time::Duration;

use super::*;

/// What a snapshot of an image file shows, by qemu-img; nothing where that is not installed.
fn snapshot_of(image: &Path, snapshot: &str) -> Option<Vec<u8>> {
    let raw = image.with_extension("raw");
    let out = Command::new("qemu-img")
        .args(["convert", "-U", "-f", "qcow2", "-O", "raw", "-l"])
        .arg(format!("snapshot.name={snapshot}"))
        .args([image, &raw])
        .output()
        .ok()?;
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    Some(std::fs::read(raw).unwrap())
}

/// Writes something else to every third piece. Returns what each holds then.
fn write_some(disk: &Disk, held: &[u8]) -> Vec<u8> {
    let pool = Pool::new(1, PIECE as u32).unwrap();
    let seg = pool.region().seg(0, PIECE as u32).unwrap();
    let mut portal = disk.door().open(1, vec![pool.region().clone()]).unwrap();
    let mut after = held.to_vec();
    for n in (0..SIZE / PIECE).step_by(3) {
        let byte = !held[n as usize];
        pool.region().write_seg(&seg, &[byte; PIECE as usize]);
        let (op, flags, seg) = (Op::Write, Flags::NONE, Some(seg));
        let r = PortalRequest { id: n, op, flags, offset: n * PIECE, len: PIECE, seg };
        assert_eq!(portal.call(r), Status::Ok);
        after[n as usize] = byte;
    }
    after
}

#[test]
fn internal_snapshots_under_clients() {
    let _alone = ALONE.lock();
    let dir = tempfile::tempdir().unwrap();
    // A namespace with room for what each snapshot keeps.
    for (node, room) in [("", ""), ("model:", "?size=1G")] {
        let base = dir.path().join(format!("x{}", node.len()));
        make(&base, SIZE);
        let mut disk = serve(&format!("{node}{}{room}", base.display()), 2);
        let held = Load::during(&mut disk, |disk, load| {
            for name in ["one", "two", "three"] {
                load.go_on(60);
                disk.take_internal_snapshot(name, Duration::from_secs(1)).unwrap();
            }
            load.go_on(60);
            disk.delete_internal_snapshot("two").unwrap();
            load.go_on(60);
            let e = disk.delete_internal_snapshot("two").unwrap_err().to_string();
            assert!(e.contains("has no snapshot \"two\""), "{e}");
            let e = disk.take_internal_snapshot("", Duration::ZERO).unwrap_err().to_string();
            assert!(e.contains("1 to 255 bytes"), "{e}");
            load.go_on(20);
        });
        // Nobody writes now: what is taken is what is there.
        let id = disk.take_internal_snapshot("last", Duration::from_secs(7)).unwrap();
        assert_eq!(id, "4");
        let list = disk.internal_snapshots().unwrap();
        let names: Vec<_> = list.iter().map(|s| (s.id.as_str(), s.name.as_str())).collect();
        assert_eq!(names, [("1", "one"), ("3", "three"), ("4", "last")]);
        let after = write_some(&disk, &held);
        disk.close().unwrap();
        compare(&base, &after);
        qemu_agrees(&[&base], &after);
        let Some(last) = snapshot_of(&base, "last") else { continue };
        for (n, (piece, want)) in last.chunks(PIECE as usize).zip(&held).enumerate() {
            assert!(piece.iter().all(|b| b == want), "piece {n}: {:#x}, not {want:#x}", piece[0]);
        }
        // Pieces that one request wrote are whole.
        let one = snapshot_of(&base, "one").unwrap();
        assert!(one.chunks(PIECE as usize).all(|p| p.iter().all(|b| *b == p[0])), "a torn piece");
        assert!(one != last);
    }
}

#[test]
fn a_stream_below_internal_snapshots_is_refused() {
    let _alone = ALONE.lock();
    let dir = tempfile::tempdir().unwrap();
    let [base, a, ..] = files(dir.path(), ["base", "a", "b", "c"]);
    make(&base, SIZE);
    let mut disk = serve(base.to_str().unwrap(), 2);
    disk.take_internal_snapshot("below", Duration::ZERO).unwrap();
    disk.snapshot(&a).unwrap();
    // That of the base is nobody's concern.
    assert!(disk.internal_snapshots().unwrap().is_empty());
    disk.take_internal_snapshot("here", Duration::ZERO).unwrap();
    let e = disk.stream(None, &mut Freely).unwrap_err().to_string();
    assert!(e.contains("has 1 internal snapshots"), "{e}");
    disk.delete_internal_snapshot("1").unwrap();
    disk.stream(None, &mut Freely).unwrap();
    assert_eq!(disk.chain().count(), 1);
    disk.close().unwrap();
}
