//! Damaged and hostile images: a clear error or a result, never a panic, a hang or much memory.
//!
//! Memory is limited for the whole test program: an image that provokes a large request kills it.

#[allow(dead_code, reason = "shared with the tests of whole images; some of it is used here")]
#[path = "../images/support.rs"]
mod support;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::LazyLock;
use std::time::Duration;

use block::{Status, Storage, StorageError};
use qcow::check::{Repair, run};
use qcow::extents::walk;
use qcow::open::{ChainOptions, Opened};
use qcow::{Chain, ChainReader, ImageMeta, MetadataSet, Mode};

use support::*;

const PAGE: u64 = 4096;

/// A file in memory that behaves as a sparse file: it has a length, and mostly nothing in it.
#[derive(Clone, Default)]
struct Sparse {
    len: u64,
    pages: BTreeMap<u64, Vec<u8>>,
}

/// Calls `f(page, position in the page, position in the range, bytes)` for each part of a range.
fn parts(offset: u64, len: usize, mut f: impl FnMut(u64, usize, usize, usize)) {
    let mut done = 0;
    while done < len {
        let at = offset + done as u64;
        let skip = (at % PAGE) as usize;
        let n = (PAGE as usize - skip).min(len - done);
        f(at / PAGE, skip, done, n);
        done += n;
    }
}

impl Storage for Sparse {
    fn len(&self) -> u64 {
        self.len
    }

    fn capacity(&self) -> u64 {
        1 << 62
    }

    fn read_only(&self) -> bool {
        false
    }

    fn read_at(&mut self, offset: u64, into: &mut [u8]) -> Result<(), StorageError> {
        if offset.checked_add(into.len() as u64).is_none_or(|end| end > self.capacity()) {
            let len = into.len() as u64;
            return Err(StorageError {
                what: "read",
                offset,
                len,
                status: Status::Invalid,
                detail: 0,
            });
        }
        into.fill(0);
        if self.pages.range(offset / PAGE..=(offset + into.len() as u64) / PAGE).next().is_some() {
            parts(offset, into.len(), |page, skip, done, n| {
                if let Some(p) = self.pages.get(&page) {
                    into[done..done + n].copy_from_slice(&p[skip..skip + n]);
                }
            });
        }
        Ok(())
    }

    fn write_at(&mut self, offset: u64, from: &[u8]) -> Result<(), StorageError> {
        self.poke(offset, from);
        Ok(())
    }

    fn write_zeroes_at(&mut self, offset: u64, len: u64) -> Result<(), StorageError> {
        self.write_at(offset, &vec![0; len as usize])
    }

    fn flush(&mut self) -> Result<(), StorageError> {
        Ok(())
    }

    fn set_len(&mut self, len: u64) -> Result<(), StorageError> {
        self.len = len;
        self.pages.retain(|&page, _| page * PAGE < len);
        if let Some(p) = self.pages.get_mut(&(len / PAGE)) {
            p[(len % PAGE) as usize..].fill(0);
        }
        Ok(())
    }
}

impl Sparse {
    fn load(path: &Path) -> Sparse {
        let mut s = Sparse::default();
        s.poke(0, &fs::read(path).unwrap());
        s
    }

    fn poke(&mut self, offset: u64, bytes: &[u8]) {
        parts(offset, bytes.len(), |page, skip, done, n| {
            let p = self.pages.entry(page).or_insert_with(|| vec![0; PAGE as usize]);
            p[skip..skip + n].copy_from_slice(&bytes[done..done + n]);
        });
        self.len = self.len.max(offset + bytes.len() as u64);
    }

    fn poke_u64(&mut self, offset: u64, value: u64) {
        self.poke(offset, &value.to_be_bytes());
    }

    fn peek_u64(&self, offset: u64) -> u64 {
        let mut b = [0; 8];
        self.clone().read_at(offset, &mut b).unwrap();
        u64::from_be_bytes(b)
    }
}

/// The images of these tests that QEMU makes.
struct Samples {
    /// With something of everything, to be damaged, and how many rounds each gets.
    whole: Vec<(Sparse, u64)>,
    /// With one compressed cluster.
    compressed: Vec<Sparse>,
}

/// Makes the images, then limits the memory: all tests of this program together get this much for
/// data, and asking for more aborts it. The images themselves take a part of it. Every test begins
/// here, for children inherit the limit and QEMU's threads may need more.
fn samples_then_limited_memory() -> &'static Samples {
    static SAMPLES: LazyLock<Samples> = LazyLock::new(|| {
        use nix::sys::resource::{Resource, setrlimit};
        let whole = [
            ("cluster_size=512", 1500),
            ("cluster_size=4096,compression_type=zstd,refcount_bits=8", 700),
            ("cluster_size=65536", 300),
            ("cluster_size=4096,compat=0.10", 500),
        ];
        let samples = Samples {
            whole: whole.map(|(options, rounds)| (sample(options), rounds)).into(),
            compressed: ["zlib", "zstd"].map(compressed).into(),
        };
        setrlimit(Resource::RLIMIT_DATA, 320 << 20, 320 << 20).unwrap();
        samples
    });
    &SAMPLES
}

/// Does everything with an image that the control path can do. How each ends does not matter.
fn exercise(image: &Sparse) {
    let mut s = image.clone();
    if let Ok(mut meta) = ImageMeta::open(&mut s, "a", Mode::Write) {
        let _ = MetadataSet::new(&meta);
        let _ = meta.prepare_write(&mut s, false);
    }
    let top = Opened { storage: image.clone(), path: None, name: "a".to_owned(), id: None };
    let options = ChainOptions { top_only: true, ..ChainOptions::default() };
    let opened = Chain::open(top, options, &mut |_| unreachable!("the top only"));
    if let Ok(mut chain) = opened {
        let _ = qcow::info::Info::of(&mut chain.layers[0], None);
        let mut r = ChainReader::new(chain);
        let mut left = 10_000;
        let end = r.size().min(64 << 20);
        let _ = walk(&mut r, 0, end, &mut |_| left -= 1);
        let mut buffer = vec![0; 70_000];
        for at in [0, 65_536, 1 << 20, r.size().saturating_sub(5000)] {
            let _ = r.read_at(at, &mut buffer);
        }
    }
    let mut s = image.clone();
    if let Ok(report) = run(&mut s, "a", Repair::All, &mut |_| {}) {
        // A repair that says all is well must be believed by a second look.
        let again = run(&mut s, "a", Repair::None, &mut |_| {}).unwrap();
        assert_eq!(
            (report.corruptions, report.leaks, report.check_errors),
            (again.corruptions, again.leaks, again.check_errors)
        );
    }
}

fn sample(options: &str) -> Sparse {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    qemu_create(&path, options, "3M");
    qemu_io(
        &path,
        &["write -c -P 9 2M 64k", "write -P 1 0 300k", "write -z 1M 128k", "discard 128k 64k"],
    );
    let p = path.to_str().unwrap();
    qemu_img(&["snapshot", "-c", "one", p]);
    qemu_io(&path, &["write -P 1 64k 100k"]);
    if !options.contains("compat=0.10") {
        qemu_img(&["bitmap", "--add", p, "b0"]);
    }
    Sparse::load(&path)
}

fn compressed(kind: &str) -> Sparse {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    qemu_create(&path, &format!("compression_type={kind}"), "1M");
    qemu_io(&path, &["write -c -P 9 0 64k"]);
    Sparse::load(&path)
}

#[test]
fn random_damage_of_headers_and_tables() {
    let samples = samples_then_limited_memory();
    // The long run of CI asks for more rounds, each time with another seed.
    let more: Option<u64> =
        std::env::var("POLLDISK_FUZZ_ROUNDS").ok().map(|n| n.parse().expect("a number"));
    let seed = more.map_or(42, |_| u64::from(std::process::id()));
    println!("seed {seed}");
    let mut rng = Rng(seed);
    let started = now();
    for (good, rounds) in &samples.whole {
        let meta = ImageMeta::open(&mut good.clone(), "a", Mode::Read).unwrap();
        let h = &meta.header;
        let cluster = meta.geometry.cluster_size();
        // Where damage hurts: header, first-level tables, L2 tables, blocks, snapshots.
        let mut spots = vec![(0, 120), (0, 512), (h.l1_table_offset, u64::from(h.l1_size) * 8)];
        spots.push((h.refcount_table_offset, 64));
        spots.push((h.snapshots_offset, 100));
        spots.push((meta.refcount_table[0], cluster.min(512)));
        spots.extend(
            meta.l1.iter().filter(|&&w| w != 0).map(|w| (w & 0x00ff_ffff_ffff_fe00, cluster)),
        );
        for _ in 0..rounds * more.unwrap_or(1) {
            let mut bad = good.clone();
            for _ in 0..1 + rng.below(4) {
                let (start, len) = spots[rng.below(spots.len() as u64) as usize];
                let at = start + rng.below(len.max(1));
                match rng.below(3) {
                    0 => bad.poke(at, &[rng.next() as u8]),
                    1 => bad.poke(at, &[1 << rng.below(8)]),
                    _ => {
                        let value = match rng.below(4) {
                            0 => rng.next(),
                            1 => u64::MAX,
                            2 => rng.next() >> rng.below(64),
                            _ => (1 << 63) | (rng.below(64) * cluster),
                        };
                        bad.poke_u64(at & !7, value);
                    }
                }
            }
            if rng.below(10) == 0 {
                let cut = rng.below(bad.len);
                bad.set_len(cut).unwrap();
            }
            exercise(&bad);
        }
    }
    let most = Duration::from_secs(60) * more.unwrap_or(1) as u32;
    assert!(started.elapsed() < most, "{:?}", started.elapsed());
}

/// A header that claims much, in a file of this length.
fn claims(cluster_bits: u32, len: u64, edit: impl FnOnce(&mut Sparse)) -> Sparse {
    let mut s = Sparse::default();
    let mut options = qcow::create::CreateOptions::new(1 << 20);
    options.cluster_size = 1 << cluster_bits;
    qcow::create::create(&mut s, "a", &options).unwrap();
    s.len = s.len.max(len);
    edit(&mut s);
    s
}

#[test]
fn small_files_that_claim_hugeness() {
    samples_then_limited_memory();
    let l1 = |s: &mut Sparse, entries: u32, offset: u64| {
        s.poke(36, &entries.to_be_bytes());
        s.poke_u64(40, offset);
    };
    let many_l2 = |bits: u32, entries: u32| {
        // Many L1 entries that name one and the same L2 table, full of far-flung clusters.
        claims(bits, 1 << 40, |s| {
            let table = 1u64 << 23;
            l1(s, entries, table);
            let l2 = 1u64 << 24;
            for i in 0..u64::from(entries) {
                s.poke_u64(table + i * 8, l2);
            }
            for i in 0..1 << (bits - 3) {
                s.poke_u64(l2 + i * 8, ((i * 7919) << 24) % (1 << 40));
            }
        })
    };
    let cases: Vec<(&str, Sparse)> = vec![
        ("L1 of 32 MiB, file of 1 MiB", claims(16, 1 << 20, |s| l1(s, 4 << 20, 0x3_0000))),
        ("L1 of 32 MiB in a hole", claims(16, 1 << 40, |s| l1(s, 4 << 20, 1 << 30))),
        (
            "refcount table of 8 MiB in a hole",
            claims(16, 1 << 40, |s| {
                s.poke_u64(48, 1 << 30);
                s.poke(56, &128u32.to_be_bytes());
            }),
        ),
        (
            "65536 snapshots in a hole",
            claims(16, 1 << 40, |s| {
                s.poke(60, &65536u32.to_be_bytes());
                s.poke_u64(64, 1 << 30);
            }),
        ),
        (
            "a snapshot entry of 4 GiB",
            claims(16, 1 << 40, |s| {
                s.poke(60, &1u32.to_be_bytes());
                s.poke_u64(64, 1 << 20);
                s.poke((1 << 20) + 36, &u32::MAX.to_be_bytes());
            }),
        ),
        (
            "snapshots that share one L1 table of 32 MiB",
            claims(16, 64 << 20, |s| {
                s.poke(60, &1000u32.to_be_bytes());
                s.poke_u64(64, 1 << 20);
                for i in 0..1000 {
                    let at = (1 << 20) + i * 40;
                    s.poke_u64(at, 4 << 20);
                    s.poke(at + 8, &(4u32 << 20).to_be_bytes());
                }
            }),
        ),
        (
            "a bitmap directory of 16 EiB",
            claims(16, 1 << 40, |s| {
                s.poke_u64(88, 1);
                // The feature name table becomes a bitmaps extension.
                let mut e = 0x2385_2875u32.to_be_bytes().to_vec();
                e.extend_from_slice(&384u32.to_be_bytes());
                e.extend_from_slice(&u32::MAX.to_be_bytes());
                e.extend_from_slice(&[0; 4]);
                e.extend_from_slice(&u64::MAX.to_be_bytes());
                e.extend_from_slice(&0x1_0000u64.to_be_bytes());
                s.poke(112, &e);
            }),
        ),
        ("one L2 table named 65536 times", many_l2(16, 65536)),
        ("one L2 table of 2 MiB named 65536 times", many_l2(21, 65536)),
        ("a file of 1 TiB of 512-byte clusters", claims(9, 1 << 40, |_| {})),
        ("a file of 1 TiB without refcounts", claims(16, 1 << 40, |s| s.poke_u64(0x1_0000, 0))),
        ("a file of 4 EiB", claims(16, 1 << 62, |_| {})),
        (
            "a file of 4 EiB with refcount tables at its end",
            claims(16, 1 << 62, |s| {
                s.poke_u64(48, (1 << 62) - 65536);
            }),
        ),
    ];
    for (what, image) in cases {
        let started = now();
        exercise(&image);
        assert!(started.elapsed() < Duration::from_secs(20), "{what}: {:?}", started.elapsed());
    }
}

#[test]
fn compressed_clusters_that_lie_about_their_length() {
    for good in &samples_then_limited_memory().compressed {
        let meta = ImageMeta::open(&mut good.clone(), "a", Mode::Read).unwrap();
        let l2 = meta.l1[0] & 0x00ff_ffff_ffff_fe00;
        let entry = good.peek_u64(l2);
        let host = entry & ((1 << 54) - 1);
        // The longest that an entry can claim reads past the file's end and still unpacks.
        let mut long = good.clone();
        long.poke_u64(l2, (1 << 62) | (255 << 54) | host);
        assert_eq!(first_bytes(&long).unwrap(), [9; 100]);
        // Past the file's end there is nothing.
        let mut far = good.clone();
        far.poke_u64(l2, (1 << 62) | (1 << 50));
        let text = first_bytes(&far).unwrap_err().to_string();
        assert!(text.contains("past the end of the file"), "{text}");
        // Something else than a compressed stream.
        let mut other = good.clone();
        other.poke_u64(l2, (1 << 62) | 0x1_0000);
        let text = first_bytes(&other).unwrap_err().to_string();
        assert!(text.starts_with("a: compressed cluster at offset 65536 is damaged; "), "{text}");
    }
}

fn first_bytes(image: &Sparse) -> qcow::Result<[u8; 100]> {
    let top = Opened { storage: image.clone(), path: None, name: "a".to_owned(), id: None };
    let chain = Chain::open(top, ChainOptions::default(), &mut |_| unreachable!())?;
    let mut out = [0; 100];
    ChainReader::new(chain).read_at(0, &mut out)?;
    Ok(out)
}

#[expect(clippy::disallowed_methods, reason = "a test bounds its time")]
fn now() -> std::time::Instant {
    std::time::Instant::now()
}
