//! Opening: what is refused, and with which words.

use std::path::{Path, PathBuf};

use qcow::create::{CreateOptions, create};
use qcow::open::{ChainOptions, Format};
use qcow::{ImageMeta, MetadataSet, Mode};

use crate::support::*;

fn image(dir: &Path, options: &CreateOptions) -> PathBuf {
    let path = dir.join("a.qcow2");
    std::fs::write(&path, b"").unwrap();
    create(&mut FileStorage::open(&path, true), "a", options).unwrap();
    path
}

fn open(path: &Path, mode: Mode) -> qcow::Result<ImageMeta> {
    ImageMeta::open(&mut FileStorage::open(path, mode == Mode::Write), "a.qcow2", mode)
}

fn refused(path: &Path, mode: Mode) -> String {
    open(path, mode).unwrap_err().to_string()
}

#[test]
fn each_bad_header_field_with_file_offset_value_and_range() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(dir.path(), &CreateOptions::new(1 << 30));
    let good = std::fs::read(&path).unwrap();
    let cases: &[(u64, &[u8], &str)] = &[
        (
            20,
            &40u32.to_be_bytes(),
            "header field cluster_bits at offset 20 is 40; 9 to 21 are possible",
        ),
        (
            40,
            &0x3_0200u64.to_be_bytes(),
            "header field l1_table_offset at offset 40 is 0x30200; multiples of the cluster size \
             65536 above 0 are possible",
        ),
        (
            40,
            &0u64.to_be_bytes(),
            "header field l1_table_offset at offset 40 is 0x0; multiples of the cluster size 65536 \
             above 0 are possible",
        ),
        (
            40,
            &(1u64 << 40).to_be_bytes(),
            "header field l1_table_offset at offset 40 is 0x10000000000; the L1 table of 16 bytes \
             must end inside the file, at or before 0x40000",
        ),
        (
            40,
            &0xffff_ffff_ffff_0000u64.to_be_bytes(),
            "header field l1_table_offset at offset 40 is 0xffffffffffff0000; the L1 table of 16 \
             bytes must end inside the file, at or before 0x40000",
        ),
        (
            36,
            &4_194_304u32.to_be_bytes(),
            "header field l1_table_offset at offset 40 is 0x30000; the L1 table of 33554432 bytes \
             must end inside the file, at or before 0x40000",
        ),
        (
            40,
            &0x1_0000u64.to_be_bytes(),
            "header field refcount_table_offset at offset 48 is 0x10000; the refcount table must \
             not lie over the L1 table, which takes 16 bytes from 0x10000",
        ),
        (
            56,
            &128u32.to_be_bytes(),
            "header field refcount_table_offset at offset 48 is 0x10000; the refcount table of \
             8388608 bytes must end inside the file, at or before 0x40000",
        ),
        (
            56,
            &0u32.to_be_bytes(),
            "header field refcount_table_clusters at offset 56 is 0; an image needs at least 1",
        ),
        (
            60,
            &1u32.to_be_bytes(),
            "header field snapshots_offset at offset 64 is 0x0; multiples of the cluster size \
             65536 above 0 are possible",
        ),
        (72, &[0x80], "unknown incompatible features no. 63 are not supported"),
        (
            79,
            &[1 << 4],
            "header field l1_size at offset 36 is 2; a disk of 1073741824 bytes needs at least 4 \
             entries",
        ),
        (
            95,
            &[1 << 1],
            "header field autoclear_features at offset 88 is 0x2; bit 1 (raw external data) is \
             possible with an external data file",
        ),
        (35, &[1], "AES encryption is not supported"),
        (35, &[2], "LUKS encryption is not supported"),
    ];
    for (offset, bytes, text) in cases {
        std::fs::write(&path, &good).unwrap();
        patch(&path, *offset, bytes);
        for mode in [Mode::Read, Mode::Write] {
            assert_eq!(refused(&path, mode), format!("a.qcow2: {text}"));
        }
        // Nothing was written by being refused.
        let mut want = good.clone();
        want[*offset as usize..*offset as usize + bytes.len()].copy_from_slice(bytes);
        assert!(std::fs::read(&path).unwrap() == want);
    }
    for len in [0, 3, 23, 71, 100] {
        std::fs::write(&path, &good[..len]).unwrap();
        let text = refused(&path, Mode::Read);
        assert!(text.starts_with("a.qcow2: "), "{len}: {text}");
        assert!(text.contains("header"), "{len}: {text}");
    }
    std::fs::write(&path, &good[..1000]).unwrap();
    assert_eq!(
        refused(&path, Mode::Read),
        "a.qcow2: header field l1_table_offset at offset 40 is 0x30000; the L1 table of 16 bytes \
         must end inside the file, at or before 0x10000"
    );
}

#[test]
fn features_of_qemu_that_are_not_done() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "--object",
        "secret,id=s,data=abc",
        "-o",
        "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10",
        path.to_str().unwrap(),
        "10M",
    ]);
    assert_eq!(refused(&path, Mode::Read), "a.qcow2: LUKS encryption is not supported");
}

#[test]
fn an_unknown_feature_is_called_by_its_name() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(dir.path(), &CreateOptions::new(1 << 20));
    // The last entry of the name table becomes incompatible bit 55.
    let bytes = std::fs::read(&path).unwrap();
    let at = bytes.windows(17).position(|w| w == b"raw external data").unwrap() as u64;
    patch(&path, at - 2, b"\x00\x37frobnication\0\0\0\0\0");
    patch(&path, 73, &[0x80]);
    assert_eq!(
        refused(&path, Mode::Read),
        "a.qcow2: unknown incompatible features no. 55 (\"frobnication\") are not supported"
    );
}

#[test]
fn snapshots_with_a_data_file_and_corrupt_images_can_be_read_but_not_written() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    qemu_create(&path, "", "4M");
    qemu_io(&path, &["write -P 1 0 1M"]);
    qemu_img(&["snapshot", "-c", "first", path.to_str().unwrap()]);
    qemu_io(&path, &["write -P 2 0 100k"]);
    open(&path, Mode::Write).unwrap();
    patch(&path, 79, &[4]);
    assert_eq!(
        refused(&path, Mode::Write),
        "a.qcow2: has internal snapshots and an external data file, which exclude each other; it can \
         be read, but not be written"
    );
    open(&path, Mode::Read).unwrap();
    patch(&path, 79, &[0]);
    assert!(our_contents(&path) == qemu_contents(&path));
    let options = ChainOptions::default();
    let mut chain = open_chain(&path, options).unwrap();
    let info = qcow::info::Info::of(&mut chain.layers[0], None).unwrap();
    assert_eq!((info.snapshots[0].name.as_str(), info.snapshots[0].id.as_str()), ("first", "1"));
    qemu_img(&["snapshot", "-d", "first", path.to_str().unwrap()]);
    open(&path, Mode::Write).unwrap();

    patch(&path, 79, &[2]);
    assert_eq!(
        refused(&path, Mode::Write),
        "a.qcow2: is marked corrupt; it can be read, but not be written before `image check \
         --repair all` has brought it back"
    );
    open(&path, Mode::Read).unwrap();
    let mut storage = FileStorage::open(&path, true);
    qcow::check::run(&mut storage, "a", qcow::check::Repair::All, &mut |_| {}).unwrap();
    open(&path, Mode::Write).unwrap();

    let mut read_only = FileStorage::open(&path, false);
    assert_eq!(
        ImageMeta::open(&mut read_only, "a", Mode::Write).unwrap_err().to_string(),
        "a: cannot be opened for writing: the file or device is read-only"
    );
}

#[test]
fn bitmaps_stop_being_valid_at_the_first_write() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    qemu_create(&path, "", "4M");
    qemu_img(&["bitmap", "--add", path.to_str().unwrap(), "dirty"]);
    patch(&path, 88, &[0x80]);
    let mut storage = FileStorage::open(&path, true);
    let mut meta = ImageMeta::open(&mut storage, "a", Mode::Write).unwrap();
    assert_eq!(meta.header.autoclear_features, (1 << 63) | 1);
    assert_eq!(peek_u64(&path, 88), (1 << 63) | 1);
    meta.prepare_write(&mut storage, false).unwrap();
    assert_eq!(peek_u64(&path, 88), 0);
    let writes = storage.writes;
    meta.prepare_write(&mut storage, false).unwrap();
    assert_eq!(storage.writes, writes);
    let text = qemu_img(&["info", path.to_str().unwrap()]);
    assert!(!text.contains("bitmaps"), "{text}");
}

#[test]
fn dirty_images_are_repaired_before_writing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    qemu_create(&path, "lazy_refcounts=on", "16M");
    // A killed qemu-io leaves refcounts unwritten.
    output(
        "qemu-io",
        &[
            "-f",
            "qcow2",
            "-c",
            "write -P 5 0 8M",
            "-c",
            "flush",
            "-c",
            "sigraise 9",
            path.to_str().unwrap(),
        ],
    );
    let before = our_contents(&path);
    assert!(open(&path, Mode::Read).unwrap().header.is_dirty());
    let meta = open(&path, Mode::Write).unwrap();
    assert!(!meta.header.is_dirty());
    assert_clean(&path);
    assert!(our_contents(&path) == before);
    assert!(before[..8 << 20].iter().all(|&b| b == 5));
}

fn chain_error(path: &Path, options: ChainOptions, allow: &[PathBuf]) -> String {
    match open_chain_allowing(path, options, allow) {
        Ok(_) => panic!("{} was opened", path.display()),
        Err(e) => e.to_string(),
    }
}

/// Makes an overlay that names whatever it is told.
fn overlay(path: &Path, backing: &str, format: Option<&str>) {
    std::fs::write(path, b"").unwrap();
    let mut options = CreateOptions::new(1 << 20);
    options.backing = Some((backing.to_owned(), Format::Raw));
    create(&mut FileStorage::open(path, true), "new", &options).unwrap();
    let bytes = std::fs::read(path).unwrap();
    let at = bytes.windows(4).position(|w| w == 0xe279_2acau32.to_be_bytes()).unwrap() as u64;
    match format {
        Some(f) => {
            let mut data = (f.len() as u32).to_be_bytes().to_vec();
            data.extend_from_slice(f.as_bytes());
            assert!(f.len() <= 8);
            patch(path, at + 4, &data);
        }
        // An unknown extension in its place.
        None => patch(path, at, &[0x12, 0x34, 0x56, 0x78]),
    }
}

#[test]
fn names_that_may_not_be_opened() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("top.qcow2");
    let p = path.display();
    std::fs::write(dir.path().join("base.raw"), vec![3; 4096]).unwrap();
    let cases = [
        (
            "nbd:localhost:10809",
            Some("raw"),
            "backing file name \"nbd:localhost:10809\" starts with \"nbd:\"; only paths of files and block devices are opened",
        ),
        (
            "json:{\"driver\":\"null-co\"}",
            Some("raw"),
            "backing file name \"json:{\\\"driver\\\":\\\"null-co\\\"}\" starts with \"json:\"; only paths of files and block devices are opened",
        ),
        (
            "http://x/y",
            Some("raw"),
            "backing file name \"http://x/y\" starts with \"http:\"; only paths of files and block devices are opened",
        ),
        (
            "file:nbd:x",
            Some("raw"),
            "backing file name \"file:nbd:x\" starts with \"nbd:\"; only paths of files and block devices are opened",
        ),
        ("file:", Some("raw"), "backing file name \"file:\" is empty"),
        (
            "base.raw",
            None,
            "backing file \"base.raw\" has no format stated in the image, and formats are not guessed; state it with --backing-format",
        ),
        (
            "base.raw",
            Some("vmdk"),
            "backing file \"base.raw\" has format \"vmdk\"; only qcow2 and raw are supported",
        ),
        ("base\0.raw", Some("raw"), "backing file name \"base\\0.raw\" contains a NUL byte"),
        (
            "/dev/zero",
            Some("raw"),
            "backing file \"/dev/zero\" is a character device at /dev/zero; only regular files and block devices are opened",
        ),
        (
            "/",
            Some("raw"),
            "backing file \"/\" is a directory at /; only regular files and block devices are opened",
        ),
    ];
    for (name, format, text) in cases {
        overlay(&path, name, format);
        assert_eq!(chain_error(&path, ChainOptions::default(), &[]), format!("{p}: {text}"));
        // Without the chain the image itself opens.
        let top_only = ChainOptions { top_only: true, ..ChainOptions::default() };
        open_chain(&path, top_only).unwrap();
    }
    overlay(&path, "missing.raw", Some("raw"));
    assert_eq!(
        chain_error(&path, ChainOptions::default(), &[]),
        format!(
            "{p}: backing file \"missing.raw\" cannot be opened at {}: No such file or directory \
             (os error 2)",
            dir.path().join("missing.raw").display()
        )
    );
    let fifo = dir.path().join("fifo");
    run("mkfifo", &[fifo.to_str().unwrap()]);
    overlay(&path, "fifo", Some("raw"));
    let text = chain_error(&path, ChainOptions::default(), &[]);
    assert!(text.contains("is a named pipe at"), "{text}");

    for name in ["base.raw", "file:base.raw", "./base.raw"] {
        overlay(&path, name, Some("raw"));
        assert!(our_contents(&path)[..4096].iter().all(|&b| b == 3));
    }
    overlay(&path, "base.raw", None);
    let stated = ChainOptions { backing_format: Some(Format::Raw), ..ChainOptions::default() };
    assert_eq!(open_chain(&path, stated).unwrap().layers.len(), 2);
}

#[test]
fn allowed_directories_are_compared_after_following_links() {
    let dir = tempfile::tempdir().unwrap();
    let inside = dir.path().join("inside");
    let outside = dir.path().join("outside");
    std::fs::create_dir(&inside).unwrap();
    std::fs::create_dir(&outside).unwrap();
    std::fs::write(inside.join("base.raw"), vec![1; 512]).unwrap();
    std::fs::write(outside.join("secret.raw"), vec![2; 512]).unwrap();
    std::os::unix::fs::symlink(outside.join("secret.raw"), inside.join("link.raw")).unwrap();
    let path = inside.join("top.qcow2");
    let allow = [inside.clone()];
    overlay(&path, "base.raw", Some("raw"));
    open_chain_allowing(&path, ChainOptions::default(), &allow).unwrap();
    for name in ["link.raw", "../outside/secret.raw", "/etc/passwd"] {
        overlay(&path, name, Some("raw"));
        let text = chain_error(&path, ChainOptions::default(), &allow);
        assert!(
            text.ends_with("outside of the directories that --allow-backing names"),
            "{name}: {text}"
        );
    }
}

#[test]
fn cycles_and_depth() {
    let dir = tempfile::tempdir().unwrap();
    let a = dir.path().join("a.qcow2");
    let b = dir.path().join("b.qcow2");
    overlay(&a, "b.qcow2", Some("qcow2"));
    overlay(&b, "a.qcow2", Some("qcow2"));
    let text = chain_error(&a, ChainOptions::default(), &[]);
    assert!(text.contains("backing chain is a cycle: "), "{text}");
    overlay(&a, "a.qcow2", Some("qcow2"));
    let text = chain_error(&a, ChainOptions::default(), &[]);
    assert!(text.contains("backing chain is a cycle: "), "{text}");
    // A hard link is the same file under another name.
    std::fs::hard_link(&a, dir.path().join("c.qcow2")).unwrap();
    overlay(&b, "c.qcow2", Some("qcow2"));
    let text = chain_error(&b, ChainOptions::default(), &[]);
    assert!(text.contains("backing chain is a cycle: "), "{text}");

    std::fs::write(dir.path().join("0"), vec![9; 512]).unwrap();
    for i in 1..=200 {
        let format = if i == 1 { "raw" } else { "qcow2" };
        overlay(&dir.path().join(i.to_string()), &(i - 1).to_string(), Some(format));
    }
    let deepest = dir.path().join("199");
    assert_eq!(open_chain(&deepest, ChainOptions::default()).unwrap().layers.len(), 200);
    assert_eq!(our_contents(&deepest)[..513], [vec![9; 512], vec![0]].concat());
    let text = chain_error(&dir.path().join("200"), ChainOptions::default(), &[]);
    assert!(text.ends_with("/1: backing chain has more than 200 layers"), "{text}");
}

#[test]
fn metadata_clusters_are_known_and_overlaps_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    qemu_create(&path, "cluster_size=4096", "16M");
    qemu_io(&path, &["write -P 1 0 64k", "write -P 2 8M 64k"]);
    let meta = open(&path, Mode::Write).unwrap();
    let mut set = MetadataSet::new(&meta).unwrap();
    let l2 = meta.l1[0] & 0x00ff_ffff_ffff_fe00;
    for cluster in [0, 1, 2, 3, l2 >> 12] {
        assert!(set.contains(cluster), "{cluster}");
    }
    assert!(!set.contains(4096));
    set.insert(4096);
    assert!(set.contains(4096));
    let second = meta.l1.iter().position(|&w| w != 0 && w != meta.l1[0]).unwrap();
    let at = meta.header.l1_table_offset + second as u64 * 8;
    poke_u64(&path, at, (1 << 63) | 0x2000);
    let e = MetadataSet::new(&open(&path, Mode::Write).unwrap()).unwrap_err();
    assert_eq!(
        e.to_string(),
        "a.qcow2: the cluster at offset 0x2000 is used as refcount block and as L2 table; the \
         image can be read, but not be written"
    );
    poke_u64(&path, at, 0x2001);
    let e = MetadataSet::new(&open(&path, Mode::Write).unwrap()).unwrap_err();
    assert_eq!(
        e.to_string(),
        format!(
            "a.qcow2: L1 entry {second} at offset {at:#x} is 0x2001: reserved bits 0x1 are set; \
             the image can be read, but not be written"
        )
    );
}

#[test]
fn opening_sixteen_tebibytes_reads_only_first_level_tables() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(dir.path(), &CreateOptions::new(16 << 40));
    // All mapped: each L1 entry names an L2 table, each refcount table entry a block.
    let meta = open(&path, Mode::Read).unwrap();
    let l1: Vec<u8> =
        (0..32768u64).flat_map(|i| ((1 << 63) | ((i + 100) << 16)).to_be_bytes()).collect();
    let blocks: Vec<u8> = (0..8192u64).flat_map(|i| ((i + 50_000) << 16).to_be_bytes()).collect();
    patch(&path, meta.header.l1_table_offset, &l1);
    patch(&path, meta.header.refcount_table_offset, &blocks);
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(15 << 40).unwrap();
    #[expect(clippy::disallowed_methods, reason = "a test measures")]
    let start = std::time::Instant::now();
    let meta = open(&path, Mode::Write).unwrap();
    let set = MetadataSet::new(&meta).unwrap();
    let took = start.elapsed();
    assert!(set.contains(100 + 32767) && set.contains(50_000 + 8191));
    assert_eq!(meta.l1.len(), 32768);
    // 50 ms is the promise for the release build.
    assert!(took.as_millis() < 200, "{took:?}");
    let held = (meta.l1.capacity() + meta.refcount_table.capacity() + 41_000) * 8;
    assert!(held < 2 << 20, "{held}");
}
