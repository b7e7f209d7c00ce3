//! Reading and mapping, compared with qemu-img byte by byte and extent by extent.

use std::path::Path;

use qcow::extents::{Extent, walk};
use qcow::open::{ChainOptions, Format};

use crate::support::*;

/// Random writes, zeroes, discards and (aligned) compressed writes.
pub(crate) fn scribble(
    path: &Path,
    rng: &mut Rng,
    cluster: u64,
    size: u64,
    compressed: bool,
    count: u64,
) {
    let mut commands = Vec::new();
    for _ in 0..count {
        let unit = if rng.below(3) == 0 { 512 } else { cluster };
        let at = rng.below(size.div_ceil(unit)) * unit;
        let len = ((1 + rng.below(6)) * unit).min(size - at);
        let pattern = 1 + rng.below(255);
        commands.push(match rng.below(8) {
            0 => format!("write -z {at} {len}"),
            1 => format!("write -z -u {at} {len}"),
            2 => format!("discard {at} {len}"),
            3 | 4 if compressed => {
                let at = at / cluster * cluster;
                format!("write -c -P {pattern} {at} {}", cluster.min(size - at))
            }
            _ => format!("write -P {pattern} {at} {len}"),
        });
    }
    // Compressed writes come first: QEMU 10 goes on filling a host cluster with compressed data
    // after a discard freed it and a plain write took it.
    commands.sort_by_key(|c| !c.starts_with("write -c"));
    // QEMU refuses compressed writes over allocated clusters; that is fine here.
    let mut args = vec!["-f", "qcow2"];
    commands.iter().for_each(|c| args.extend(["-c", c]));
    args.push(path.to_str().unwrap());
    output("qemu-io", &args);
}

/// Extents as qemu-img prints them.
pub(crate) fn qemu_map(path: &Path) -> Vec<serde_json::Value> {
    let text = qemu_img(&["map", "-f", "qcow2", "--output=json", path.to_str().unwrap()]);
    serde_json::from_str(&text).unwrap()
}

pub(crate) fn our_map(path: &Path) -> Vec<Extent> {
    let mut r = reader(path);
    let mut all = Vec::new();
    walk(&mut r, 0, u64::MAX, &mut |e| all.push(e)).unwrap();
    all
}

fn same_map(path: &Path) {
    let want = qemu_map(path);
    let got: Vec<serde_json::Value> =
        our_map(path).iter().map(|e| serde_json::to_value(e).unwrap()).collect();
    for (g, w) in got.iter().zip(&want) {
        assert_eq!(g, w, "{}", path.display());
    }
    assert_eq!(got.len(), want.len());
}

pub(crate) fn same_contents(path: &Path) {
    let (ours, theirs) = (our_contents(path), qemu_contents(path));
    assert_eq!(ours.len(), theirs.len());
    let differs = ours.iter().zip(&theirs).position(|(a, b)| a != b);
    assert_eq!(differs, None, "{}", path.display());
}

#[test]
fn every_cluster_size_with_everything_in_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    let mut rng = Rng(1);
    for bits in 9..=21 {
        let kinds = ["1.1,compression_type=zlib", "1.1,compression_type=zstd", "0.10"];
        for compat in &kinds[..2 + bits % 2] {
            let cluster = 1u64 << bits;
            let size = (cluster * 37 + 512 * 3).min(9 << 20);
            let options = format!("cluster_size={cluster},compat={compat}");
            qemu_create(&path, &options, &size.to_string());
            scribble(&path, &mut rng, cluster, size, true, 30);
            same_contents(&path);
            same_map(&path);
        }
    }
}

#[test]
fn random_data_compresses_badly_and_still_reads() {
    let dir = tempfile::tempdir().unwrap();
    let raw = dir.path().join("a.raw");
    let mut rng = Rng(2);
    // Half noise, half text, so that compressed clusters have many lengths.
    let bytes: Vec<u8> = (0..300_000)
        .flat_map(|i| if i / 4000 % 3 == 0 { rng.next() } else { i / 17 }.to_le_bytes())
        .collect();
    std::fs::write(&raw, &bytes).unwrap();
    for (bits, kind) in [(9, "zlib"), (12, "zstd"), (16, "zlib"), (16, "zstd"), (21, "zstd")] {
        let path = dir.path().join("a.qcow2");
        qemu_img(&[
            "convert",
            "-c",
            "-f",
            "raw",
            "-O",
            "qcow2",
            "-o",
            &format!("cluster_size={},compression_type={kind}", 1 << bits),
            raw.to_str().unwrap(),
            path.to_str().unwrap(),
        ]);
        let mut ours = our_contents(&path);
        ours.truncate(bytes.len());
        assert!(ours == bytes, "{bits} {kind}");
        same_map(&path);
    }
}

#[test]
fn chains_of_other_sizes_and_cluster_sizes() {
    let dir = tempfile::tempdir().unwrap();
    let d = |name: &str| dir.path().join(name);
    let mut rng = Rng(3);
    for (round, sizes) in [
        [1 << 20, 1 << 20, 1 << 20, 1 << 20],
        [700 << 10, 3 << 20, 1 << 20, 2 << 20],
        [2 << 20, 512 * 3, 2 << 20, (1 << 20) + 512],
        [512 * 1001, (1 << 20) + 512, 3 << 20, 3 << 20],
    ]
    .into_iter()
    .enumerate()
    {
        let base: Vec<u8> = (0..sizes[0]).map(|i| (i / 512 % 251) as u8 + 1).collect();
        std::fs::write(d("0.raw"), &base).unwrap();
        let clusters = [512, 65536, 4096, 16384];
        for (i, &size) in sizes.iter().enumerate().skip(1) {
            let path = d(&format!("{i}.qcow2"));
            let (name, format) = if i == 1 {
                ("0.raw".to_owned(), "raw")
            } else {
                (format!("{}.qcow2", i - 1), "qcow2")
            };
            let cluster = clusters[(i + round) % 4];
            let backing = if i == 2 { d(&name).display().to_string() } else { name };
            qemu_create(
                &path,
                &format!("cluster_size={cluster},backing_file={backing},backing_fmt={format}"),
                &size.to_string(),
            );
            scribble(&path, &mut rng, cluster, size as u64, true, 8);
            same_contents(&path);
            same_map(&path);
        }
    }
}

#[test]
fn preallocated_and_zero_clusters_map_alike() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    qemu_create(&path, "preallocation=full", "2M");
    qemu_io(
        &path,
        &["write -P 1 0 2M", "write -z 64k 128k", "write -z -u 512k 100k", "discard 1M 64k"],
    );
    same_contents(&path);
    same_map(&path);
    let zero_with_place = our_map(&path).iter().any(|e| e.zero && e.offset.is_some());
    assert!(zero_with_place, "the image was to have preallocated zero clusters");
}

#[test]
fn a_part_of_the_map() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    qemu_create(&path, "", "10M");
    qemu_io(&path, &["write -P 1 1M 1M"]);
    let mut all = Vec::new();
    walk(&mut reader(&path), 1_000_000, 1_100_000, &mut |e| all.push(e)).unwrap();
    let got: Vec<_> = all.iter().map(|e| (e.start, e.length, e.data)).collect();
    assert_eq!(got, [(1_000_000, 48_576, false), (1_048_576, 51_424, true)]);
}

#[test]
fn raw_top_layer() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.raw");
    std::fs::write(&path, vec![5; 3000]).unwrap();
    let options = ChainOptions { format: Some(Format::Raw), ..ChainOptions::default() };
    let mut r = qcow::ChainReader::new(open_chain(&path, options).unwrap());
    let mut buffer = vec![9; 4000];
    r.read_at(10, &mut buffer).unwrap();
    assert_eq!(buffer, [vec![5; 2990], vec![0; 1010]].concat());
}

#[test]
fn a_cut_file_is_an_error_and_not_zeroes() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    qemu_create(&path, "", "10M");
    qemu_io(&path, &["write -P 1 0 4M"]);
    let full = std::fs::metadata(&path).unwrap().len();
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(full - (1 << 20)).unwrap();
    let mut r = reader(&path);
    let e = r.read_at(0, &mut vec![0; 4 << 20]).unwrap_err();
    let p = path.display();
    assert_eq!(
        e.to_string(),
        format!(
            "{p}: data cluster at offset 3473408 is past the end of the file; the file has 3473408 \
             bytes; it was cut short or is damaged"
        )
    );
}
