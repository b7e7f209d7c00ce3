//! Chains of VHD files: what is read from them, and what is refused. The files are made by a writer
//! of the test's own.

mod hostile;
mod served;
mod writer;

use std::collections::HashMap;
use std::rc::Rc;

use block::{Storage, StorageError};
use vhd::build::{BuildOptions, Builder, Subformat};
use vhd::{Chain, ChainOptions, Error, Image, Opened, ParentRef, Reader, Source};
use writer::{File, expected};

const MIB: u64 = 1 << 20;

/// A file in memory.
#[derive(Clone, Default)]
struct Bytes(Rc<Vec<u8>>);

impl Bytes {
    fn of(bytes: Vec<u8>) -> Bytes {
        Bytes(Rc::new(bytes))
    }
}

impl Storage for Bytes {
    fn len(&self) -> u64 {
        self.0.len() as u64
    }

    fn capacity(&self) -> u64 {
        u64::MAX >> 1
    }

    fn read_only(&self) -> bool {
        false
    }

    fn read_at(&mut self, offset: u64, into: &mut [u8]) -> Result<(), StorageError> {
        let from = self.0.get(offset as usize..).unwrap_or(&[]);
        let n = from.len().min(into.len());
        into[..n].copy_from_slice(&from[..n]);
        into[n..].fill(0);
        Ok(())
    }

    fn write_at(&mut self, offset: u64, from: &[u8]) -> Result<(), StorageError> {
        let bytes = Rc::make_mut(&mut self.0);
        let end = offset as usize + from.len();
        bytes.resize(bytes.len().max(end), 0);
        bytes[offset as usize..end].copy_from_slice(from);
        Ok(())
    }

    fn write_zeroes_at(&mut self, offset: u64, len: u64) -> Result<(), StorageError> {
        self.write_at(offset, &vec![0; len as usize])
    }

    fn flush(&mut self) -> Result<(), StorageError> {
        Ok(())
    }

    fn set_len(&mut self, len: u64) -> Result<(), StorageError> {
        Rc::make_mut(&mut self.0).resize(len as usize, 0);
        Ok(())
    }
}

/// Files by name, "top" the one to open.
fn open(files: &[(&str, Vec<u8>)]) -> Result<Chain<Bytes>, Error> {
    let all: HashMap<String, (u64, Bytes)> = files
        .iter()
        .enumerate()
        .map(|(i, (name, bytes))| ((*name).to_owned(), (i as u64, Bytes::of(bytes.clone()))))
        .collect();
    let opened = |name: &str| {
        let (id, storage) = all.get(name).cloned()?;
        Some(Opened { storage, path: None, name: name.to_owned(), id: Some((0, id)) })
    };
    let mut parent = |p: &ParentRef| {
        let found = p.names.iter().find_map(|n| opened(n.trim_start_matches("./")));
        found.ok_or_else(|| Error::refused(&p.named_by, "no parent"))
    };
    Chain::open(opened("top").unwrap(), ChainOptions::default(), &mut parent)
}

fn read_all(chain: Chain<Bytes>) -> Vec<u8> {
    let mut reader = Reader::new(chain);
    let mut disk = vec![0xee; reader.size() as usize];
    // Pieces of odd lengths.
    for (i, part) in disk.chunks_mut(700_001).enumerate() {
        reader.read_at(i as u64 * 700_001, part).unwrap();
    }
    disk
}

#[test]
fn a_dynamic_disk() {
    let file = File::dynamic(5 * MIB + 512).with([
        (0, 1),
        (7, 2),
        (8, 3),
        (4095, 4),
        (4096, 5),
        (10240, 6),
    ]);
    let disk = read_all(open(&[("top", file.bytes())]).unwrap());
    assert_eq!(disk, expected(&[&file], &[]));
}

#[test]
fn the_first_bits_of_tapdisks_first_version() {
    let mut file = File::dynamic(3 * MIB).with([(0, 1), (9, 2), (4098, 3)]);
    (file.version, file.batmap) = (1, false);
    let disk = read_all(open(&[("top", file.bytes())]).unwrap());
    assert_eq!(disk, expected(&[&file], &[]));
}

#[test]
fn a_chain_reads_each_sector_from_the_highest_layer_that_has_it() {
    let ids = [*b"identity-number0", *b"identity-number1", *b"identity-number2"];
    let base = File { uuid: ids[0], ..File::dynamic(4 * MIB) }
        .with((0..4096).map(|s| (s, 1)))
        .with([(8000, 2)]);
    // Smaller blocks, and a larger disk.
    let mid = File { block: 512 << 10, ..File::child(6 * MIB, &ids[1], &ids[0], "base") }.with([
        (3, 3),
        (1024, 4),
        (9000, 5),
        (12000, 6),
    ]);
    let top = File::child(8 * MIB, &ids[2], &ids[1], "mid").with([(3, 7), (5, 8), (16383, 9)]);
    let files = [("top", top.bytes()), ("mid", mid.bytes()), ("base", base.bytes())];
    let chain = open(&files).unwrap();
    assert_eq!(chain.layers.len(), 3);
    assert_eq!(read_all(chain), expected(&[&top, &mid, &base], &[]));
    let mut reader = Reader::new(open(&files).unwrap());
    let at = |r: &mut Reader<Bytes>, sector: u64| r.span(sector * 512, 512).unwrap().unwrap();
    assert_eq!(at(&mut reader, 3).depth, 0);
    assert_eq!(at(&mut reader, 1024).depth, 1);
    assert_eq!(at(&mut reader, 4).depth, 2);
    let hole = reader.span(13 * 512 * 1000, u64::MAX).unwrap().unwrap();
    assert_eq!((hole.source, hole.depth), (Source::Unallocated, 0));
}

#[test]
fn what_a_short_layer_hides_stays_hidden() {
    let ids = [*b"identity-number0", *b"identity-number1", *b"identity-number2"];
    let base = File { uuid: ids[0], ..File::dynamic(4 * MIB) }.with([(6000, 1), (10, 2)]);
    let mid = File::child(2 * MIB, &ids[1], &ids[0], "base");
    let top = File::child(4 * MIB, &ids[2], &ids[1], "mid");
    let chain =
        open(&[("top", top.bytes()), ("mid", mid.bytes()), ("base", base.bytes())]).unwrap();
    let disk = read_all(chain);
    assert_eq!(disk[10 * 512], 2);
    assert!(disk[6000 * 512..][..512].iter().all(|&b| b == 0), "sector 6000 is behind mid's end");
}

#[test]
fn a_raw_parent_has_no_identity() {
    let mut raw = vec![0xab; (3 * MIB + 100) as usize];
    raw[77] = 1;
    let top = File::child(4 * MIB, b"identity-number1", &[0; 16], "disk.raw").with([(5, 9)]);
    let chain = open(&[("top", top.bytes()), ("disk.raw", raw.clone())]).unwrap();
    assert_eq!(read_all(chain), expected(&[&top], &raw));
}

#[test]
fn the_size_is_the_geometrys_for_those_who_go_by_it() {
    let of = |creator: &[u8; 4], geometry| {
        let file = File { creator: *creator, geometry, batmap: false, ..File::dynamic(10 * MIB) };
        open(&[("top", file.bytes())]).unwrap().size()
    };
    // 300 cylinders, 4 heads, 17 sectors.
    let small = [1, 44, 4, 17];
    assert_eq!(of(b"vpc ", small), 300 * 4 * 17 * 512);
    assert_eq!(of(b"qemu", small), 300 * 4 * 17 * 512);
    assert_eq!(of(b"vpc ", [0xff, 0xff, 16, 255]), 10 * MIB);
    for creator in [b"tap\0", b"win ", b"qem2", b"vbox", b"poll"] {
        assert_eq!(of(creator, small), 10 * MIB);
    }
}

#[test]
fn a_parent_is_as_large_as_its_footer_says() {
    let ids = [*b"identity-number0", *b"identity-number1"];
    // 300 cylinders, 4 heads, 17 sectors: 20400 of 20480 sectors.
    for creator in [*b"vpc ", *b"qemu"] {
        let base = File {
            uuid: ids[0],
            creator,
            geometry: [1, 44, 4, 17],
            batmap: false,
            ..File::dynamic(10 * MIB)
        }
        .with([(5, 1), (20399, 2), (20400, 3), (20479, 4)]);
        let top = File::child(10 * MIB, &ids[1], &ids[0], "base").with([(6, 5)]);
        let files = [("top", top.bytes()), ("base", base.bytes())];
        assert_eq!(read_all(open(&files).unwrap()), expected(&[&top, &base], &[]));
        // By itself it has the size that its creator gave it.
        assert_eq!(open(&[("top", base.bytes())]).unwrap().size(), 20400 * 512);
    }
}

#[test]
fn what_is_built_is_read() {
    for (subformat, exact) in
        [(Subformat::Dynamic, true), (Subformat::Dynamic, false), (Subformat::Fixed, true)]
    {
        let size = 7 * MIB + 1024;
        let options =
            BuildOptions { size, subformat, exact, uuid: *b"0123456789abcdef", timestamp: 5 };
        let mut disk = vec![0; options.disk_size().unwrap() as usize];
        assert!(disk.len() as u64 >= size);
        let mut storage = Bytes::of(vec![9; 100]);
        let mut builder = Builder::new(&mut storage, "new", &options).unwrap();
        for (at, len, fill) in [(0u64, 512, 1), (2 * MIB - 512, 1024, 2), (6 * MIB, MIB + 1024, 3)]
        {
            let bytes = vec![fill; len as usize];
            builder.data(at, &bytes).unwrap();
            disk[at as usize..][..len as usize].copy_from_slice(&bytes);
        }
        let end = builder.finish().unwrap();
        assert_eq!(end, storage.len());
        let mut wrong = Vec::new();
        let report =
            vhd::check::run(&mut storage, "new", &mut |w| wrong.push(w.to_owned())).unwrap();
        assert!(wrong.is_empty(), "{wrong:?}");
        let blocks = if subformat == Subformat::Fixed { 0 } else { 3 };
        assert_eq!((report.corruptions, report.allocated_blocks), (0, blocks));
        let bytes = storage.0.to_vec();
        assert_eq!(read_all(open(&[("top", bytes)]).unwrap()), disk);
    }
    let empty = BuildOptions {
        size: 0,
        subformat: Subformat::Dynamic,
        exact: true,
        uuid: [1; 16],
        timestamp: 0,
    };
    let mut storage = Bytes::default();
    assert_eq!(
        Builder::new(&mut storage, "new", &empty).unwrap().finish().unwrap(),
        empty.image_len().unwrap()
    );
    assert_eq!(Image::read(&mut storage, "new").unwrap().size(), 0);
}
