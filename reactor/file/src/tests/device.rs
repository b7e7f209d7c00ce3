//! Kernel block devices: loop devices, where the tests run as root on a host that has them.

use std::path::{Path, PathBuf};
use std::process::Command;

use block::{Blocking, Claims, Flags, LeafAccess, Op, RmwQueue, Status, Storage, Submit};

use super::{KINDS, Kind, Rig, open};

/// A loop device over a file, for as long as this lives.
struct Loop(PathBuf);

impl Loop {
    fn new(file: &Path, block: u32) -> Option<Loop> {
        let out = Command::new("losetup")
            .args(["--find", "--show", "--sector-size", &block.to_string()])
            .arg(file)
            .output()
            .ok()?;
        let name = String::from_utf8(out.stdout).ok()?;
        out.status.success().then(|| Loop(name.trim().into()))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("-d").arg(&self.0).status();
    }
}

#[test]
fn a_block_device_has_its_size_and_blocks() {
    const SIZE: u64 = 8 << 20;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    for block in [512, 4096] {
        for kind in KINDS {
            std::fs::write(&path, vec![0x5a; SIZE as usize]).unwrap();
            let Some(device) = Loop::new(&path, block) else {
                eprintln!("skipped: no loop devices here");
                return;
            };
            let mut rig = Rig::new(kind);
            rig.q.add(open(&device.0)).unwrap();
            let info = rig.q.info(0).unwrap().clone();
            assert_eq!((info.size, info.block_size), (SIZE, block));
            assert!(rig.q.is_direct(0) && info.write_zeroes && !info.read_only);
            assert_eq!(rig.q.unit_len(0), SIZE);
            assert_eq!(rig.q.set_unit_len(0, 4096), Ok(()), "a device is not cut");
            assert_eq!(rig.q.unit_len(0), SIZE);
            rig.region.write(0, &[0x11; 8192]);
            assert_eq!(rig.one(Op::Write, Flags::FUA, SIZE - 8192, 8192).status, Status::Ok);
            assert_eq!(rig.one(Op::Write, Flags::NONE, SIZE - 4096, 8192).status, Status::Invalid);
            assert_eq!(rig.one(Op::WriteZeroes, Flags::NONE, 0, 65_536).status, Status::Ok);
            let kept = rig.one(Op::WriteZeroes, Flags::NO_UNMAP, 65_536, 65_536);
            assert_eq!(kept.status, Status::Ok);
            assert_eq!(rig.one(Op::Discard, Flags::NONE, 131_072, 65_536).status, Status::Ok);
            assert_eq!(rig.one(Op::Flush, Flags::NONE, 0, 0).status, Status::Ok);
            rig.region.write(0, &[0xff; 135_168]);
            assert_eq!(rig.one(Op::Read, Flags::NONE, 0, 135_168).status, Status::Ok);
            let mut back = vec![0; 135_168];
            rig.region.read(0, &mut back);
            assert!(back[..131_072].iter().all(|&b| b == 0), "{kind:?} {block}");
            assert_eq!(rig.one(Op::Read, Flags::NONE, SIZE - 12_288, 12_288).status, Status::Ok);
            rig.region.read(0, &mut back[..12_288]);
            assert_eq!((back[0], back[4095], back[4096], back[12_287]), (0x5a, 0x5a, 0x11, 0x11));
        }
    }
}

#[test]
fn sectors_can_be_written_on_a_device_of_larger_blocks() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    std::fs::write(&path, vec![0x5a; 1 << 20]).unwrap();
    let Some(device) = Loop::new(&path, 4096) else {
        eprintln!("skipped: no loop devices here");
        return;
    };
    let mut rig = Rig::new(Kind::Uring);
    rig.q.add(open(&device.0)).unwrap();
    let q = RmwQueue::new(rig.q, &Claims::new(1)).unwrap();
    assert_eq!(q.info(0).unwrap().block_size, 512);
    let mut s = Blocking::new(q, 0).unwrap();
    s.write_at(3584, &[0x11; 9216]).unwrap();
    s.write_zeroes_at(512, 1024).unwrap();
    s.flush().unwrap();
    let mut back = vec![0; 16_384];
    s.read_at(0, &mut back).unwrap();
    let runs = [(512, 0x5a), (1536, 0), (3584, 0x5a), (12_800, 0x11), (16_384, 0x5a)];
    let mut from = 0;
    for (to, value) in runs {
        assert!(back[from..to].iter().all(|&b| b == value), "{from} to {to}");
        from = to;
    }
}
