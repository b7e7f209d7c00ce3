//! Targets whose input is a file: an image, or a part of one.

use qcow::check::{Repair, Report};
use qcow::edit::{
    BitmapAction, SnapshotKey, apply_snapshot, change_bitmap, create_snapshot, delete_snapshot,
};
use qcow::format::{Compression, Header};
use qcow::open::{ChainOptions, Opened, Role};
use qcow::{Bitmap, Chain, ChainReader, Compressor, Decompressor, ImageMeta, MetadataSet, Mode};

use crate::memory::Memory;

/// Runs of a disk that are looked at: a small file can claim a large disk.
const SPANS: usize = 4096;
/// Bytes of an external data file.
const DATA_FILE: usize = 64 << 10;
/// Bytes of a disk that are read.
const READ: u64 = 1 << 20;

/// Parses a header by itself and as the start of a file, and writes it again.
pub fn header(data: &[u8]) {
    if let Ok(header) = Header::parse(data) {
        let _ = (header.geometry(), header.feature_names(), header.bitmaps());
        let _ = (header.backing_format(), header.unknown_incompatible());
        if let Ok(bytes) = header.encode() {
            // What we write we can read, and it says the same.
            let again = Header::parse(&bytes).expect("our own header is one");
            assert_eq!(again.encode().expect("as before"), bytes);
        }
    }
    for mode in [Mode::Read, Mode::Check, Mode::Write] {
        let _ = ImageMeta::open(&mut Memory(data.to_vec()), "fuzz", mode);
    }
}

fn open(data: &[u8], mode: Mode) -> Option<Chain<Memory>> {
    let top =
        Opened { storage: Memory(data.to_vec()), path: None, name: "fuzz".to_owned(), id: None };
    // A data file is there, a backing file is not.
    let top_only = !Header::parse(data).is_ok_and(|h| h.has_data_file());
    let options =
        ChainOptions { writable: mode == Mode::Write, top_only, ..ChainOptions::default() };
    let mut data_file = |named: &qcow::open::BackingRef| match named.role {
        Role::Data => Ok(Opened {
            storage: Memory(vec![0xda; DATA_FILE]),
            path: None,
            name: "data".to_owned(),
            id: None,
        }),
        Role::Backing => Err(qcow::Error::refused("fuzz", "no backing file")),
    };
    Chain::open(top, options, &mut data_file).ok()
}

/// Lists and reads a disk.
fn read(reader: &mut ChainReader<Memory>) {
    let size = reader.size();
    let mut at = 0;
    for _ in 0..SPANS {
        match reader.span(at, u64::MAX) {
            Ok(Some(span)) => {
                assert!(span.start == at && span.len > 0 && span.len <= size - at);
                at += span.len;
            }
            Ok(None) => {
                assert_eq!(at, size);
                break;
            }
            // A bad entry: what lies behind it may be good.
            Err(_) => at = (at + 512).min(size),
        }
    }
    let mut piece = vec![0; 64 << 10];
    for at in (0..size.min(READ)).step_by(piece.len()) {
        let _ = reader.read_at(at, &mut piece);
    }
}

/// Opens an image, finds its metadata, lists and reads its disk.
pub fn tables(data: &[u8]) {
    if let Some(chain) = open(data, Mode::Write) {
        let image = chain.layers[0].image().expect("QCOW2 was asked for");
        let _ = MetadataSet::new(image);
    }
    if let Some(chain) = open(data, Mode::Read) {
        read(&mut ChainReader::new(chain));
    }
}

fn check(storage: &mut Memory, repair: Repair) -> Option<Report> {
    qcow::check::run(storage, "fuzz", repair, &mut |_| {}).ok()
}

/// Whether a report has nothing to complain about, but leaks.
fn sound(report: &Report) -> bool {
    report.corruptions == 0 && report.check_errors == 0
}

/// Checks and repairs. A repair says what the next check says, a full one that leaves no corruption
/// leaves no leaks, and a disk that was sound reads as before.
pub fn refcounts(data: &[u8]) {
    let Some(before) = check(&mut Memory(data.to_vec()), Repair::None) else { return };
    for repair in [Repair::Leaks, Repair::All] {
        let mut storage = Memory(data.to_vec());
        let Some(said) = check(&mut storage, repair) else { continue };
        let found = check(&mut storage, Repair::None).expect("a repaired image can be checked");
        assert_eq!((said.corruptions, said.leaks), (found.corruptions, found.leaks));
        // Tables that lie over each other change with each other: those stay corrupt.
        if sound(&found) && repair == Repair::All {
            assert_eq!(found.leaks, 0, "a full repair leaves leaks");
        }
        if sound(&before) {
            assert!(sound(&found), "a repair made a sound image worse: {found:?}");
            same_disk(data, &storage.0);
        }
    }
}

/// Both images show the same, as far as they can be read.
fn same_disk(a: &[u8], b: &[u8]) {
    let (Some(a), Some(b)) = (open(a, Mode::Read), open(b, Mode::Read)) else { return };
    let (mut a, mut b) = (ChainReader::new(a), ChainReader::new(b));
    assert_eq!(a.size(), b.size());
    let (mut x, mut y) = (vec![0; 4096], vec![0; 4096]);
    for at in (0..a.size().min(READ)).step_by(4096) {
        if a.read_at(at, &mut x).is_ok() {
            b.read_at(at, &mut y).expect("what could be read still can");
            assert!(x == y, "the disk changed at {at:#x}");
        }
    }
}

/// Lists persistent bitmaps, reads their bits, adds, clears, merges and removes them. Runs follow each
/// other without gaps, and a sound image stays one.
pub fn bitmaps(data: &[u8]) {
    let Some(mut chain) = open(data, Mode::Read) else { return };
    let Ok(info) = qcow::info::Info::of(&mut chain.layers[0], None) else { return };
    let Some(info) = info.format_specific.map(|f| f.data) else { return };
    let clean = check(&mut Memory(data.to_vec()), Repair::None).as_ref().is_some_and(sound);
    let try_it = |name: &str, action: BitmapAction| {
        let mut storage = Memory(data.to_vec());
        let text = format!("{action:?}");
        let done = change_bitmap::<Memory>(&mut storage, "fuzz", name, &[action], None);
        if clean {
            let after = check(&mut storage, Repair::None);
            let stays = after.is_some_and(|r| sound(&r));
            assert!(stays, "{text} of {name:?} ({done:?}) made a sound image unsound");
        }
    };
    for bitmap in info.bitmaps.iter().take(3) {
        let mut storage = Memory(data.to_vec());
        if let Ok(meta) = ImageMeta::open(&mut storage, "fuzz", Mode::Read)
            && let Ok(mut bits) = Bitmap::open(&mut storage, &meta, &bitmap.name)
        {
            let mut at = 0;
            for _ in 0..SPANS {
                let Ok(Some(run)) = bits.run(&mut storage, at, u64::MAX) else { break };
                assert!(run.offset == at && run.len > 0 && run.len <= bits.disk_size() - at);
                at += run.len;
            }
        }
        try_it(&bitmap.name, BitmapAction::Clear);
        try_it(&bitmap.name, BitmapAction::Remove);
        try_it(&bitmap.name, BitmapAction::Merge(info.bitmaps[0].name.clone()));
    }
    try_it("new", BitmapAction::Add { granularity: None });
}

/// Shows, takes, applies and deletes snapshots. A sound image stays one.
pub fn snapshots(data: &[u8]) {
    let Some(mut chain) = open(data, Mode::Read) else { return };
    let Ok(info) = qcow::info::Info::of(&mut chain.layers[0], None) else { return };
    let before = check(&mut Memory(data.to_vec()), Repair::None);
    let clean = before.as_ref().is_some_and(sound);
    let try_it = |what: &dyn Fn(&mut Memory) -> qcow::Result<()>, text: &str| {
        let mut storage = Memory(data.to_vec());
        let done = what(&mut storage);
        if clean {
            let after = check(&mut storage, Repair::None);
            assert!(
                after.is_some_and(|r| sound(&r)),
                "{text} ({done:?}) made a sound image unsound"
            );
        }
    };
    for snapshot in info.snapshots.iter().take(3) {
        let key = SnapshotKey::Id(&snapshot.id);
        if let Some(mut chain) = open(data, Mode::Read)
            && chain.show_snapshot(key).is_ok()
        {
            read(&mut ChainReader::new(chain));
        }
        try_it(&|s| apply_snapshot(s, "fuzz", key), "applying a snapshot");
        try_it(&|s| delete_snapshot(s, "fuzz", key), "deleting a snapshot");
    }
    try_it(
        &|s| create_snapshot(s, "fuzz", "new", std::time::Duration::from_secs(1)).map(drop),
        "taking a snapshot",
    );
}

/// Unpacks what claims to be a compressed cluster; packs and unpacks what is plain.
pub fn compressed(data: &[u8]) {
    let [how, data @ ..] = data else { return };
    let kind = if how & 1 == 0 { Compression::Deflate } else { Compression::Zstd };
    let size = 512usize << ((how >> 1) % 9);
    let mut plain = vec![0; size];
    let mut decompressor = Decompressor::new();
    let _ = decompressor.decode(kind, data, &mut plain);
    let mut whole = data.to_vec();
    whole.resize(size, how >> 4);
    let mut packed = Vec::new();
    if Compressor::new(kind).encode(&whole, &mut packed) {
        assert!(packed.len() < size);
        // Behind the packed bytes others' may follow.
        packed.extend_from_slice(&data[..data.len().min(600)]);
        decompressor.decode(kind, &packed, &mut plain).expect("what was packed is unpacked");
        assert!(plain == whole);
    }
}

/// Checks a VHD file, opens it with parents, and reads it. The input holds two files: the first two
/// bytes say where the second begins.
pub fn vhd(data: &[u8]) {
    let [high, low, rest @ ..] = data else { return };
    let first = (usize::from(*high) << 8 | usize::from(*low)) * 512;
    let (top, parent) = rest.split_at(first.min(rest.len()));
    let _ = ::vhd::check::run(&mut Memory(top.to_vec()), "top", &mut |_| {});
    let opened = |bytes: &[u8], name: &str, id| ::vhd::Opened {
        storage: Memory(bytes.to_vec()),
        path: None,
        name: name.to_owned(),
        id,
    };
    let mut depth = 0;
    let mut open_parent = |p: &::vhd::ParentRef| {
        assert!(!p.names.is_empty());
        depth += 1;
        // A few times the same file under other identities, then a cycle.
        Ok(opened(parent, "parent", Some((0, depth.min(3)))))
    };
    let options = ::vhd::ChainOptions::default();
    let top = opened(top, "top", Some((1, 0)));
    let Ok(chain) = ::vhd::Chain::open(top, options, &mut open_parent) else { return };
    let mut reader = ::vhd::Reader::new(chain);
    let size = reader.size();
    let mut at = 0;
    for _ in 0..SPANS {
        match reader.span(at, u64::MAX) {
            Ok(Some(span)) => {
                assert!(span.start == at && span.len > 0 && span.len <= size - at);
                at += span.len;
            }
            Ok(None) => break,
            Err(_) => at = (at + 4096).min(size),
        }
    }
    let mut piece = vec![0; 64 << 10];
    for at in (0..size.min(READ)).step_by(piece.len()) {
        let _ = reader.read_at(at, &mut piece);
    }
}
