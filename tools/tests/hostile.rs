//! Images that are cut short, damaged, cyclic or absurd: every command ends soon, with exit code 1
//! (`compare` 2) and a message that names file, offset and field, in little memory.
//!
//! A program of its own, without other children, so that the largest of its children is one of
//! ours.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::{Command, Output};

/// What the process may take at most, whatever an image claims.
const MEMORY_KIB: i64 = 256 << 10;

struct Env {
    dir: tempfile::TempDir,
}

impl Env {
    /// With a good image: `good.qcow2`, 8 MiB with data in the first 2 MiB, some of it compressed.
    fn new() -> Env {
        let env = Env { dir: tempfile::tempdir().unwrap() };
        let mut bytes = vec![0u8; 8 << 20];
        for (i, b) in bytes[..2 << 20].iter_mut().enumerate() {
            *b = ((i / 3) ^ (i >> 8)) as u8;
        }
        std::fs::write(env.path("good.raw"), &bytes).unwrap();
        for (options, name) in [("-c", "packed.qcow2"), ("-q", "good.qcow2")] {
            let run = env.image(&["convert", options, "-f", "raw", "good.raw", name]);
            assert!(run.status.success(), "{run:?}");
        }
        env
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Runs `polldisk image …`; kills it when it takes too long.
    fn image(&self, args: &[&str]) -> Output {
        let mut child = Command::new("timeout")
            .args(["--signal=KILL", "60", env!("CARGO_BIN_EXE_polldisk"), "image"])
            .args(args)
            .current_dir(self.dir.path())
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        // Output may be long: it is not kept.
        let mut out = child.stdout.take().unwrap();
        let reader = std::thread::spawn(move || std::io::copy(&mut out, &mut std::io::sink()));
        let output = child.wait_with_output().unwrap();
        reader.join().unwrap().unwrap();
        output
    }

    /// A copy of the good image with some bytes replaced.
    fn patched(&self, name: &str, patches: &[(u64, &[u8])]) {
        self.patched_from("good.qcow2", name, patches);
    }

    fn patched_from(&self, from: &str, name: &str, patches: &[(u64, &[u8])]) {
        std::fs::copy(self.path(from), self.path(name)).unwrap();
        let file = File::options().write(true).open(self.path(name)).unwrap();
        for (offset, bytes) in patches {
            file.write_all_at(bytes, *offset).unwrap();
        }
    }

    fn word(&self, name: &str, offset: u64) -> u64 {
        let mut bytes = [0; 8];
        File::open(self.path(name)).unwrap().read_exact_at(&mut bytes, offset).unwrap();
        u64::from_be_bytes(bytes)
    }

    /// Runs every command that reads an image, and expects the message.
    #[track_caller]
    fn refused(&self, name: &str, message: &str) {
        self.failing(&["map", name], 1, name, message);
        self.failing(&["convert", name, "out.qcow2"], 1, name, message);
        self.failing(&["convert", "-O", "raw", name, "out.raw"], 1, name, message);
        self.failing(&["compare", name, "good.qcow2"], 2, name, message);
        self.failing(&["compare", "good.qcow2", name], 2, name, message);
        assert!(!self.path("out.qcow2").exists() && !self.path("out.raw").exists());
    }

    /// Also `info` and `check`.
    #[track_caller]
    fn refused_by_all(&self, name: &str, message: &str) {
        self.failing(&["info", "-f", "qcow2", name], 1, name, message);
        self.failing(&["check", name], 1, name, message);
        self.refused(name, message);
    }

    #[track_caller]
    fn failing(&self, args: &[&str], code: i32, name: &str, message: &str) {
        let run = self.image(args);
        let err = String::from_utf8_lossy(&run.stderr);
        let right = run.status.code() == Some(code) && err.contains(name) && err.contains(message);
        assert!(right, "{args:?}: {:?}, want {code} and {message:?}: {err}", run.status);
    }

    /// Whatever it says, it ends in order.
    #[track_caller]
    fn ends(&self, args: &[&str]) -> i32 {
        let run = self.image(args);
        let code = run.status.code();
        assert!(matches!(code, Some(0..=3 | 63)), "{args:?}: {run:?}");
        code.unwrap_or(-1)
    }
}

impl Drop for Env {
    fn drop(&mut self) {
        use nix::sys::resource::{UsageWho, getrusage};
        let most = getrusage(UsageWho::RUSAGE_CHILDREN).unwrap().max_rss();
        if !std::thread::panicking() {
            assert!(most < MEMORY_KIB, "a command took {most} KiB");
        }
    }
}

#[test]
fn headers() {
    let env = Env::new();
    let cases: [(&str, u64, &[u8], &str); 22] = [
        ("magic", 0, b"QFI\0", "header field magic at offset 0 is 0x51464900"),
        ("version", 4, &[0, 0, 0, 9], "header field version at offset 4 is 9"),
        ("small", 20, &[0, 0, 0, 8], "header field cluster_bits at offset 20 is 8"),
        ("large", 20, &[0, 0, 0, 63], "header field cluster_bits at offset 20 is 63"),
        ("size", 24, &[0xff; 8], "header field size at offset 24"),
        ("disk", 24, &[0, 0, 0x80, 0, 0, 0, 0, 0], "header field l1_size at offset 36 is 1"),
        ("crypt", 32, &[0, 0, 0, 9], "header field crypt_method at offset 32 is 9"),
        ("l1size", 36, &[0xff; 4], "header field l1_size at offset 36 is 4294967295"),
        ("l1zero", 36, &[0; 4], "header field l1_size at offset 36 is 0"),
        ("l1odd", 40, &[0, 0, 0, 0, 0, 1, 0, 1], "header field l1_table_offset at offset 40"),
        ("l1far", 40, &[0x7f, 0, 0, 0, 0, 1, 0, 0], "header field l1_table_offset at offset 40"),
        ("l1end", 40, &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0], "l1_table_offset at offset 40"),
        ("backing", 8, &[0, 0, 0, 0, 1, 0, 0, 0], "header field backing_file_offset at offset 8"),
        (
            "name",
            8,
            &[0, 0, 0, 0, 0, 0, 1, 0, 0xff, 0xff, 0xff, 0xff],
            "backing_file_size at offset 16",
        ),
        ("length", 100, &[0xff; 4], "header field header_length at offset 100"),
        ("odd", 100, &[0, 0, 0, 105], "header field header_length at offset 100 is 105"),
        ("order", 96, &[0, 0, 0, 7], "header field refcount_order at offset 96 is 7"),
        ("snaps", 60, &[0xff; 4], "header field nb_snapshots at offset 60"),
        ("zstd", 104, &[1], "header field compression_type at offset 104 is 1"),
        ("rtsize", 56, &[0xff; 4], "header field refcount_table_clusters at offset 56"),
        ("ext", 112, &[0, 0, 0, 1, 0xff, 0xff, 0xff, 0xff], "header extension"),
        ("ext2", 112, &[0x68, 3, 0xf8, 0x57, 0, 1, 0, 0], "header extension"),
    ];
    for (name, offset, bytes, message) in cases {
        let name = format!("{name}.qcow2");
        env.patched(&name, &[(offset, bytes)]);
        env.refused_by_all(&name, message);
        let drive = format!("model:{name}?size=1G");
        let code = env.ends(&["map", &drive]);
        // A drive is larger than the file that it keeps its blocks in.
        assert!(code == 1 || name == "l1far.qcow2", "{drive}");
    }
}

#[test]
fn features_that_are_not_supported_are_named() {
    let env = Env::new();
    let cases: [(&str, u64, &[u8], &str); 3] = [
        ("unknown", 72, &[0x80, 0, 0, 0, 0, 0, 0, 0], "unknown incompatible features no. 63"),
        ("aes", 35, &[1], "AES encryption is not supported"),
        ("luks", 35, &[2], "LUKS encryption is not supported"),
    ];
    for (name, offset, bytes, message) in cases {
        let name = format!("{name}.qcow2");
        env.patched(&name, &[(offset, bytes)]);
        env.refused(&name, message);
        env.failing(&["info", "-f", "qcow2", &name], 1, &name, message);
        env.failing(&["check", &name], 63, &name, message);
    }
    env.patched("data.qcow2", &[(79, &[4])]);
    env.refused("data.qcow2", "has an external data file, but does not name it");
}

#[test]
fn cut_short() {
    let env = Env::new();
    let len = std::fs::metadata(env.path("good.qcow2")).unwrap().len();
    for (at, message) in [
        (0, "too short for a QCOW2 header"),
        (3, "too short for a QCOW2 header"),
        (71, "too short for a QCOW2 header"),
        (103, "too short for a QCOW2 header"),
        (200, ""),
        (65536, "l1_table_offset at offset 40"),
        (65537, "offset"),
        (len / 2, "must end inside the file"),
        (len - 65536, "must end inside the file"),
    ] {
        std::fs::copy(env.path("good.qcow2"), env.path("cut.qcow2")).unwrap();
        let file = File::options().write(true).open(env.path("cut.qcow2")).unwrap();
        file.set_len(at).unwrap();
        drop(file);
        if at <= 103 {
            env.refused_by_all("cut.qcow2", message);
        } else {
            env.refused("cut.qcow2", message);
            assert_ne!(env.ends(&["check", "cut.qcow2"]), 0, "{at}");
        }
        // Repairing may fail, but not crash, and must not make it worse than unreadable.
        env.ends(&["check", "-r", "all", "cut.qcow2"]);
    }
}

#[test]
fn tables() {
    let env = Env::new();
    let l1 = env.word("good.qcow2", 40);
    let l2 = env.word("good.qcow2", l1) & 0x00ff_ffff_ffff_fe00;
    let cases: [(&str, u64, &[u8], &str); 6] = [
        ("l1bits", l1, &[0x81], &format!("L1 entry at offset {l1}")),
        ("l1odd", l1 + 6, &[2], &format!("L1 entry at offset {l1}")),
        ("l1far", l1, &[0x80, 0x7f], "L2 table at offset"),
        ("l2bits", l2 + 7, &[0x10], &format!("L2 entry at offset {l2}")),
        ("l2odd", l2 + 6, &[2], &format!("L2 entry at offset {l2}")),
        ("l2far", l2 + 8, &[0x80, 0x40], "data cluster at offset"),
    ];
    for (name, offset, bytes, message) in cases {
        let name = format!("{name}.qcow2");
        env.patched(&name, &[(offset, bytes)]);
        env.refused(&name, message);
        let code = env.ends(&["check", &name]);
        assert!(matches!(code, 1 | 2), "{name}: check says {code}");
        env.ends(&["check", "-r", "all", &name]);
        // It is a disk to look at all the same.
        assert_eq!(env.ends(&["info", "-f", "qcow2", &name]), 0);
    }
    // An L2 table that is the L1 table itself, or the header.
    for (name, to) in [("self", l1), ("head", 0x200)] {
        let name = format!("{name}.qcow2");
        env.patched(&name, &[(l1, &(to | 1 << 63).to_be_bytes())]);
        env.ends(&["map", &name]);
        assert_eq!(env.ends(&["check", &name]), 2);
        env.ends(&["check", "-r", "all", &name]);
    }
}

#[test]
fn compressed_clusters() {
    let env = Env::new();
    let l1 = env.word("packed.qcow2", 40);
    let l2 = env.word("packed.qcow2", l1) & 0x00ff_ffff_ffff_fe00;
    let host = env.word("packed.qcow2", l2) & ((1 << 54) - 1);
    let damaged = ["compressed cluster at offset", "is damaged"];
    env.patched_from("packed.qcow2", "bad.qcow2", &[(host, &[0xff; 64])]);
    for args in [&["convert", "bad.qcow2", "out"][..], &["compare", "bad.qcow2", "good.qcow2"]] {
        let code = if args[0] == "compare" { 2 } else { 1 };
        damaged.iter().for_each(|m| env.failing(args, code, "bad.qcow2", m));
    }
    // A length that is too short, one that is longer than the file, a place past its end.
    for (entry, code) in [
        (1u64 << 62 | host, Some(1)),
        (1 << 62 | 0xff << 54 | host, None),
        (1 << 62 | 0x3f_ffff_ffff_ffff, Some(1)),
    ] {
        env.patched_from("packed.qcow2", "bad.qcow2", &[(l2, &entry.to_be_bytes())]);
        let got = env.ends(&["convert", "bad.qcow2", "out"]);
        assert!(code.is_none_or(|c| c == got), "{entry:#x}: {got}");
        env.ends(&["map", "bad.qcow2"]);
        env.ends(&["check", "-r", "all", "bad.qcow2"]);
    }
}

/// The header of an image of 8 MiB with this backing file.
fn overlay(env: &Env, name: &str, backing: &[u8], format: Option<&str>) {
    let run = env.image(&["create", "-q", name, "8M"]);
    assert!(run.status.success());
    let mut bytes = Vec::new();
    if let Some(f) = format {
        bytes.extend_from_slice(&0xe279_2acau32.to_be_bytes());
        bytes.extend_from_slice(&(f.len() as u32).to_be_bytes());
        bytes.extend_from_slice(f.as_bytes());
        bytes.resize(bytes.len().next_multiple_of(8), 0);
    }
    bytes.extend_from_slice(&[0; 8]);
    let at = 112 + bytes.len() as u64;
    bytes.extend_from_slice(backing);
    let file = File::options().write(true).open(env.path(name)).unwrap();
    file.write_all_at(&bytes, 112).unwrap();
    file.write_all_at(&at.to_be_bytes(), 8).unwrap();
    file.write_all_at(&(backing.len() as u32).to_be_bytes(), 16).unwrap();
}

#[test]
fn backing_files() {
    let env = Env::new();
    std::fs::create_dir(env.path("folder")).unwrap();
    nix::unistd::mkfifo(&env.path("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let cases: [(&[u8], Option<&str>, &str); 12] = [
        (b"missing", Some("qcow2"), "backing file \"missing\" cannot be opened"),
        (b"good.qcow2", None, "has no format stated in the image"),
        (b"good.qcow2", Some("vmdk"), "has format \"vmdk\""),
        (b"folder", Some("raw"), "is a directory"),
        (b"fifo", Some("raw"), "is a named pipe"),
        (b"/dev/zero", Some("raw"), "is a character device"),
        (b"json:{\"driver\":\"file\"}", Some("raw"), "starts with \"json:\""),
        (b"nbd://host/x", Some("raw"), "starts with \"nbd:\""),
        (b"nbd:unix:/x", Some("raw"), "starts with \"nbd:\""),
        (b"a\0b", Some("raw"), "contains a NUL byte"),
        (b"\xff\xfe", Some("raw"), "is not UTF-8"),
        (b"backing.qcow2", Some("qcow2"), "backing chain is a cycle"),
    ];
    for (backing, format, message) in cases {
        overlay(&env, "backing.qcow2", backing, format);
        env.refused("backing.qcow2", message);
        // The image by itself can be looked at.
        assert_eq!(env.ends(&["info", "-f", "qcow2", "backing.qcow2"]), 0);
        assert_eq!(env.ends(&["check", "backing.qcow2"]), 0);
    }
    overlay(&env, "backing.qcow2", b"good.raw", Some("qcow2"));
    env.failing(&["map", "backing.qcow2"], 1, "good.raw", "header field magic at offset 0");
    overlay(&env, "backing.qcow2", b"/etc/passwd", Some("raw"));
    let dir = env.dir.path().display().to_string();
    let args = ["map", "--allow-backing", &dir, "backing.qcow2"];
    env.failing(&args, 1, "backing.qcow2", "outside of the directories that --allow-backing names");
    // What the user says counts where the image says nothing.
    overlay(&env, "backing.qcow2", b"good.raw", None);
    assert_eq!(env.ends(&["map", "--backing-format", "raw", "backing.qcow2"]), 0);
}

#[test]
fn chains() {
    let env = Env::new();
    // Cycles of two and three, also by a link.
    overlay(&env, "a.qcow2", b"b.qcow2", Some("qcow2"));
    overlay(&env, "b.qcow2", b"a.qcow2", Some("qcow2"));
    env.refused("a.qcow2", "backing chain is a cycle");
    std::os::unix::fs::symlink("c.qcow2", env.path("link")).unwrap();
    overlay(&env, "c.qcow2", b"d.qcow2", Some("qcow2"));
    overlay(&env, "d.qcow2", b"link", Some("qcow2"));
    env.refused("c.qcow2", "backing chain is a cycle");
    // Too deep.
    for i in 0..210 {
        overlay(&env, &format!("n{i}"), format!("n{}", i + 1).as_bytes(), Some("qcow2"));
    }
    let args = ["map", "n0"];
    env.failing(&args, 1, "n199", "backing chain has more than 200 layers");
}

/// An image of `len` bytes in a sparse file, all else by hand: (offset, bytes).
fn sparse(env: &Env, name: &str, len: u64, parts: &[(u64, &[u8])]) {
    let file = File::create(env.path(name)).unwrap();
    file.set_len(len).unwrap();
    for (offset, bytes) in parts {
        file.write_all_at(bytes, *offset).unwrap();
    }
}

/// Fields of a header.
#[derive(Clone, Copy, Default)]
struct Fields {
    cluster_bits: u32,
    size: u64,
    l1_size: u32,
    l1: u64,
    refcount_table: u64,
    refcount_clusters: u32,
    snapshots: u32,
    snapshots_at: u64,
}

impl Fields {
    fn header(&self) -> Vec<u8> {
        let mut h = Vec::new();
        h.extend_from_slice(b"QFI\xfb\0\0\0\x03");
        h.extend_from_slice(&[0; 12]);
        h.extend_from_slice(&self.cluster_bits.to_be_bytes());
        h.extend_from_slice(&self.size.to_be_bytes());
        h.extend_from_slice(&[0; 4]);
        h.extend_from_slice(&self.l1_size.to_be_bytes());
        h.extend_from_slice(&self.l1.to_be_bytes());
        h.extend_from_slice(&self.refcount_table.to_be_bytes());
        h.extend_from_slice(&self.refcount_clusters.to_be_bytes());
        h.extend_from_slice(&self.snapshots.to_be_bytes());
        h.extend_from_slice(&self.snapshots_at.to_be_bytes());
        h.extend_from_slice(&[0; 24]);
        h.extend_from_slice(&4u32.to_be_bytes());
        h.extend_from_slice(&104u32.to_be_bytes());
        h
    }
}

const MIB: u64 = 1 << 20;

/// The largest tables that the format allows, in files that take no space.
#[test]
fn absurd_sizes() {
    let env = Env::new();
    let fields = Fields {
        cluster_bits: 16,
        size: 4 << 49,
        l1_size: 4 << 20,
        l1: 65536,
        refcount_table: 65536 + 32 * MIB,
        refcount_clusters: 128,
        ..Fields::default()
    };
    let len = 41 * MIB;
    sparse(&env, "empty.qcow2", len, &[(0, &fields.header())]);
    for args in [
        &["info", "-f", "qcow2", "empty.qcow2"][..],
        &["map", "empty.qcow2"],
        &["check", "empty.qcow2"],
        &["check", "-r", "all", "empty.qcow2"],
        &["convert", "empty.qcow2", "out.qcow2"],
        &["compare", "empty.qcow2", "empty.qcow2"],
    ] {
        let code = env.ends(args);
        assert!(code == 0 || args[0] == "check" || args[0] == "compare", "{args:?}: {code}");
    }
    // A chain of such.
    for i in 0..12 {
        let name = format!("n{i}");
        let mut header = fields.header();
        header.extend_from_slice(&0xe279_2acau32.to_be_bytes());
        header.extend_from_slice(&[0, 0, 0, 5]);
        header.extend_from_slice(b"qcow2\0\0\0\0\0\0\0\0\0\0\0");
        let at = header.len() as u64;
        let next = format!("n{}", i + 1);
        header.extend_from_slice(next.as_bytes());
        header[8..16].copy_from_slice(&at.to_be_bytes());
        header[16..20].copy_from_slice(&(next.len() as u32).to_be_bytes());
        sparse(&env, &name, len, &[(0, &header)]);
    }
    env.failing(&["map", "n0"], 1, "n2", "the L1 tables of the backing chain up to here have");
    env.failing(&["compare", "n0", "n0"], 2, "n2", "the L1 tables of the backing chain");
    // A disk of 2 EiB whose every table is the same: a map without end, of which a part is wanted.
    let fields = Fields {
        cluster_bits: 21,
        size: 4 << 59,
        l1: 2 * MIB,
        refcount_table: 64 * MIB,
        refcount_clusters: 1,
        ..fields
    };
    let l1: Vec<u8> = (0..4u64 << 20).flat_map(|_| (66 * MIB).to_be_bytes()).collect();
    let l2: Vec<u8> =
        (0..1u64 << 18).flat_map(|i| (68 * MIB + (i % 2) * 2 * MIB).to_be_bytes()).collect();
    sparse(&env, "loop.qcow2", 72 * MIB, &[(0, &fields.header()), (2 * MIB, &l1), (66 * MIB, &l2)]);
    assert_eq!(env.ends(&["info", "-f", "qcow2", "loop.qcow2"]), 0);
    assert_eq!(env.ends(&["map", "--json", "-l", "4T", "loop.qcow2"]), 0);
    assert_eq!(env.ends(&["check", "loop.qcow2"]), 2);
    env.ends(&["check", "-r", "all", "loop.qcow2"]);
}

#[test]
fn snapshots_and_bitmaps() {
    let env = Env::new();
    let entry = |l1: u64, l1_size: u32, id: usize, name: usize| {
        let mut e = Vec::new();
        e.extend_from_slice(&l1.to_be_bytes());
        e.extend_from_slice(&l1_size.to_be_bytes());
        e.extend_from_slice(&(id as u16).to_be_bytes());
        e.extend_from_slice(&(name as u16).to_be_bytes());
        e.extend_from_slice(&[0; 24]);
        e.resize(e.len() + id + name, 0xff);
        e.resize(e.len().next_multiple_of(8), 0);
        e
    };
    // Names of 64 MiB in all, not UTF-8: each byte becomes three.
    let one = entry(0, 0, 60000, 60000);
    let count = (64 * MIB) as usize / one.len();
    let fields = Fields {
        cluster_bits: 16,
        size: 8 * MIB,
        l1_size: 4 << 20,
        l1: MIB,
        refcount_table: 64 * MIB,
        refcount_clusters: 128,
        snapshots: count as u32,
        snapshots_at: 128 * MIB,
    };
    let table = one.repeat(count);
    let len = 200 * MIB;
    sparse(&env, "names.qcow2", len, &[(0, &fields.header()), (128 * MIB, &table)]);
    drop(table);
    assert_eq!(env.ends(&["info", "--json", "-f", "qcow2", "names.qcow2"]), 0);
    assert_eq!(env.ends(&["info", "-f", "qcow2", "names.qcow2"]), 0);
    assert_ne!(env.ends(&["check", "names.qcow2"]), 0);
    // A table that is longer than it may be, or than the file.
    let fields = Fields { snapshots: 60000, ..fields };
    sparse(&env, "long.qcow2", len, &[(0, &fields.header()), (128 * MIB, &entry(0, 0, 60000, 9))]);
    env.ends(&["info", "-f", "qcow2", "long.qcow2"]);
    let last = entry(0, 0, 60000, 60000);
    let fields = Fields { snapshots: 1, snapshots_at: len - 65536, ..fields };
    sparse(&env, "over.qcow2", len, &[(0, &fields.header()), (len - 65536, &last[..40])]);
    let message = "length of the snapshot table entry at offset";
    env.failing(&["info", "-f", "qcow2", "over.qcow2"], 1, "over.qcow2", message);
    // 65536 snapshots with one L1 table of 32 MiB.
    let fields = Fields { snapshots: 65536, snapshots_at: 128 * MIB, ..fields };
    let table = entry(MIB, 4 << 20, 1, 1).repeat(65536);
    sparse(&env, "many.qcow2", len, &[(0, &fields.header()), (128 * MIB, &table)]);
    assert_ne!(env.ends(&["check", "many.qcow2"]), 0);
    env.ends(&["check", "-r", "all", "many.qcow2"]);
    // A bitmap directory that claims to be large.
    for (size, count) in [(u64::MAX, 1u32), (1 << 30, 1), (4096, u32::MAX), (24, 1)] {
        let mut header = Fields { snapshots: 0, snapshots_at: 0, ..fields }.header();
        header[95] = 1;
        header.extend_from_slice(&[0x23, 0x85, 0x28, 0x75, 0, 0, 0, 24]);
        header.extend_from_slice(&count.to_be_bytes());
        header.extend_from_slice(&[0; 4]);
        header.extend_from_slice(&size.to_be_bytes());
        header.extend_from_slice(&(2u64 << 20).to_be_bytes());
        let directory = [0xff; 4096];
        sparse(&env, "bits.qcow2", len, &[(0, &header), (2 * MIB, &directory)]);
        env.failing(&["info", "-f", "qcow2", "bits.qcow2"], 1, "bits.qcow2", "bitmap");
        env.ends(&["check", "bits.qcow2"]);
    }
}

/// Bytes at random places: no command ends by a signal, none takes long.
#[test]
fn random_damage() {
    let env = Env::new();
    let mut x = 7u64;
    let mut random = |n: u64| {
        x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (x >> 33) % n
    };
    for i in 0..40 {
        let from = if i % 2 == 0 { "good.qcow2" } else { "packed.qcow2" };
        let l1 = env.word(from, 40);
        let l2 = env.word(from, l1) & 0x00ff_ffff_ffff_fe00;
        let refcounts = env.word(from, 48);
        let mut patches = Vec::new();
        for _ in 0..1 + random(4) {
            let base = [0, l1, l2, refcounts, env.word(from, refcounts)][random(5) as usize];
            patches.push((base + random(if base == 0 { 112 } else { 256 }), [random(256) as u8]));
        }
        let patches: Vec<(u64, &[u8])> = patches.iter().map(|(o, b)| (*o, &b[..])).collect();
        env.patched_from(from, "bad.qcow2", &patches);
        env.ends(&["info", "-f", "qcow2", "bad.qcow2"]);
        env.ends(&["map", "bad.qcow2"]);
        env.ends(&["convert", "bad.qcow2", "out.qcow2"]);
        env.ends(&["check", "-r", "all", "bad.qcow2"]);
        let again = env.ends(&["check", "bad.qcow2"]);
        let read = env.ends(&["convert", "bad.qcow2", "out.qcow2"]);
        // Whether compressed data can be unpacked is no matter of the tables.
        let sound = again != 0 || read == 0 || from == "packed.qcow2";
        assert!(sound, "patches {patches:?}: clean, but cannot be read");
    }
}
