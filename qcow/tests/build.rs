//! Images written by the builder: clean by our checker, and they hold what was put in.

use block::{Status, Storage, StorageError};
use qcow::build::Builder;
use qcow::check::{Repair, run};
use qcow::create::{CreateOptions, Preallocation};
use qcow::format::Compression;
use qcow::open::{Chain, ChainOptions, Format, Opened};
use qcow::{ChainReader, Compressor};

/// Memory as a file, or as a device full of old bytes.
struct Memory {
    bytes: Vec<u8>,
    device: bool,
}

impl Memory {
    fn file() -> Memory {
        Memory { bytes: Vec::new(), device: false }
    }

    fn device(len: usize) -> Memory {
        Memory { bytes: vec![0xee; len], device: true }
    }
}

impl Storage for Memory {
    fn len(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn capacity(&self) -> u64 {
        if self.device { self.len() } else { 1 << 30 }
    }

    fn read_only(&self) -> bool {
        false
    }

    fn read_at(&mut self, offset: u64, into: &mut [u8]) -> Result<(), StorageError> {
        into.fill(0);
        let have = self.bytes.get(offset as usize..).unwrap_or_default();
        let n = have.len().min(into.len());
        into[..n].copy_from_slice(&have[..n]);
        Ok(())
    }

    fn write_at(&mut self, offset: u64, from: &[u8]) -> Result<(), StorageError> {
        let end = offset + from.len() as u64;
        if end > self.capacity() {
            let (what, len, status) = ("write", from.len() as u64, Status::NoSpace);
            return Err(StorageError { what, offset, len, status, detail: 0 });
        }
        if end > self.len() {
            self.bytes.resize(end as usize, 0);
        }
        self.bytes[offset as usize..end as usize].copy_from_slice(from);
        Ok(())
    }

    fn write_zeroes_at(&mut self, offset: u64, len: u64) -> Result<(), StorageError> {
        self.write_at(offset, &vec![0; len as usize])
    }

    fn flush(&mut self) -> Result<(), StorageError> {
        Ok(())
    }

    fn set_len(&mut self, len: u64) -> Result<(), StorageError> {
        if !self.device {
            self.bytes.resize(len as usize, 0);
        }
        Ok(())
    }
}

struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) % n
    }
}

/// Builds an image of random pieces; returns what the disk must hold.
fn fill(storage: &mut Memory, options: &CreateOptions, compress: bool, seed: u64) -> Vec<u8> {
    let mut random = Random(seed);
    let mut disk = vec![0; options.size as usize];
    let mut builder = Builder::new(storage, "test", options).unwrap();
    let mut compressor = Compressor::new(options.compression);
    let mut packed = Vec::new();
    let cluster = options.cluster_size as usize;
    let mut at = 0;
    while at < disk.len() {
        let len = (cluster * (1 + random.below(5) as usize)).min(disk.len() - at);
        match random.below(4) {
            0 => builder.zeroes(at as u64, len as u64).unwrap(),
            // A gap: unallocated.
            1 => {}
            _ => {
                let part = &mut disk[at..at + len];
                // Of each cluster some bytes are noise, so that it shrinks by another amount.
                for c in part.chunks_mut(cluster) {
                    let noise = random.below(c.len() as u64 * 5 / 4) as usize;
                    let value = random.below(255) as u8 + 1;
                    c.iter_mut().for_each(|b| *b = value);
                    c.iter_mut().take(noise).for_each(|b| *b = random.below(256) as u8);
                }
                if compress {
                    for (i, c) in part.chunks(cluster).enumerate() {
                        let guest = (at + i * cluster) as u64;
                        let mut whole = c.to_vec();
                        whole.resize(cluster, 0);
                        if compressor.encode(&whole, &mut packed) {
                            builder.compressed(guest, &packed).unwrap();
                        } else {
                            builder.data(guest, c).unwrap();
                        }
                    }
                } else {
                    builder.data(at as u64, part).unwrap();
                }
            }
        }
        at += len;
    }
    builder.finish().unwrap();
    disk
}

/// Checks the image, and what it holds.
fn judge(mut storage: Memory, disk: &[u8], what: &str) -> Memory {
    let mut said = String::new();
    let report = run(&mut storage, "test", Repair::None, &mut |line| {
        said += line;
        said.push('\n');
    });
    let report = report.unwrap();
    let found = (report.corruptions, report.leaks, report.check_errors);
    assert_eq!(found, (0, 0, 0), "{what}: {said}");
    if !storage.device {
        assert_eq!(report.image_end_offset, storage.len(), "{what}");
    }
    let top = Opened { storage, path: None, name: "test".to_owned(), id: None };
    let options = ChainOptions { top_only: true, ..ChainOptions::default() };
    let chain = Chain::open(top, options, &mut |_| unreachable!()).unwrap();
    let mut reader = ChainReader::new(chain);
    assert_eq!(reader.size(), disk.len() as u64);
    let mut back = vec![1; disk.len()];
    reader.read_at(0, &mut back).unwrap();
    assert!(back == disk, "{what}: contents");
    let mut chain = reader.into_chain();
    chain.layers.remove(0).storage
}

#[test]
fn all_cluster_sizes_and_refcount_widths() {
    for (bits, size) in [(9, 600_064), (10, 1 << 20), (12, 3 << 20), (16, 9 << 20), (21, 33 << 20)]
    {
        for refcount_bits in [1, 2, 8, 16, 64] {
            for compression in [None, Some(Compression::Deflate), Some(Compression::Zstd)] {
                if bits == 21 && (refcount_bits != 16 || compression == Some(Compression::Zstd)) {
                    continue;
                }
                let options = CreateOptions {
                    cluster_size: 1 << bits,
                    refcount_bits,
                    compression: compression.unwrap_or_default(),
                    ..CreateOptions::new(size)
                };
                let mut storage = Memory::file();
                let disk = fill(&mut storage, &options, compression.is_some(), size);
                judge(storage, &disk, &format!("{bits} {refcount_bits} {compression:?}"));
            }
        }
    }
}

#[test]
fn compressed_clusters_are_packed() {
    let options = CreateOptions::new(8 << 20);
    let mut storage = Memory::file();
    let mut builder = Builder::new(&mut storage, "test", &options).unwrap();
    let mut compressor = Compressor::new(Compression::Deflate);
    let mut packed = Vec::new();
    for i in 0..128u64 {
        assert!(compressor.encode(&vec![i as u8; 65536], &mut packed));
        builder.compressed(i << 16, &packed).unwrap();
    }
    builder.finish().unwrap();
    // Header, L1 table, one cluster of data, L2 table, refcount block and table.
    assert_eq!(storage.len(), 6 << 16);
}

#[test]
fn preallocation_and_devices() {
    for preallocation in [Preallocation::Off, Preallocation::Metadata, Preallocation::Full] {
        let options = CreateOptions { preallocation, ..CreateOptions::new(4 << 20) };
        let mut disk = vec![0; 4 << 20];
        disk[1 << 20..2 << 20].fill(7);
        for mut storage in [Memory::file(), Memory::device(8 << 20)] {
            let mut builder = Builder::new(&mut storage, "test", &options).unwrap();
            builder.zeroes(0, 1 << 20).unwrap();
            builder.data(1 << 20, &disk[1 << 20..2 << 20]).unwrap();
            builder.zeroes(2 << 20, 2 << 20).unwrap();
            let end = builder.finish().unwrap();
            assert_eq!(end > 4 << 20, preallocation != Preallocation::Off);
            judge(storage, &disk, &format!("{preallocation:?}"));
        }
    }
}

#[test]
fn zeroes_hide_the_backing_file() {
    for version in [2, 3] {
        let options = CreateOptions {
            version,
            backing: Some(("base".to_owned(), Format::Raw)),
            ..CreateOptions::new((1 << 20) + 512)
        };
        let mut storage = Memory::file();
        let mut builder = Builder::new(&mut storage, "test", &options).unwrap();
        builder.zeroes(65536, (1 << 20) + 512 - 65536).unwrap();
        builder.finish().unwrap();
        let mut chain = Vec::from([storage, Memory { bytes: vec![5; 2 << 20], device: false }]);
        let named =
            |storage| Opened { storage, path: Some("/x/y".into()), name: String::new(), id: None };
        let base = chain.pop();
        let mut base = base.map(named);
        let top = chain.pop().map(named).unwrap();
        let chain =
            Chain::open(top, ChainOptions::default(), &mut |_| Ok(base.take().unwrap())).unwrap();
        let mut back = vec![1; (1 << 20) + 512];
        ChainReader::new(chain).read_at(0, &mut back).unwrap();
        assert!(back[..65536].iter().all(|&b| b == 5), "version {version}");
        assert!(back[65536..].iter().all(|&b| b == 0), "version {version}");
    }
}

#[test]
fn what_does_not_fit_is_an_error_and_no_image() {
    let options = CreateOptions::new(4 << 20);
    let mut storage = Memory::device(1 << 20);
    let mut builder = Builder::new(&mut storage, "disk", &options).unwrap();
    let e = builder.data(0, &vec![1; 1 << 20]).unwrap_err().to_string();
    assert_eq!(e, "disk: has room for 1048576 bytes, but the new image needs more");
    drop(builder);
    assert!(run(&mut storage, "disk", Repair::None, &mut |_| {}).is_err());
    // 64 bits for each cluster of 512 bytes: 8 MiB of refcount table are 1 Mi blocks of 64.
    let options = CreateOptions { cluster_size: 512, refcount_bits: 64, version: 2, ..options };
    assert!(Builder::new(&mut Memory::file(), "disk", &options).is_err());
}
