//! Extended L2 entries and external data files, read, checked, repaired and made; compared with
//! qemu-img.

use std::fs;
use std::path::Path;

use block::Storage;
use qcow::build::Builder;
use qcow::check::{Repair, Report, run};
use qcow::create::{CreateOptions, Preallocation, create, create_with_data};
use qcow::open::{ChainOptions, Format};

use crate::read::{our_map, qemu_map, same_contents, scribble};
use crate::support::*;

fn check(path: &Path, repair: Repair) -> (Report, String) {
    let mut text = String::new();
    let mut storage = FileStorage::open(path, repair != Repair::None);
    let report = run(&mut storage, "a", repair, &mut |l| text += &format!("{l}\n"));
    (report.unwrap(), text)
}

fn clean(path: &Path) {
    let (report, text) = check(path, Repair::None);
    assert_eq!((report.corruptions, report.leaks, report.check_errors), (0, 0, 0), "{text}");
    let (code, theirs) = qemu_check(path, &[]);
    assert_eq!(code, 0, "{theirs}");
    let ours = serde_json::to_value(&report).unwrap();
    for field in ["allocated-clusters", "total-clusters", "image-end-offset"] {
        assert_eq!(ours[field], theirs[field], "{field} of {}", path.display());
    }
}

/// Both maps, where a part that is in no layer has no place either: QEMU says where one would go if
/// the rest of its cluster has data.
fn same_map(path: &Path) {
    let plain = |all: Vec<serde_json::Value>| {
        let mut out: Vec<serde_json::Value> = Vec::new();
        for mut e in all {
            if e["present"] == false {
                e.as_object_mut().unwrap().remove("offset");
                let same =
                    |l: &&mut serde_json::Value| l["present"] == false && l["depth"] == e["depth"];
                if let Some(last) = out.last_mut().filter(same) {
                    let len = last["length"].as_u64().unwrap() + e["length"].as_u64().unwrap();
                    last["length"] = len.into();
                    continue;
                }
            }
            out.push(e);
        }
        out
    };
    let ours = our_map(path).iter().map(|e| serde_json::to_value(e).unwrap()).collect();
    let (got, want) = (plain(ours), plain(qemu_map(path)));
    for (g, w) in got.iter().zip(&want) {
        assert_eq!(g, w, "{}", path.display());
    }
    assert_eq!(got.len(), want.len());
}

#[test]
fn what_qemu_writes_reads_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    let data = dir.path().join("a.data");
    let mut rng = Rng(5);
    for bits in [14, 16, 21] {
        for kind in 0..5 {
            let cluster = 1u64 << bits;
            let size = (cluster * 37 + 512 * 3).min(5 << 20);
            let mut options = format!("cluster_size={cluster}");
            if kind != 1 && kind != 2 {
                options += ",extended_l2=on";
            }
            if kind > 0 {
                options += &format!(",data_file={}", data.display());
            }
            if kind == 2 || kind == 4 {
                options += ",data_file_raw=on";
            }
            qemu_create(&path, &options, &size.to_string());
            // In the extended ones subclusters, too.
            scribble(&path, &mut rng, cluster / 32, size, false, 15);
            scribble(&path, &mut rng, cluster, size, kind == 0, 15);
            same_contents(&path);
            same_map(&path);
            clean(&path);
            if kind == 2 || kind == 4 {
                let raw = fs::read(&data).unwrap();
                let disk = our_contents(&path);
                // QEMU writes whole clusters.
                assert!(raw.len() >= disk.len() && raw[..disk.len()] == disk);
            }
        }
    }
}

#[test]
fn chains_with_subclusters_and_data_files() {
    let dir = tempfile::tempdir().unwrap();
    let d = |name: String| dir.path().join(name);
    let mut rng = Rng(6);
    for round in 0..2u64 {
        for i in 0..4u64 {
            let path = d(format!("{i}.qcow2"));
            let cluster = [16384, 65536, 4096, 1 << 20][(i + round) as usize % 4];
            let mut options = format!("cluster_size={cluster}");
            if cluster >= 16384 && i != 2 {
                options += ",extended_l2=on";
            }
            if (i + round) % 3 == 0 {
                options += &format!(",data_file={}", d(format!("{i}.data")).display());
            }
            if i > 0 {
                options += &format!(",backing_file={}.qcow2,backing_fmt=qcow2", i - 1);
            }
            let size = [3 << 20, 2 << 20, (3 << 20) + 512, 3 << 20][(i ^ round) as usize % 4];
            qemu_create(&path, &options, &size.to_string());
            scribble(&path, &mut rng, (cluster / 32).max(512), size, false, 10);
            same_contents(&path);
            same_map(&path);
        }
    }
}

#[test]
fn what_is_made_here_is_fine_for_qemu() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    let data = dir.path().join("a.data");
    for extended_l2 in [false, true] {
        for (data_file, data_file_raw) in [(false, false), (true, false), (true, true)] {
            for preallocation in [Preallocation::Off, Preallocation::Metadata, Preallocation::Full]
            {
                if preallocation == Preallocation::Full && extended_l2 {
                    continue;
                }
                let name = data.display().to_string();
                let o = CreateOptions {
                    extended_l2,
                    data_file: data_file.then_some(name),
                    data_file_raw,
                    preallocation,
                    ..CreateOptions::new((5 << 20) + 512)
                };
                fs::write(&path, "").unwrap();
                fs::write(&data, vec![7; 6 << 20]).unwrap();
                let mut storage = FileStorage::open(&path, true);
                let mut below = FileStorage::open(&data, true);
                match data_file {
                    true => create_with_data(&mut storage, &mut below, "a", &o).unwrap(),
                    false => create(&mut storage, "a", &o).unwrap(),
                }
                clean(&path);
                assert!(our_contents(&path).iter().all(|&b| b == 0));
                same_contents(&path);
                qemu_io(&path, &["write -P 5 100k 7k", "write -P 6 5M 512"]);
                same_contents(&path);
                // With contents, too.
                let mut builder = match data_file {
                    true => Builder::with_data(&mut storage, &mut below, "a", &o).unwrap(),
                    false => Builder::new(&mut storage, "a", &o).unwrap(),
                };
                builder.data(65536, &vec![3; 3 * 65536]).unwrap();
                builder.zeroes(4 * 65536, (5 << 20) - 4 * 65536).unwrap();
                builder.data(5 << 20, &[4; 512]).unwrap();
                builder.finish().unwrap();
                clean(&path);
                same_contents(&path);
                if preallocation == Preallocation::Off {
                    // QEMU looks for holes in files where all is mapped.
                    same_map(&path);
                }
                let got = our_contents(&path);
                assert!(got[65536..4 * 65536].iter().all(|&b| b == 3));
                assert!(got[4 * 65536..5 << 20].iter().all(|&b| b == 0));
                if data_file_raw {
                    assert!(fs::read(&data).unwrap() == got);
                }
            }
        }
    }
}

#[test]
fn data_files_that_are_not_opened() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    let data = dir.path().join("a.data");
    let refused = |o: ChainOptions| open_chain(&path, o).err().unwrap().to_string();
    qemu_create(&path, &format!("data_file={}", data.display()), "1M");
    let header = fs::read(&path).unwrap();
    let name = data.display().to_string();
    let at = header.windows(name.len()).position(|w| w == name.as_bytes()).unwrap();
    // Only the image is opened then: what stands in it can be seen.
    fs::remove_file(&data).unwrap();
    open_chain(&path, ChainOptions { top_only: true, ..Default::default() }).unwrap();
    assert!(refused(ChainOptions::default()).contains("data file"), "not there");
    for (bad, text) in [
        ("nbd://x", "data file name \"nbd://x"),
        ("json:{}", "data file name \"json:{}"),
        ("/dev/null", "is a character device"),
        ("a.qcow2", "is a file of the chain already"),
    ] {
        let mut bytes = header.clone();
        bytes[at..at + name.len()].fill(b'/');
        // The name's length, then the name; what follows it are padding and other extensions.
        bytes[at - 4..at].copy_from_slice(&(bad.len() as u32).to_be_bytes());
        bytes[at..at + bad.len()].copy_from_slice(bad.as_bytes());
        bytes[at + bad.len()..at + name.len() + 8].fill(0);
        fs::write(&path, &bytes).unwrap();
        let got = refused(ChainOptions::default());
        assert!(got.contains(text), "{bad}: {got}");
    }
    // An image that names none.
    let mut bytes = header.clone();
    bytes[at - 8..at].fill(0);
    fs::write(&path, &bytes).unwrap();
    assert!(refused(ChainOptions::default()).contains("does not name it"));
    // A device that is too small.
    fs::write(&path, &header).unwrap();
    fs::write(&data, vec![1; 1 << 19]).unwrap();
    assert!(our_contents(&path).iter().all(|&b| b == 0), "nothing is mapped");
    qemu_io(&path, &["write -P 5 0 64k", "write -P 6 1000k 24k"]);
    fs::OpenOptions::new().write(true).open(&data).unwrap().set_len(65536).unwrap();
    let got = our_contents(&path);
    assert!(got[..65536].iter().all(|&b| b == 5) && got[65536..].iter().all(|&b| b == 0));
    same_contents(&path);
}

/// Where the L2 table of a small image starts.
fn l2_at(path: &Path) -> u64 {
    peek_u64(path, peek_u64(path, 40)) & !(1 << 63)
}

#[test]
fn damaged_entries_are_found_and_repaired() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    let data = dir.path().join("a.data");
    let all = u64::from(u32::MAX);
    // (external data file, word: what is changed in it, bitmap, can be repaired)
    for (external, word, bitmap, repaired) in [
        // Data that reads as zeroes.
        (false, None, all << 32 | 1, true),
        (true, None, all << 32 | 1, true),
        // Data without a cluster.
        (false, Some(0), 6, true),
        // Compressed, with subclusters.
        (false, Some(1 << 62 | 0x5_0000), 1, true),
        // Compressed in an external data file.
        (true, Some(1 << 62 | 0x5_0000), 0, false),
        // Bit 0 is reserved.
        (false, Some(1 << 63 | 0x5_0001), 1, false),
        // Not aligned, with and without data.
        (false, Some(1 << 63 | 0x5_0200), 1, false),
        (false, Some(1 << 63 | 0x5_0200), 1 << 33, true),
        // The flag without a cluster.
        (false, Some(1 << 63), 0, true),
        // The flag is missing where every cluster is the image's own.
        (true, Some(1 << 16), 1, true),
        // Not where it must be in an external data file.
        (true, Some(1 << 63 | 2 << 16), 1, false),
    ] {
        let mut options = "extended_l2=on".to_owned();
        if external {
            options += &format!(",data_file={}", data.display());
        }
        qemu_create(&path, &options, "1M");
        qemu_io(&path, &["write -P 5 64k 64k", "write -P 7 192k 64k"]);
        clean(&path);
        let at = l2_at(&path) + 16;
        if let Some(word) = word {
            poke_u64(&path, at, word);
        }
        poke_u64(&path, at + 8, bitmap);
        let what = format!("{external} {word:x?} {bitmap:#x}");
        let (report, text) = check(&path, Repair::None);
        assert!(report.corruptions > 0, "{what}: {text}");
        let mut r = reader(&path);
        let mut buffer = [0; 512];
        let read = r.read_at(65536, &mut buffer);
        let flag = word == Some(1 << 16);
        assert_eq!(read.is_ok(), flag, "{what}");
        r.read_at(196608, &mut buffer).unwrap();
        assert_eq!(buffer, [7; 512]);
        drop(r);
        let (report, text) = check(&path, Repair::All);
        assert_eq!(report.corruptions == 0, repaired, "{what}: {text}");
        if repaired {
            assert_clean(&path);
            let mut r = reader(&path);
            match word {
                // What it holds is no compressed data.
                Some(word) if word >> 62 == 1 => {}
                _ => r.read_at(65536, &mut buffer).unwrap(),
            }
        }
    }
}

#[test]
fn a_device_that_is_too_small_for_the_disk() {
    let dir = tempfile::tempdir().unwrap();
    let (path, data) = (dir.path().join("a"), dir.path().join("d"));
    fs::write(&path, "").unwrap();
    fs::write(&data, vec![0; 1 << 20]).unwrap();
    let mut o = CreateOptions::new((1 << 20) + 512);
    o.data_file = Some(data.display().to_string());
    let mut storage = FileStorage::open(&path, true);
    let mut below = FileStorage::device(&data);
    let e = create_with_data(&mut storage, &mut below, "a", &o).unwrap_err().to_string();
    assert_eq!(e, "a: its data file has room for 1048576 bytes, but the disk has 1049088");
    assert_eq!(storage.len(), 0, "nothing was written");
    let e = create(&mut storage, "a", &o).unwrap_err().to_string();
    assert_eq!(e, "a: an external data file must be named and be open");
    o.backing = Some(("b".to_owned(), Format::Raw));
    o.size = 1 << 20;
    create_with_data(&mut storage, &mut below, "a", &o).unwrap();
}
