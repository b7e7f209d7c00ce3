//! Created images, judged by qemu-img.

use std::path::Path;

use crate::support::*;
use qcow::create::{CreateOptions, Preallocation, create};
use qcow::info::Info;
use qcow::open::{ChainOptions, Format};

/// The fields of `info` that do not tell of the file itself.
fn qemu_info(path: &Path) -> serde_json::Value {
    let text = qemu_img(&["info", "-f", "qcow2", "--output=json", path.to_str().unwrap()]);
    let mut json: serde_json::Value = serde_json::from_str(&text).unwrap();
    let o = json.as_object_mut().unwrap();
    o.remove("children");
    o.remove("actual-size");
    json
}

fn our_info(path: &Path) -> serde_json::Value {
    let options = ChainOptions { top_only: true, ..ChainOptions::default() };
    let mut chain = open_chain(path, options).unwrap();
    serde_json::to_value(Info::of(&mut chain.layers[0], None).unwrap()).unwrap()
}

/// Creates the same image twice, by us and by qemu-img, and compares.
fn same_as_qemu(dir: &Path, options: &CreateOptions) {
    let ours = dir.join("ours.qcow2");
    let theirs = dir.join("theirs.qcow2");
    std::fs::write(&ours, b"").unwrap();
    let mut storage = FileStorage::open(&ours, true);
    create(&mut storage, "ours", options).unwrap();

    let mut o = format!(
        "cluster_size={},refcount_bits={},compat={},lazy_refcounts={}",
        options.cluster_size,
        options.refcount_bits,
        if options.version == 2 { "0.10" } else { "1.1" },
        if options.lazy_refcounts { "on" } else { "off" },
    );
    if options.version == 3 {
        o += &format!(",compression_type={}", options.compression.name());
    }
    if options.preallocation == Preallocation::Metadata {
        o += ",preallocation=metadata";
    }
    if let Some((name, format)) = &options.backing {
        o += &format!(",backing_file={name},backing_fmt={}", format.name());
    }
    qemu_create(&theirs, &o, &options.size.to_string());

    let mut want = qemu_info(&theirs);
    want["filename"] = ours.to_str().unwrap().into();
    assert_eq!(qemu_info(&ours), want, "{options:?}");
    assert_eq!(our_info(&ours), want, "{options:?}");
    let (code, report) = qemu_check(&ours, &[]);
    assert_eq!(code, 0, "{options:?}: {report}");
    let mut storage = FileStorage::open(&ours, false);
    let log = &mut |line: &str| panic!("{options:?}: {line}");
    let ours =
        qcow::check::run(&mut storage, ours.to_str().unwrap(), qcow::check::Repair::None, log);
    assert_eq!(serde_json::to_value(ours.unwrap()).unwrap(), report, "{options:?}");
}

#[test]
fn matrix_of_sizes_and_widths() {
    let dir = tempfile::tempdir().unwrap();
    for bits in 9..=21 {
        let base = CreateOptions { cluster_size: 1 << bits, ..CreateOptions::new(3 << 20) };
        same_as_qemu(dir.path(), &CreateOptions { version: 2, ..base.clone() });
        let order = (bits * 5) % 7;
        let compression = if bits % 2 == 0 {
            qcow::format::Compression::Zstd
        } else {
            qcow::format::Compression::Deflate
        };
        same_as_qemu(
            dir.path(),
            &CreateOptions {
                refcount_bits: 1 << order,
                lazy_refcounts: bits % 3 == 0,
                compression,
                ..base
            },
        );
    }
}

#[test]
fn every_refcount_width_preallocated() {
    let dir = tempfile::tempdir().unwrap();
    for order in 0..=6 {
        for cluster_size in [512, 65536] {
            same_as_qemu(
                dir.path(),
                &CreateOptions {
                    refcount_bits: 1 << order,
                    cluster_size,
                    preallocation: Preallocation::Metadata,
                    ..CreateOptions::new((10 << 20) + 512)
                },
            );
        }
    }
}

#[test]
fn sizes_at_the_edges() {
    let dir = tempfile::tempdir().unwrap();
    for size in [512, 1 << 40, (1 << 40) + 512] {
        same_as_qemu(dir.path(), &CreateOptions::new(size));
    }
    let small = CreateOptions { cluster_size: 512, ..CreateOptions::new(64 << 30) };
    same_as_qemu(dir.path(), &small);
    let zero = dir.path().join("zero.qcow2");
    std::fs::write(&zero, b"").unwrap();
    create(&mut FileStorage::open(&zero, true), "zero", &CreateOptions::new(0)).unwrap();
    assert_clean(&zero);
    assert!(our_contents(&zero).is_empty());
}

#[test]
fn backing_file_names() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("base.raw"), vec![7; 1 << 20]).unwrap();
    for cluster_size in [512, 65536] {
        same_as_qemu(
            dir.path(),
            &CreateOptions {
                cluster_size,
                backing: Some(("base.raw".to_owned(), Format::Raw)),
                ..CreateOptions::new(1 << 20)
            },
        );
    }
    assert_eq!(our_contents(&dir.path().join("ours.qcow2")), vec![7; 1 << 20]);
}

#[test]
fn full_preallocation_and_old_contents_of_a_device() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    for preallocation in [Preallocation::Off, Preallocation::Metadata, Preallocation::Full] {
        let options =
            CreateOptions { preallocation, cluster_size: 4096, ..CreateOptions::new(1 << 20) };
        std::fs::write(&path, vec![0xee; 2 << 20]).unwrap();
        create(&mut FileStorage::device(&path), "a", &options).unwrap();
        assert_eq!(our_contents(&path), vec![0; 1 << 20]);
        assert_clean(&path);
        std::fs::write(&path, vec![0xee; 2 << 20]).unwrap();
        create(&mut FileStorage::open(&path, true), "a", &options).unwrap();
        assert_eq!(our_contents(&path), vec![0; 1 << 20]);
        assert_clean(&path);
    }
    std::fs::write(&path, vec![0xee; 1 << 20]).unwrap();
    let options =
        CreateOptions { preallocation: Preallocation::Full, ..CreateOptions::new(1 << 20) };
    let e = create(&mut FileStorage::device(&path), "a", &options).unwrap_err();
    assert_eq!(e.to_string(), "a: has room for 1048576 bytes, but the new image needs 1376256");
    assert_eq!(std::fs::read(&path).unwrap(), vec![0xee; 1 << 20]);
}

#[test]
fn info_of_used_images() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    let p = path.to_str().unwrap();
    std::fs::write(dir.path().join("base.raw"), vec![7; 1 << 20]).unwrap();
    qemu_create(&path, "lazy_refcounts=on,backing_file=base.raw,backing_fmt=raw", "4M");
    qemu_img(&["snapshot", "-c", "first", p]);
    qemu_img(&["snapshot", "-c", "a second one", p]);
    assert_eq!(our_info(&path), qemu_info(&path));
    assert_eq!(our_info(&path)["snapshots"].as_array().unwrap().len(), 2);
    output("qemu-io", &["-f", "qcow2", "-c", "write 0 1M", "-c", "flush", "-c", "sigraise 9", p]);
    assert_eq!(our_info(&path), qemu_info(&path));
    assert_eq!(our_info(&path)["dirty-flag"], true);
    patch(&path, 79, &[2]);
    assert_eq!(our_info(&path), qemu_info(&path));
    assert_eq!(our_info(&path)["format-specific"]["data"]["corrupt"], true);

    let mut chain = open_chain(&path, ChainOptions::default()).unwrap();
    let all = Info::of_chain(&mut chain, &mut |layer| Some(layer.name.len() as u64)).unwrap();
    assert_eq!((all[1].format, all[1].virtual_size), ("raw", 1 << 20));
    assert_eq!(all[0].full_backing_filename.as_ref(), Some(&all[1].filename));
}
