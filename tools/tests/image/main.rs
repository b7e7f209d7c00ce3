//! `polldisk image …`, run as users run it, with qemu-img as the judge.

mod bitmap;
mod check;
mod compare;
mod convert;
mod create;
mod edit;
mod features;
mod info;
mod map;
#[path = "../common/run.rs"]
mod run;
mod vhd;
mod volume;

use std::path::PathBuf;
use std::process::Command;

use run::Run;
use serde_json::Value;

/// A folder in which both programs run, so that both are given the same names.
struct Env {
    dir: tempfile::TempDir,
}

impl Run {
    /// Expects this exit code and this text on standard error.
    #[track_caller]
    fn fails(self, code: i32, text: &str) {
        assert!(self.code == code && self.err.contains(text), "{code} {text:?}: {self:?}");
    }

    #[track_caller]
    fn json(self) -> Value {
        serde_json::from_str(&self.out).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }
}

impl Env {
    /// `None` if there is no judge, which only a developer's machine may lack.
    fn new() -> Option<Env> {
        if Command::new("qemu-img").arg("--version").output().is_err() {
            assert!(std::env::var("CI").as_deref() != Ok("true"), "qemu-img is not installed");
            println!("skipped: qemu-img");
            return None;
        }
        Some(Env { dir: tempfile::tempdir().unwrap() })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn run(&self, program: &str, args: &[&str]) -> Run {
        Command::new(program).args(args).current_dir(self.dir.path()).output().unwrap().into()
    }

    /// `polldisk image …`, with the arguments separated by spaces.
    fn image(&self, args: &str) -> Run {
        let args: Vec<&str> = ["image"].into_iter().chain(args.split_whitespace()).collect();
        self.run(env!("CARGO_BIN_EXE_polldisk"), &args)
    }

    fn qemu_img(&self, args: &str) -> Run {
        self.run("qemu-img", &args.split_whitespace().collect::<Vec<_>>())
    }

    /// Writes to an image: the commands are separated by semicolons.
    #[track_caller]
    fn qemu_io(&self, name: &str, format: &str, commands: &str) {
        let mut args = vec!["-f", format, name];
        commands.split(';').for_each(|c| args.extend(["-c", c.trim()]));
        let run = self.run("qemu-io", &args);
        // It prints errors of commands and exits with 0 all the same.
        assert!(run.code == 0 && !run.out.contains("failed"), "{run:?}");
    }

    fn patch(&self, name: &str, offset: u64, bytes: &[u8]) {
        use std::os::unix::fs::FileExt;
        let file = std::fs::File::options().write(true).open(self.path(name)).unwrap();
        file.write_all_at(bytes, offset).unwrap();
    }

    /// Bytes of an image.
    fn peek(&self, name: &str, offset: u64, len: usize) -> Vec<u8> {
        use std::os::unix::fs::FileExt;
        let mut bytes = vec![0; len];
        std::fs::File::open(self.path(name)).unwrap().read_exact_at(&mut bytes, offset).unwrap();
        bytes
    }

    /// A big-endian word of an image.
    fn word(&self, name: &str, offset: u64) -> u64 {
        u64::from_be_bytes(self.peek(name, offset, 8).try_into().unwrap())
    }

    /// Offset of the L2 entry of guest cluster `n` below the first L1 entry.
    fn l2_entry(&self, name: &str, n: u64) -> u64 {
        let l1 = self.word(name, 40);
        (self.word(name, l1) & 0x00ff_ffff_ffff_fe00) + n * 8
    }

    /// The judge says that both hold the same.
    #[track_caller]
    fn same(&self, a: &str, a_format: &str, b: &str, b_format: &str) {
        let run = self.qemu_img(&format!("compare -f {a_format} -F {b_format} {a} {b}"));
        assert_eq!(run.code, 0, "{a} and {b}: {run:?}");
    }

    /// The judge finds neither corruption nor leaks.
    #[track_caller]
    fn clean(&self, name: &str) {
        let run = self.qemu_img(&format!("check -f qcow2 {name}"));
        assert_eq!(run.code, 0, "{name}: {run:?}");
    }

    /// Bytes that a guest sees.
    fn contents(&self, name: &str) -> Vec<u8> {
        self.qemu_img(&format!("convert -O raw {name} contents.raw")).ok();
        let bytes = std::fs::read(self.path("contents.raw")).unwrap();
        std::fs::remove_file(self.path("contents.raw")).unwrap();
        bytes
    }

    /// An image with data of all kinds over a chain of three: `top.qcow2` over `mid.qcow2` (larger)
    /// over `base.raw` (shorter, with holes).
    fn chain(&self) {
        self.qemu_img("create -q -f raw base.raw 3M").ok();
        self.qemu_io("base.raw", "raw", "write -P 1 0 100k; write -P 2 1M 1M; write -P 3 3071k 1k");
        self.qemu_img("create -q -f qcow2 -b base.raw -F raw -o cluster_size=4k mid.qcow2 16M")
            .ok();
        self.qemu_io(
            "mid.qcow2",
            "qcow2",
            "write -P 4 60k 50k; write -z 1100k 300k; write -P 5 10M 1M; write -P 6 15M 64k",
        );
        self.qemu_img("create -q -f qcow2 -b mid.qcow2 -F qcow2 top.qcow2 12M").ok();
        self.qemu_io(
            "top.qcow2",
            "qcow2",
            "write -P 7 0 1k; write -z 10M 128k; write -P 8 10496k 200k; write -c -P 9 5M 64k; \
             write -c -P 10 5184k 64k; write -P 11 11000k 1; discard 10560k 64k",
        );
    }
}
