//! `polldisk volume …`, run as users run it, on files; with LVM2's own tools as the judge where they
//! and loop devices are there.

mod crash;
mod errors;
mod judge;
#[path = "../common/run.rs"]
mod run;
mod signatures;

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use run::Run;
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;

/// A folder with devices, and a configuration of LVM by which this host is called `me`.
struct Env {
    dir: tempfile::TempDir,
}

impl Run {
    /// Expects this exit code and these texts on standard error.
    #[track_caller]
    fn fails(self, code: i32, texts: &[&str]) {
        for text in texts {
            assert!(self.code == code && self.err.contains(text), "{code} {text:?}: {self:?}");
        }
    }

    #[track_caller]
    fn json(self) -> Value {
        assert_eq!(self.code, 0, "{self:?}");
        serde_json::from_str(&self.out).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }
}

impl Env {
    fn new() -> Env {
        let env = Env { dir: tempfile::tempdir().unwrap() };
        env.called("me", "");
        env
    }

    /// The host that commands run on has this system ID, or one of this kind; LVM these settings.
    fn called(&self, id: &str, more: &str) {
        let text = match id {
            "none" | "machineid" => format!("global {{ system_id_source = \"{id}\" }}\n{more}"),
            _ => format!(
                "global {{ system_id_source = \"lvmlocal\" }}\nlocal {{ system_id = \"{id}\" }}\n{more}"
            ),
        };
        std::fs::write(self.path("lvm.conf"), text).unwrap();
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Makes a device of so many MiB.
    fn disk(&self, name: &str, size: u64) -> File {
        let mut options = File::options();
        options.read(true).write(true).create(true).truncate(true);
        let file = options.open(self.path(name)).unwrap();
        file.set_len(size * MIB).unwrap();
        file
    }

    fn command(&self, line: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_polldisk"));
        command.arg("volume").args(line.split_whitespace()).stdin(Stdio::null());
        command.current_dir(self.dir.path()).env("LVM_SYSTEM_DIR", self.dir.path());
        command
    }

    /// Runs `polldisk volume`.
    fn run(&self, line: &str) -> Run {
        self.command(line).output().unwrap().into()
    }

    /// Two devices `a` and `b` of 64 MiB with a group `vg`: 11 extents of 4 MiB on each.
    fn group() -> Env {
        let env = Env::new();
        env.disk("a", 64);
        env.disk("b", 64);
        env.run("create-group vg a b").ok();
        env
    }

    /// The devices `a` and `b`, to look into.
    fn disk_pair(&self) -> [File; 2] {
        let open = |name| File::options().read(true).write(true).open(self.path(name)).unwrap();
        ["a", "b"].map(open)
    }

    fn bytes(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.path(name)).unwrap()
    }
}

#[test]
fn a_group_lives() {
    let env = Env::new();
    env.disk("a", 64);
    env.disk("b", 64);
    let made = env
        .run("create-group vg a b --tag t1 --tag t2 --extent-size 1M --metadata-size 20M --json")
        .json();
    let group = &made["group"];
    assert_eq!(group["name"], "vg");
    assert_eq!(group["system-id"], "me");
    assert_eq!(group["ours"], true);
    assert_eq!(group["tags"], json!(["t1", "t2"]));
    assert_eq!(group["extent-size"], MIB);
    // 4 KiB, 20 MiB and the rest of a MiB are not extents.
    assert_eq!(group["size"], 2 * 43 * MIB);
    assert_eq!(group["free"], 2 * 43 * MIB);
    assert_eq!(made["devices"][1]["node"], "b");
    assert_eq!(made["volumes"], json!([]));

    let lin = env.run("create vg/lin --size 5M --tag x=1 --json a b").json();
    assert_eq!(
        (&lin["group"], &lin["name"], &lin["size"]),
        (&json!("vg"), &json!("lin"), &json!(5 * MIB))
    );
    assert_eq!((&lin["stripes"], &lin["tags"]), (&json!(1), &json!(["x=1"])));
    assert_eq!(lin["segments"][0]["areas"], json!([{ "node": "a", "offset": 21 * MIB }]));
    // In any order; what is no whole number of extents in each stripe is rounded up, and said.
    let run = env.run("create vg/str --size 4100k --stripes 2 --stripe-size 128k b a");
    assert!(
        run.err.contains("4198400 bytes are rounded up to 6291456, a multiple of 2 MiB"),
        "{run:?}"
    );
    assert_eq!(run.ok(), "Volume vg/str created: 6 MiB; 75 MiB are free in the group.\n");

    let run = env.run("extend vg/lin --size +1M a b --json").json();
    assert_eq!(
        run,
        json!({ "group": "vg", "name": "lin", "old-size": 5 * MIB, "size": 6 * MIB,
                "segments": 2, "free": 74 * MIB })
    );
    env.run("extend vg/str --size 10M a b").ok();
    let same = env.run("extend vg/str --size 10M a b").ok();
    assert_eq!(same, "Volume vg/str has 10 MiB already.\n");
    let renamed = env.run("rename vg/lin new --json a b").json();
    assert_eq!(renamed, json!({ "group": "vg", "old-name": "lin", "name": "new" }));

    let list = env.run("list --json a b").json();
    let names: Vec<&Value> =
        list["volumes"].as_array().unwrap().iter().map(|v| &v["name"]).collect();
    assert_eq!(names, ["new", "str"]);
    let str = &list["volumes"][1];
    assert_eq!((&str["stripes"], &str["stripe-size"]), (&json!(2), &json!(128 << 10)));
    assert_eq!((&str["read-only"], &str["visible"]), (&json!(false), &json!(true)));
    let people = env.run("list a b").ok();
    for text in
        ["volume group: vg", "belongs to: me, this host", "new: 6 MiB", "2 stripes of 128 KiB"]
    {
        assert!(people.contains(text), "{text}: {people}");
    }

    let check = env.run("check --json b a").json();
    assert_eq!((&check["sound"], &check["problems"]), (&json!(true), &json!([])));
    assert_eq!((&check["group"], &check["volumes"]), (&json!("vg"), &json!(2)));
    assert_eq!(check["devices"][0]["copies"][0]["seqno"], check["seqno"]);
    assert!(env.run("check a b").ok().starts_with("Volume group vg is sound: 2 volume(s)"));
    assert_eq!(env.run("check -q a b").ok(), "");
    let text = env.run("export-text a b").ok();
    for part in
        ["# Metadata of volume group vg", "contents = \"Text Format Volume Group\"", "\nvg {"]
    {
        assert!(text.contains(part), "{part}: {text}");
    }

    env.run("remove-group vg a b").fails(1, &["vg has 2 volumes: remove them first"]);
    env.run("remove vg/new a b").ok();
    env.run("remove vg/str a b").ok();
    let gone = env.run("remove-group vg --json b a").json();
    assert_eq!(gone, json!({ "group": "vg", "devices": ["a", "b"] }));
    env.run("list a b").fails(1, &["a: is in no volume group", "nothing that is known"]);
    env.run("create-group again a b").ok();
}

#[test]
fn a_new_volume_begins_empty_and_a_removed_one_is_discarded() {
    let env = Env::group();
    let made = env.run("create vg/v --size 8M a b --json").json();
    let at = made["segments"][0]["areas"][0]["offset"].as_u64().unwrap();
    let a = File::options().read(true).write(true).open(env.path("a")).unwrap();
    a.write_all_at(&vec![7; 8 << 20], at).unwrap();
    // A neighbour keeps what it has.
    let made = env.run("create vg/w --size 4M a b --json").json();
    let of_w = made["segments"][0]["areas"][0].clone();
    let w = File::options().read(true).write(true).open(env.path(of_w["node"].as_str().unwrap()));
    let (w, at_w) = (w.unwrap(), of_w["offset"].as_u64().unwrap());
    w.write_all_at(&vec![9; 4 << 20], at_w).unwrap();

    let gone = env.run("remove vg/v a b --json").json();
    assert_eq!(
        gone,
        json!({ "group": "vg", "name": "v", "discarded": 8 * MIB, "free": 18 * 4 * MIB + 3 * 4 * MIB })
    );
    let mut read = vec![1; 8 << 20];
    a.read_exact_at(&mut read, at).unwrap();
    assert!(read.iter().all(|&byte| byte == 0), "a file's discarded bytes are holes");
    let mut read = vec![1; 4 << 20];
    w.read_exact_at(&mut read, at_w).unwrap();
    assert!(read.iter().all(|&byte| byte == 9), "a volume that stays was discarded");

    a.write_all_at(&vec![7; 8 << 20], at).unwrap();
    let made = env.run("create vg/v2 --size 8M a b --json").json();
    let area = &made["segments"][0]["areas"][0];
    let device = File::open(env.path(area["node"].as_str().unwrap())).unwrap();
    let mut read = vec![1; MIB as usize];
    device.read_exact_at(&mut read, area["offset"].as_u64().unwrap()).unwrap();
    assert!(read.iter().all(|&byte| byte == 0), "nothing of what was there looks like an image");
}

#[test]
fn devices_are_any_nodes() {
    let env = Env::new();
    env.disk("a", 64);
    env.disk("b", 64);
    let nodes = "model:a?lba=4096 file:b";
    env.run(&format!("create-group vg {nodes}")).ok();
    env.run(&format!("create vg/v --size 24M --stripes 2 {nodes}")).ok();
    env.run(&format!("extend vg/v --size +8M {nodes}")).ok();
    env.run(&format!("check {nodes}")).ok();
    let both = env.disk_pair();
    both.iter().for_each(|file| file.write_all_at(&vec![7; 16 << 20], 17 * MIB).unwrap());
    // What a model wrote is in its file.
    let list = env.run("list --json a b").json();
    assert_eq!(list["volumes"][0]["size"], 32 * MIB);
    env.run(&format!("remove vg/v {nodes}")).ok();
    for file in both {
        let mut read = vec![1; 16 << 20];
        file.read_exact_at(&mut read, 17 * MIB).unwrap();
        assert!(read.iter().all(|&byte| byte == 0), "a drive discards, too");
    }
    env.run("list mem:64M").fails(2, &["memory holds no group"]);
    env.run("list vol:vg/v@a,b").fails(2, &["name the group's devices"]);
    env.run("list stripe:64k,a,b").fails(2, &["name its devices one by one"]);
}

/// A server, killed if a test fails.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _gone = self.0.kill();
        let _ended = self.0.wait();
    }
}

#[test]
fn a_drive_of_another_process_is_a_device() {
    let env = Env::new();
    env.disk("a", 64);
    let mut server = Command::new(env!("CARGO_BIN_EXE_polldisk"));
    server.args(["model", "--vfio-user", "s", "-f", "raw", "model:a?lba=4096&vwc=1"]);
    server.current_dir(env.dir.path()).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut server = Server(server.spawn().unwrap());
    let mut line = String::new();
    BufReader::new(server.0.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    env.run("create-group vg vfio-user:s/1").ok();
    env.run("create vg/v --size 8M vfio-user:s/1").ok();
    env.run("extend vg/v --size +4M vfio-user:s/1").ok();
    env.run("rename vg/v w vfio-user:s/1").ok();
    env.run("check vfio-user:s/1").ok();
    // The server has the file, so a group on it is in use.
    env.run("list a").fails(1, &["a: the image is in use by another process"]);
    let pid = server.0.id().to_string();
    assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
    assert!(server.0.wait().unwrap().success());
    let list = env.run("list --json a").json();
    assert_eq!(
        (&list["volumes"][0]["name"], &list["volumes"][0]["size"]),
        (&json!("w"), &json!(12 * MIB))
    );
    env.run("check a").ok();
}
