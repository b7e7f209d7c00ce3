//! Images with internal snapshots under guests: whatever these write, each snapshot shows what it was
//! taken of, counts are right to the last one, and qemu-img agrees. Power cuts: `powercut.rs`; several
//! reactors and snapshots under way: `live.rs`.

mod rig;

use block::{Blocking, Op, Status, Storage};
use qcow::Compressor;
use qcow::build::Builder;
use qcow::create::CreateOptions;
use qcow::edit::{SnapshotKey, apply_snapshot, delete_snapshot, find_snapshot};
use qcow::open::{Format, ImageMeta, Mode};
use qcow::run::Options;
use rig::{
    LogQueue, Rig, Rng, built, check, hammer, open_stack, qemu_check, qemu_read,
    qemu_read_snapshot, read_all, read_offline, same, snapshot, try_snapshot,
};

const DISK: u64 = 2 << 20;

#[derive(Clone, Copy, Debug)]
struct Kind {
    cluster: u64,
    bits: u32,
    version: u32,
    extended: bool,
    /// Over a raw layer that is shorter than the disk.
    backing: bool,
}

const PLAIN: Kind = Kind { cluster: 65536, bits: 16, version: 3, extended: false, backing: false };

impl Kind {
    fn below(&self) -> Option<Vec<u8>> {
        let sector = |s: u64| vec![s as u8 | 1; 512];
        self.backing.then(|| (0..DISK / 512 * 3 / 4).flat_map(sector).collect())
    }

    /// An image of data, compressed, zero and unallocated clusters, and what it shows.
    fn make(&self, seed: u64) -> (LogQueue, Vec<u8>) {
        let mut o = CreateOptions::new(DISK);
        (o.cluster_size, o.refcount_bits, o.version) = (self.cluster, self.bits, self.version);
        o.extended_l2 = self.extended;
        let below = self.below();
        if self.backing {
            o.backing = Some(("/layer1".to_owned(), Format::Raw));
        }
        let mut model = below.unwrap_or_default();
        model.resize(DISK as usize, 0);
        let mut rng = Rng(seed);
        let mut compressor = Compressor::new(o.compression);
        let leaf = built(5 * DISK + 16 * self.cluster, seed, &o, |b: &mut Builder<'_>| {
            let mut packed = Vec::new();
            for at in (0..DISK).step_by(self.cluster as usize) {
                let part = &mut model[at as usize..(at + self.cluster) as usize];
                match rng.below(6) {
                    0 if !self.backing || self.version > 2 => {
                        part.fill(0);
                        b.zeroes(at, self.cluster).unwrap();
                    }
                    // Many in one host cluster: more than few bits can count with snapshots.
                    1 | 2 if self.bits >= 16 => {
                        part.fill(rng.next() as u8 | 1);
                        assert!(compressor.encode(part, &mut packed));
                        b.compressed(at, &packed).unwrap();
                    }
                    3 => {}
                    _ => {
                        part.chunks_mut(512).for_each(|s| s.fill(rng.next() as u8));
                        b.data(at, part).unwrap();
                    }
                }
            }
        });
        (leaf, model)
    }

    fn open(&self, leaf: LogQueue, options: Options) -> Rig {
        let Some(below) = self.below() else {
            return Rig::open(vec![leaf], &[Format::Qcow2], options);
        };
        let mut raw = LogQueue::new(below.len() as u64, 1);
        raw.load(&below);
        Rig::open(vec![leaf, raw], &[Format::Qcow2, Format::Raw], options)
    }
}

/// An image between two uses, with what it and its snapshots show.
struct Kept {
    kind: Kind,
    leaf: Option<LogQueue>,
    model: Vec<u8>,
    kept: Vec<(&'static str, Vec<u8>)>,
    rng: Rng,
    /// qemu-img looks at it, too.
    judged: bool,
}

impl Kept {
    fn new(kind: Kind, seed: u64) -> Kept {
        let (leaf, model) = kind.make(seed);
        Kept {
            kind,
            leaf: Some(leaf),
            model,
            kept: Vec::new(),
            rng: Rng(seed * 77 + 1),
            judged: true,
        }
    }

    fn snapshot(&mut self, name: &'static str) {
        self.leaf = Some(snapshot(self.leaf.take().unwrap(), name));
        self.kept.push((name, self.model.clone()));
    }

    fn edit(&mut self, f: impl FnOnce(&mut dyn Storage) -> qcow::Result<()>) {
        let mut storage = Blocking::new(self.leaf.take().unwrap(), 0).unwrap();
        f(&mut storage).unwrap();
        self.leaf = Some(storage.into_leaf());
    }

    fn delete(&mut self, name: &str) {
        self.edit(|st| delete_snapshot(st, "test", SnapshotKey::Name(name)));
        self.kept.retain(|k| k.0 != name);
    }

    fn apply(&mut self, name: &str) {
        self.edit(|st| apply_snapshot(st, "test", SnapshotKey::Name(name)));
        self.model.clone_from(&self.kept.iter().find(|k| k.0 == name).unwrap().1);
    }

    /// Random requests, a clean close, and then all must be as it should.
    fn use_it(&mut self, requests: u32) {
        let cache = if self.rng.one_in(2) { 0 } else { 8 << 20 };
        let options = Options { slots: 20, l2_cache: cache, ..Options::default() };
        let mut rig = self.kind.open(self.leaf.take().unwrap(), options);
        hammer(&mut rig, &mut self.model, &mut self.rng, requests);
        same(&read_all(&mut rig, self.model.len()), &self.model, 0);
        self.leaf = Some(rig.close().remove(0));
        self.verify();
    }

    fn verify(&mut self) {
        let what = self.kind;
        let (leaf, bad, leaks) = check(self.leaf.take().unwrap());
        assert_eq!((bad, leaks), (0, 0), "{what:?}");
        let image = leaf.data();
        self.leaf = Some(leaf);
        let below = self.kind.below();
        same(&read_offline(&image, below.as_deref(), None), &self.model, 0);
        for (name, held) in &self.kept {
            same(&read_offline(&image, below.as_deref(), Some(name)), held, 0);
        }
        // Starting programs takes most of the time.
        if !self.judged {
            return;
        }
        assert!(matches!(qemu_check(&image), None | Some(0)), "{what:?}");
        if !self.kind.backing {
            qemu_read(&image).inspect(|seen| same(seen, &self.model, 0));
            for (name, held) in &self.kept {
                qemu_read_snapshot(&image, name).inspect(|seen| same(seen, held, 0));
            }
        }
    }
}

#[test]
fn guests_write_and_snapshots_stay() {
    let kinds = [
        PLAIN,
        Kind { cluster: 512, ..PLAIN },
        Kind { cluster: 4096, bits: 4, backing: true, ..PLAIN },
        Kind { cluster: 4096, bits: 64, ..PLAIN },
        Kind { cluster: 16384, bits: 2, ..PLAIN },
        Kind { version: 2, ..PLAIN },
        Kind { cluster: 1024, version: 2, backing: true, ..PLAIN },
        Kind { cluster: 16384, extended: true, ..PLAIN },
        Kind { extended: true, backing: true, ..PLAIN },
        Kind { cluster: 2 << 20, bits: 8, ..PLAIN },
    ];
    for (seed, kind) in (1..).zip(kinds) {
        let mut image = Kept::new(kind, seed);
        image.snapshot("a");
        image.use_it(120);
        image.snapshot("b");
        image.use_it(120);
        image.judged = false;
        image.delete("a");
        image.use_it(60);
        image.apply("b");
        image.use_it(60);
        image.judged = true;
        image.delete("b");
        image.use_it(30);
        assert!(image.kept.is_empty());
    }
}

/// What every cluster in turn is asked to do while it is shared: nothing of it may reach the snapshot.
#[test]
fn each_request_to_each_kind_of_cluster() {
    use block::Flags;
    let keep = Flags::NO_UNMAP;
    for extended in [false, true] {
        let kind = Kind { extended, ..PLAIN };
        let cases = [
            (Op::Write, Flags::NONE, 0, DISK),
            (Op::Write, Flags::NONE, 512, 1024),
            (Op::WriteZeroes, Flags::NONE, 0, DISK),
            (Op::WriteZeroes, keep, 0, DISK),
            (Op::WriteZeroes, keep, 2048, 4096),
            (Op::Discard, Flags::NONE, 0, DISK),
        ];
        for (seed, (op, flags, from, len)) in (40..).zip(cases) {
            let mut image = Kept::new(kind, seed);
            image.snapshot("a");
            let mut rig = kind.open(image.leaf.take().unwrap(), Options::default());
            // The same once more: then nothing of it is shared.
            for round in [0x51, 0x52] {
                for at in (0..DISK).step_by(kind.cluster as usize) {
                    let (at, len) = (at + from, len.min(kind.cluster - from));
                    let data = vec![round; if op == Op::Write { len as usize } else { 0 }];
                    let (status, _) = rig.call_flags(op, flags, at, len, &data);
                    assert_eq!(status, Status::Ok);
                    let range = at as usize..(at + len) as usize;
                    image.model[range].fill(if op == Op::Write { round } else { 0 });
                }
            }
            image.leaf = Some(rig.close().remove(0));
            image.verify();
            image.judged = false;
            image.delete("a");
            image.verify();
        }
    }
}

/// A kept place of a zero cluster that a snapshot has, too.
#[test]
fn shared_places_of_zero_clusters() {
    let mut image = Kept::new(PLAIN, 60);
    let all = |image: &mut Kept, op: Op, byte: u8| {
        let mut rig = PLAIN.open(image.leaf.take().unwrap(), Options::default());
        let flags = block::Flags::NO_UNMAP;
        for at in (0..DISK).step_by(65536) {
            let (at, len) = if op == Op::Write { (at + 4096, 512) } else { (at, 65536) };
            let data = vec![byte; if op == Op::Write { len as usize } else { 0 }];
            let flags = if op == Op::Write { block::Flags::NONE } else { flags };
            assert_eq!(rig.call_flags(op, flags, at, len, &data).0, Status::Ok);
            image.model[at as usize..(at + len) as usize].fill(byte);
        }
        image.leaf = Some(rig.close().remove(0));
        image.verify();
    };
    // Everything has a place of its own, and keeps it.
    all(&mut image, Op::Write, 1);
    all(&mut image, Op::WriteZeroes, 0);
    image.snapshot("zero");
    all(&mut image, Op::WriteZeroes, 0);
    all(&mut image, Op::Write, 7);
    image.snapshot("data");
    all(&mut image, Op::WriteZeroes, 0);
    image.delete("zero");
    all(&mut image, Op::Write, 9);
    image.delete("data");
    image.verify();
}

#[test]
fn counts_that_are_full() {
    let o = CreateOptions { refcount_bits: 1, ..CreateOptions::new(DISK) };
    let fresh = built(2 * DISK, 3, &o, |b| b.data(0, &[1; 65536]).unwrap());
    let (leaf, e) = try_snapshot(fresh, "a");
    let e = e.unwrap_err().to_string();
    assert!(e.contains("refcounts have 1 bits and cannot count 2 references"), "{e}");
    assert_eq!(check(leaf).1, 0);
    let o = CreateOptions { refcount_bits: 2, ..CreateOptions::new(DISK) };
    let mut leaf = built(2 * DISK, 3, &o, |b| b.data(0, &[1; 65536]).unwrap());
    for name in ["a", "b"] {
        leaf = snapshot(leaf, name);
    }
    let (leaf, e) = try_snapshot(leaf, "c");
    let e = e.unwrap_err().to_string();
    assert!(e.contains("cannot count 4 references"), "{e}");
    // As many as there can be, and one goes.
    let mut rig = Rig::single(leaf);
    rig.write(100 * 512, &[2; 512]);
    let (leaf, bad, leaks) = check(rig.close().remove(0));
    assert_eq!((bad, leaks), (0, 0));
    let leaf = snapshot(leaf, "c");
    for name in ["a", "b"] {
        same(&read_offline(&leaf.data(), None, Some(name))[..65536], &[1; 65536], 0);
    }
}

fn be(bytes: &[u8], at: u64) -> u64 {
    u64::from_be_bytes(bytes[at as usize..][..8].try_into().unwrap())
}

#[test]
fn tables_of_snapshots_are_not_written_over() {
    let (leaf, _) = PLAIN.make(90);
    let leaf = snapshot(leaf, "a");
    let mut storage = Blocking::new(leaf, 0).unwrap();
    let meta = ImageMeta::open(&mut storage, "test", Mode::Read).unwrap();
    let key = SnapshotKey::Name("a");
    let (_, s) = find_snapshot(&mut storage, "test", &meta.header, key).unwrap();
    let leaf = storage.into_leaf();
    let image = leaf.data();
    let l2 = be(&image, meta.header.l1_table_offset) & 0x00ff_ffff_ffff_fe00;
    for place in [s.l1_table_offset, meta.header.snapshots_offset] {
        let mut leaf = LogQueue::new(image.len() as u64, 1);
        leaf.load(&image);
        leaf.poke(l2 + 8 * 3, &(1 << 63 | place).to_be_bytes());
        let mut rig = Rig::single(leaf);
        let (status, _) = rig.call(Op::Write, 3 * 65536, 512, &[1; 512]);
        assert_eq!(status, Status::Corrupt);
        assert_eq!(rig.call(Op::Read, 3 * 65536, 512, &[]).0, Status::Corrupt);
        rig.write(0, &[1; 512]);
        let after = rig.close().remove(0).data();
        let table = place as usize..place as usize + 65536;
        assert!(after[table.clone()] == image[table], "written over");
    }
    // A snapshot's L1 table in the active one's place: it can be read.
    let mut bad = LogQueue::new(image.len() as u64, 1);
    bad.load(&image);
    bad.poke(meta.header.snapshots_offset, &meta.header.l1_table_offset.to_be_bytes());
    let bytes = bad.data();
    let e = open_stack(vec![bad], &[Format::Qcow2], true).err().unwrap().to_string();
    let want = "tables of its snapshots lie over each other or over other tables; the image can be \
                read, but not be written";
    assert!(e.contains(want), "{e}");
    read_offline(&bytes, None, None);
}
