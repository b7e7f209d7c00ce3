//! One property of the queue at a time.

use std::fs::File;
use std::sync::Arc;

use block::{
    BlockQueue, Blocking, Completions, Flags, HasWork, LeafAccess, Op, Request, Status, Storage,
    Submit, Tag,
};
use dma::{PageSize, Region};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::{KINDS, Kind, Rig, dirs, open};
use crate::{Engine, FileQueue};

#[test]
fn an_unaligned_tail_is_read_and_grown_right() {
    for dir in dirs() {
        for kind in KINDS {
            let path = dir.path().join(format!("{kind:?}"));
            std::fs::write(&path, vec![0xaa; 70_001]).unwrap();
            let mut rig = Rig::new(kind);
            rig.q.add(open(&path)).unwrap();
            assert_eq!(rig.q.unit_len(0), 70_001);
            // Across the end, from the end, and far behind it.
            let end = 70_001 / 4096 * 4096;
            for (offset, len) in [(0, 128 << 10), (end, 4096), (end + 4096, 8192), (1 << 40, 4096)]
            {
                rig.region.write(0, &vec![0x55; len as usize]);
                assert_eq!(rig.one(Op::Read, Flags::NONE, offset, len).status, Status::Ok);
                let mut back = vec![0; len as usize];
                rig.region.read(0, &mut back);
                let inside = 70_001u64.saturating_sub(offset).min(len) as usize;
                assert!(back[..inside].iter().all(|&b| b == 0xaa));
                assert!(back[inside..].iter().all(|&b| b == 0), "{kind:?} at {offset:#x}");
            }
            assert_eq!(rig.q.unit_len(0), 70_001, "reading does not change the length");
            // A write behind a gap: the gap reads as zeroes, the old tail stays.
            rig.region.write(0, &[0x77; 4096]);
            assert_eq!(rig.one(Op::Write, Flags::NONE, 81_920, 4096).status, Status::Ok);
            assert_eq!(rig.q.unit_len(0), 86_016);
            assert_eq!(rig.q.set_unit_len(0, 82_000), Ok(()));
            let disk = std::fs::read(&path).unwrap();
            assert!(disk[..70_001].iter().all(|&b| b == 0xaa));
            assert!(disk[70_001..81_920].iter().all(|&b| b == 0));
            assert_eq!(disk[81_920..], [0x77; 80]);
        }
    }
}

#[test]
fn a_growing_file_gets_its_space_ahead() {
    for kind in KINDS {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, vec![1; 64 << 10]).unwrap();
        let mut rig = Rig::new(kind);
        rig.q.add(open(&path)).unwrap();
        rig.q.allocate_ahead(0);
        rig.region.write(0, &[2; 4096]);
        assert_eq!(rig.one(Op::Write, Flags::NONE, 0, 4096).status, Status::Ok);
        assert_eq!(rig.q.unit_len(0), 64 << 10, "a write inside");
        let room = rig.q.room();
        (0..600).for_each(|_| rig.q.allocate_ahead(0));
        assert_eq!(rig.q.room(), room);
        for n in 0..64 {
            let offset = (64 << 10) + n * 4096;
            assert_eq!(rig.one(Op::Write, Flags::NONE, offset, 4096).status, Status::Ok);
        }
        assert_eq!(rig.q.room() + usize::from(rig.q.room() < room), room);
        // Nothing comes after this that makes the file longer.
        let end = (64 << 10) + 64 * 4096;
        assert_eq!(rig.q.set_unit_len(0, end), Ok(()));
        assert_eq!(rig.one(Op::Flush, Flags::NONE, 0, 0).status, Status::Ok);
        let disk = std::fs::read(&path).unwrap();
        assert_eq!(disk.len() as u64, end);
        assert!(disk[..4096].iter().all(|&b| b == 2));
        assert!(disk[4096..64 << 10].iter().all(|&b| b == 1));
        assert!(disk[64 << 10..].iter().all(|&b| b == 2));
    }
}

#[test]
fn a_unit_is_closed_and_the_others_go_on() {
    let dir = tempfile::tempdir().unwrap();
    let mut rig = Rig::new(Kind::Uring);
    for name in ["a", "b"] {
        std::fs::write(dir.path().join(name), vec![1; 64 << 10]).unwrap();
        rig.q.add(open(&dir.path().join(name))).unwrap();
    }
    rig.q.close_unit(1).unwrap();
    assert!(rig.q.close_unit(2).is_err());
    assert_eq!(rig.one(Op::Read, Flags::NONE, 0, 4096).status, Status::Ok);
    assert!(rig.q.info(1).is_some_and(|i| i.size == 0 && i.read_only));
    let name = dir.path().join("b").canonicalize().unwrap();
    let open_files = std::fs::read_dir("/proc/self/fd").unwrap();
    let held = open_files.filter_map(|f| std::fs::read_link(f.unwrap().path()).ok());
    assert!(held.into_iter().all(|f| f != name), "the file is still open");
}

#[test]
fn a_file_gets_longer_in_large_steps() {
    let dir = tempfile::tempdir().unwrap();
    for kind in [Kind::Uring, Kind::Aio] {
        let path = dir.path().join(format!("{kind:?}"));
        std::fs::write(&path, vec![1; 64 << 10]).unwrap();
        let mut rig = Rig::new(kind);
        rig.q.add(open(&path)).unwrap();
        rig.q.allocate_ahead(0);
        assert_eq!(rig.one(Op::Write, Flags::NONE, 64 << 10, 4096).status, Status::Ok);
        for tries in 0.. {
            if rig.q.unit_len(0) >= 32 << 20 {
                break;
            }
            assert!(tries < 10_000, "{kind:?}: no space came");
            std::thread::sleep(std::time::Duration::from_millis(1));
            assert_eq!(rig.one(Op::Write, Flags::NONE, 64 << 10, 4096).status, Status::Ok);
        }
    }
}

#[test]
fn a_batch_is_one_call_and_idling_is_none() {
    let dir = tempfile::tempdir().unwrap();
    for kind in [Kind::Uring, Kind::Aio] {
        let path = dir.path().join("f");
        std::fs::write(&path, vec![1; 1 << 20]).unwrap();
        let mut rig = Rig::new(kind);
        rig.q.add(open(&path)).unwrap();
        for i in 0..64u16 {
            let seg = rig.region.seg(u64::from(i) * 4096, 4096).unwrap();
            rig.submit(i, Op::Read, Flags::NONE, u64::from(i) * 4096, 4096, &[seg]);
        }
        assert_eq!(rig.q.calls(), 0);
        assert_eq!(rig.drain().len(), 64);
        assert_eq!(rig.q.calls(), 1, "{kind:?}");
        let mut out = Completions::new();
        for _ in 0..100 {
            assert_eq!(rig.q.poll(&mut out), 0);
        }
        assert_eq!(rig.q.calls(), 1);
        // A full queue says so, and everything that it took comes back.
        let room = rig.q.room();
        for _ in 0..room {
            rig.submit(0, Op::Flush, Flags::NONE, 512, 0, &[]);
        }
        let r = Request {
            tag: Tag::new(0, 0, 0),
            op: Op::Flush,
            flags: Flags::NONE,
            unit: 0,
            offset: 0,
            len: 0,
            segs: &[],
        };
        assert_eq!((rig.q.room(), rig.q.submit(&r)), (0, Err(block::Full)));
        assert_eq!(rig.drain().len(), room);
    }
}

#[test]
fn wrong_requests_are_answered_not_followed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("f");
    std::fs::write(&path, vec![1; 8192]).unwrap();
    let foreign = Region::new(4096, PageSize::Small).unwrap();
    for kind in KINDS {
        let mut rig = Rig::new(kind);
        rig.q.add(File::open(&path).unwrap()).unwrap();
        let info = rig.q.info(0).unwrap();
        assert!(info.read_only);
        let seg = |len| [rig.region.seg(0, len).unwrap()];
        let (sector, block) = (seg(512), seg(4096));
        let ask = |rig: &mut Rig, op, unit, offset, len, segs: &[_]| {
            let tag = Tag::new(1, 2, 3);
            let r = Request { tag, op, flags: Flags::NONE, unit, offset, len, segs };
            rig.q.submit(&r).unwrap();
            rig.drain()[0].status
        };
        let rig = &mut rig;
        assert_eq!(ask(rig, Op::Read, 0, 0, 4096, &block), Status::Ok);
        assert_eq!(ask(rig, Op::Read, 1, 0, 4096, &block), Status::Invalid);
        // Behind the end, where another queue may write.
        assert_eq!(ask(rig, Op::Read, 0, 8192, 4096, &block), Status::Ok);
        assert_eq!(ask(rig, Op::Read, 0, u64::MAX - 4095, 4096, &block), Status::Invalid);
        assert_eq!(ask(rig, Op::Read, 0, 100, 4096, &block), Status::Invalid);
        assert_eq!(ask(rig, Op::Read, 0, 0, 4096, &sector), Status::Invalid);
        assert_eq!(ask(rig, Op::Read, 0, 0, 0, &[]), Status::Invalid);
        assert_eq!(
            ask(rig, Op::Read, 0, 0, 4096, &[foreign.seg(0, 4096).unwrap()]),
            Status::Invalid
        );
        assert_eq!(ask(rig, Op::Write, 0, 0, 4096, &block), Status::ReadOnly);
        assert_eq!(ask(rig, Op::Discard, 0, 0, 4096, &[]), Status::ReadOnly);
        assert_eq!(ask(rig, Op::Flush, 0, 0, 0, &[]), Status::Ok);
        assert_eq!(rig.q.set_unit_len(0, 0), Err(Status::ReadOnly));
    }
}

#[test]
fn memory_that_direct_io_cannot_take_is_bounced() {
    let dir = tempfile::tempdir().unwrap();
    for kind in KINDS {
        let path = dir.path().join(format!("{kind:?}"));
        let data: Vec<u8> = (0..2 << 20).map(|i| (i % 251) as u8).collect();
        std::fs::write(&path, &data).unwrap();
        let mut rig = Rig::new(kind);
        rig.q.add(open(&path)).unwrap();
        // More of them at a time than there are buffers.
        for i in 0..30u16 {
            let seg = rig.region.seg(u64::from(i) * 65_536 + 4, 61_440).unwrap();
            rig.submit(i, Op::Read, Flags::NONE, u64::from(i) * 65_536, 61_440, &[seg]);
        }
        let done = rig.drain();
        assert_eq!(done.len(), 30);
        assert!(done.iter().all(|c| c.status == Status::Ok));
        for i in 0..30 {
            let mut back = vec![0; 61_440];
            rig.region.read(i * 65_536 + 4, &mut back);
            assert!(back == data[i * 65_536..][..61_440]);
        }
        rig.region.write(2, &[0xee; 4096]);
        let seg = rig.region.seg(2, 4096).unwrap();
        rig.submit(0, Op::Write, Flags::FUA, 4096, 4096, &[seg]);
        assert_eq!(rig.drain()[0].status, Status::Ok);
        assert_eq!(std::fs::read(&path).unwrap()[4096..8192], [0xee; 4096]);
    }
}

#[test]
fn zeroing_and_discarding_change_what_is_allocated() {
    let dir = tempfile::tempdir().unwrap();
    for kind in KINDS {
        use std::os::unix::fs::MetadataExt;
        let path = dir.path().join(format!("{kind:?}"));
        std::fs::write(&path, vec![9; 1 << 20]).unwrap();
        let mut rig = Rig::new(kind);
        rig.q.add(open(&path)).unwrap();
        if !rig.q.info(0).unwrap().write_zeroes {
            return;
        }
        let allocated = || std::fs::metadata(&path).unwrap().blocks() * 512;
        assert_eq!(rig.one(Op::Flush, Flags::NONE, 0, 0).status, Status::Ok);
        let full = allocated();
        let zeroed = rig.one(Op::WriteZeroes, Flags::NO_UNMAP, 0, 256 << 10).status;
        if zeroed == Status::Ok {
            assert!(allocated() >= full);
        } else {
            assert_eq!(zeroed, Status::Unsupported);
        }
        assert_eq!(rig.one(Op::WriteZeroes, Flags::NONE, 256 << 10, 256 << 10).status, Status::Ok);
        assert_eq!(rig.one(Op::Discard, Flags::FUA, 512 << 10, 256 << 10).status, Status::Ok);
        assert!(allocated() <= full - (500 << 10), "{kind:?}: {} of {full}", allocated());
        assert_eq!(rig.one(Op::WriteZeroes, Flags::NONE, 0, 0).status, Status::Ok);
        // Zeroes behind the end lengthen the file, as written ones do.
        let zeroes = rig.one(Op::WriteZeroes, Flags::FUA, 1 << 20, 65_536);
        assert_eq!((zeroes.status, rig.q.unit_len(0)), (Status::Ok, (1 << 20) + 65_536));
        let disk = std::fs::read(&path).unwrap();
        assert!(disk[256 << 10..768 << 10].iter().all(|&b| b == 0));
        assert!(disk[768 << 10..1 << 20].iter().all(|&b| b == 9));
    }
}

#[test]
fn a_sleeper_is_woken_by_a_completion() {
    for dir in dirs() {
        for kind in KINDS {
            let path = dir.path().join(format!("{kind:?}"));
            std::fs::write(&path, vec![1; 1 << 20]).unwrap();
            let mut rig = Rig::new(kind);
            rig.q.add(open(&path)).unwrap();
            let mut out = Completions::new();
            assert_eq!(rig.q.arm(), HasWork::No);
            for i in 0..200u64 {
                let seg = rig.region.seg(0, 65_536).unwrap();
                let (op, len, segs) = match i % 4 {
                    0 => (Op::Flush, 0, &[][..]),
                    1 => (Op::Write, 65_536, &[seg][..]),
                    2 if rig.q.info(0).unwrap().discard => (Op::Discard, 65_536, &[][..]),
                    _ => (Op::Read, 65_536, &[seg][..]),
                };
                rig.submit(0, op, Flags::NONE, 0, len, segs);
                if op != Op::Discard || kind == Kind::Uring {
                    assert!(kind == Kind::OldAio || rig.q.arm() == HasWork::Yes, "unsent");
                }
                out.clear();
                while rig.q.poll(&mut out) == 0 {
                    if rig.q.arm() == HasWork::No {
                        let fd = rig.q.wake_fd().unwrap();
                        let mut fds = [PollFd::new(fd, PollFlags::POLLIN)];
                        match poll(&mut fds, PollTimeout::from(10_000u16)) {
                            Ok(n) => {
                                assert_eq!(n, 1, "slept through a completion: {kind:?} {op:?}")
                            }
                            Err(e) => assert_eq!(e, nix::Error::EINTR),
                        }
                    }
                }
                assert_eq!(out.get(0).status, Status::Ok);
            }
        }
    }
}

#[test]
fn a_drop_waits_for_the_kernel() {
    let dir = tempfile::tempdir().unwrap();
    for kind in KINDS {
        let path = dir.path().join("f");
        std::fs::write(&path, vec![0x42; 1 << 20]).unwrap();
        for _ in 0..20 {
            let mut rig = Rig::new(kind);
            rig.q.add(open(&path)).unwrap();
            for i in 0..16u16 {
                let seg = rig.region.seg(u64::from(i) * 65_536, 65_536).unwrap();
                let op = if i % 4 == 3 { Op::Flush } else { Op::Read };
                let (len, segs) = if op == Op::Read { (65_536, &[seg][..]) } else { (0, &[][..]) };
                rig.submit(i, op, Flags::NONE, 0, len, segs);
            }
            // Sends; on a disk nothing is answered yet.
            let mut out = Completions::new();
            rig.q.poll(&mut out);
            let region = rig.region.clone();
            drop(rig);
            // Whatever was answered or not: the kernel writes here no more.
            region.zero(0, region.len());
            std::thread::sleep(std::time::Duration::from_millis(2));
            let mut now = vec![1; region.len()];
            region.read(0, &mut now);
            assert!(now.iter().all(|&b| b == 0), "{kind:?}");
            assert_eq!((Arc::strong_count(&region), region.tables()), (1, 0));
        }
    }
}

/// Made on a control thread, used on a reactor's.
const _: fn() = || {
    fn sendable<T: Send>() {}
    sendable::<FileQueue>();
};

#[test]
fn files_in_memory_have_an_engine_of_their_own() {
    let memory = || File::from(memfd_create(c"f", MFdFlags::MFD_CLOEXEC).unwrap());
    let device = || File::open("/dev/null").unwrap();
    assert_eq!(Engine::for_files(&[memory(), memory()]), Engine::InMemory);
    // Its node is in memory, and so says its file system.
    assert_eq!(Engine::for_files(&[device()]), Engine::Auto);
    assert_eq!(Engine::for_files(&[memory(), device()]), Engine::Auto);
    assert_eq!(Engine::for_files(&[]), Engine::Auto);
    let mut rig = Rig::new(Kind::InMemory);
    assert_eq!(rig.q.another().unwrap().engine(), Engine::InMemory);
    // What moves data leaves nothing behind that would have to be read before the next sleep.
    rig.q.add(memory()).unwrap();
    for (op, told) in [(Op::Write, 0), (Op::Read, 0), (Op::Flush, 1)] {
        let len = if op == Op::Flush { 0 } else { 8192 };
        assert!(rig.one(op, Flags::NONE, 0, len).status.is_ok());
        let mut fds = [PollFd::new(rig.q.wake_fd().unwrap(), PollFlags::POLLIN)];
        let within = PollTimeout::from(if told == 0 { 0u16 } else { 10_000 });
        assert_eq!(poll(&mut fds, within), Ok(told), "{op:?}");
        assert_eq!(rig.q.arm(), HasWork::No);
    }
}

#[test]
fn more_than_one_call_takes_at_once_is_done() {
    const COUNT: u16 = 300;
    for kind in KINDS {
        let path = tempfile::NamedTempFile::new().unwrap();
        let mut rig = Rig::new(kind);
        rig.q.add(open(path.path())).unwrap();
        for n in 0..COUNT {
            let at = u64::from(n) * 4096;
            rig.region.write(at as usize, &[n as u8; 4096]);
            let seg = rig.region.seg(at, 4096);
            rig.submit(n, Op::Write, Flags::NONE, at, 4096, seg.as_slice());
        }
        rig.q.poll(&mut block::Completions::new());
        if kind != Kind::Uring {
            assert_eq!(rig.q.arm(), HasWork::Yes, "something is queued yet");
        }
        assert!(rig.drain().iter().all(|c| c.status.is_ok()));
        let bytes = std::fs::read(path.path()).unwrap();
        assert_eq!(bytes.len(), usize::from(COUNT) * 4096);
        assert!(bytes.chunks(4096).enumerate().all(|(n, c)| c.iter().all(|&b| b == n as u8)));
    }
}

#[test]
fn works_as_blocking_storage_and_with_any_engine() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("f");
    let mut q = FileQueue::new(Engine::Auto).unwrap();
    assert_ne!(q.engine(), Engine::Auto);
    q.add(open(&path)).unwrap();
    let mut s = Blocking::new(q, 0).unwrap();
    let data: Vec<u8> = (0..3_000_000u32).map(|i| (i % 251) as u8).collect();
    s.write_at(4097, &data).unwrap();
    s.flush().unwrap();
    let mut back = vec![0; data.len() + 1];
    s.read_at(4096, &mut back).unwrap();
    assert!(back[0] == 0 && back[1..] == data[..]);
    s.set_len(5000).unwrap();
    assert_eq!(s.len(), 5000);
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 5000);
    let mut tail = [7; 2000];
    s.read_at(4500, &mut tail).unwrap();
    assert_eq!(tail[..500], data[403..903]);
    assert_eq!(tail[500..], [0; 1500]);
}

/// The size limit is the process's, so this runs as one of its own.
#[test]
fn a_file_size_limit_is_no_space_and_no_death() {
    const CHILD: &str = "POLLDISK_TEST_FILE_LIMIT";
    if std::env::var_os(CHILD).is_none() {
        let name = "tests::behaviour::a_file_size_limit_is_no_space_and_no_death";
        let me = std::env::current_exe().unwrap();
        let child = std::process::Command::new(me).args(["--exact", name]).env(CHILD, "1").output();
        let child = child.unwrap();
        let text = String::from_utf8_lossy(&child.stdout);
        assert!(child.status.success() && text.contains("1 passed"), "{text}");
        return;
    }
    use nix::sys::resource::{Resource, setrlimit};
    let dir = tempfile::tempdir().unwrap();
    // Not within a sector's bounds; above what the queue's own memory files need.
    const LIMIT: u64 = (16 << 20) + 100;
    setrlimit(Resource::RLIMIT_FSIZE, LIMIT, LIMIT).unwrap();
    for kind in KINDS {
        let mut rig = Rig::new(kind);
        rig.q.add(open(&dir.path().join(format!("{kind:?}")))).unwrap();
        assert_eq!(rig.one(Op::Write, Flags::NONE, 0, 65_536).status, Status::Ok);
        for offset in [16 << 20, 17 << 20] {
            let c = rig.one(Op::Write, Flags::NONE, offset, 4096);
            assert_eq!((c.status, i32::from(c.detail)), (Status::NoSpace, libc::EFBIG), "{kind:?}");
        }
        assert_eq!(rig.one(Op::Read, Flags::NONE, 0, 65_536).status, Status::Ok);
    }
}
