//! VHD images: made and read, with qemu-img as the judge where it can do it. Chains of them it
//! refuses, so those come from a writer that shares nothing with the reader.

#[path = "../../../qcow/vhd/tests/chains/writer.rs"]
mod writer;

use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::json;

use super::*;
use writer::{File, expected};

const MIB: u64 = 1 << 20;

/// A raw disk with data here and there; its size is no whole number of cylinders.
fn disk(env: &Env) -> Vec<u8> {
    let mut bytes = vec![0; (37 * MIB) as usize];
    for i in 0..200usize {
        let at = (i * i * 977 % bytes.len()) & !511;
        bytes[at..at + 512].fill(i as u8 + 1);
    }
    std::fs::write(env.path("disk.raw"), &bytes).unwrap();
    bytes
}

#[test]
fn both_programs_agree_on_what_is_converted() {
    let Some(env) = Env::new() else { return };
    disk(&env);
    for subformat in ["dynamic", "fixed"] {
        for force in ["on", "off"] {
            let options = format!("subformat={subformat},force_size={force}");
            let ours = format!("ours-{subformat}-{force}.vhd");
            let theirs = format!("theirs-{subformat}-{force}.vhd");
            env.image(&format!("convert -f raw -O vhd -o {options} disk.raw {ours}")).ok();
            env.qemu_img(&format!("convert -f raw -O vpc -o {options} disk.raw {theirs}")).ok();
            let size = |name: &str| {
                let info = env.qemu_img(&format!("info -f vpc --output=json {name}")).json();
                let own = env.image(&format!("info -f vhd --json {name}")).json();
                assert_eq!(info["virtual-size"], own["virtual-size"], "{name}");
                assert_eq!(info["cluster-size"], own["cluster-size"], "{name}");
                assert_eq!(own["format-specific"]["data"]["subformat"], *subformat);
                own["virtual-size"].as_u64().unwrap()
            };
            assert_eq!(size(&ours), size(&theirs));
            assert_eq!(size(&ours) == 37 * MIB, force == "on");
            for name in [&ours, &theirs] {
                env.image(&format!("check -f vpc {name}")).ok();
                env.image(&format!("compare -f vhd -F raw {name} disk.raw")).ok();
                env.qemu_img(&format!("compare -f vpc -F raw {name} disk.raw")).ok();
                env.image(&format!("convert -f vhd -O qcow2 {name} back.qcow2")).ok();
                env.qemu_img("compare -f qcow2 -F raw back.qcow2 disk.raw").ok();
            }
        }
    }
    // Whoever believes the geometry alone is told a size that the disk has: vhd-util's check.
    let footer = std::fs::read(env.path("ours-fixed-on.vhd")).unwrap();
    let footer = &footer[footer.len() - 512..];
    assert_eq!(&footer[28..32], b"qem2");
    // 37 MiB are 75776 sectors: 891 whole cylinders of five heads, 17 sectors to a track.
    assert_eq!(&footer[56..60], &[3, 123, 5, 17]);
    // Whole blocks agree with qemu-img's map where it has them all written.
    let map = |run: Run| run.json().as_array().unwrap().len();
    let name = "theirs-dynamic-on.vhd";
    assert!(map(env.image(&format!("map -f vhd --json {name}"))) >= 19);
}

#[test]
fn an_empty_image_is_made() {
    let Some(env) = Env::new() else { return };
    let made = env.image("create -f vhd --json e.vhd 10G").json();
    assert_eq!(made, json!({"filename": "e.vhd", "format": "vhd", "virtual-size": 10u64 << 30}));
    let info = env.qemu_img("info -f vpc --output=json e.vhd").json();
    assert_eq!(info["virtual-size"], 10u64 << 30);
    assert!(env.path("e.vhd").metadata().unwrap().len() < 64 << 10);
    let taken = env.image("info e.vhd --json");
    assert!(taken.err.contains("taken for vhd"), "{taken:?}");
    assert_eq!(taken.json()["format"], "vhd");
    // Written by the other one, then read.
    let wrote = env.run("qemu-io", &["-f", "vpc", "-c", "write -P 7 5G 64k", "e.vhd"]);
    wrote.ok();
    env.image("convert -f vhd -O raw e.vhd e.raw").ok();
    env.qemu_img("compare -f vpc -F raw e.vhd e.raw").ok();
}

/// Three files named as vhd-util does it, over a raw disk, and what they show.
fn chain(env: &Env) -> Vec<u8> {
    let (a, b, c) = (b"identity-number0", b"identity-number1", b"identity-number2");
    let raw: Vec<u8> = (0..3 * MIB).map(|i| (i / 512) as u8).collect();
    let base = File::child(4 * MIB, a, &[0; 16], "disk.raw").with([(1, 1), (100, 2)]);
    let mid = File { hidden: true, ..File::child(4 * MIB, b, a, "base.vhd") }
        .with((4096..8192).map(|s| (s, 3)));
    let top = File::child(6 * MIB, c, b, "mid.vhd").with([(1, 4), (4097, 5), (12000, 6)]);
    std::fs::write(env.path("disk.raw"), &raw).unwrap();
    for (name, file) in [("base.vhd", &base), ("mid.vhd", &mid), ("top.vhd", &top)] {
        std::fs::write(env.path(name), file.bytes()).unwrap();
    }
    let disk = expected(&[&top, &mid, &base], &raw);
    std::fs::write(env.path("expected.raw"), &disk).unwrap();
    disk
}

#[test]
fn a_chain_is_read() {
    let Some(env) = Env::new() else { return };
    chain(&env);
    env.image("compare -f vhd -F raw top.vhd expected.raw").ok();
    env.image("convert -f vhd -O qcow2 top.vhd flat.qcow2").ok();
    env.qemu_img("compare -f qcow2 -F raw flat.qcow2 expected.raw").ok();
    env.image("convert -f vhd -O vhd top.vhd flat.vhd").ok();
    env.qemu_img("compare -f vpc -F raw flat.vhd expected.raw").ok();
    let all = env.image("info -f vhd --backing-chain --json top.vhd").json();
    let files: Vec<_> = all.as_array().unwrap().iter().map(|i| i["format"].clone()).collect();
    assert_eq!(files, ["vhd", "vhd", "vhd", "raw"]);
    assert_eq!(all[1]["format-specific"]["data"]["hidden"], true);
    assert_eq!(all[0]["backing-filename"], "./mid.vhd");
    let map = env.image("map -f vhd --json top.vhd").json();
    let depths: std::collections::BTreeSet<u64> =
        map.as_array().unwrap().iter().map(|e| e["depth"].as_u64().unwrap()).collect();
    assert_eq!(depths.into_iter().collect::<Vec<_>>(), [0, 1, 2, 3]);
    for name in ["base.vhd", "mid.vhd", "top.vhd"] {
        env.image(&format!("check -f vhd {name}")).ok();
    }
    // Only top: its parents need not be there.
    std::fs::remove_file(env.path("mid.vhd")).unwrap();
    env.image("info -f vhd top.vhd").ok();
    env.image("compare -f vhd -F raw top.vhd expected.raw").fails(2, "its parent is not there");
}

#[test]
fn parents_are_opened_by_the_rules_for_backing_files() {
    let Some(env) = Env::new() else { return };
    chain(&env);
    let dir = env.dir.path().display().to_string();
    std::fs::create_dir(env.path("other")).unwrap();
    env.image(&format!("compare -f vhd -F raw --allow-backing {dir} top.vhd expected.raw")).ok();
    env.image("compare -f vhd -F raw --allow-backing other top.vhd expected.raw")
        .fails(2, "outside of the directories");
    // Another disk in the parent's place, a device, a pipe.
    let wrong = File { uuid: *b"identity-number9", ..File::dynamic(4 * MIB) };
    std::fs::write(env.path("mid.vhd"), wrong.bytes()).unwrap();
    env.image("compare -f vhd -F raw top.vhd expected.raw").fails(2, "its parent is the disk");
    std::fs::remove_file(env.path("mid.vhd")).unwrap();
    std::os::unix::fs::symlink("/dev/zero", env.path("mid.vhd")).unwrap();
    env.image("compare -f vhd -F raw top.vhd expected.raw").fails(2, "a character device");
    std::fs::remove_file(env.path("mid.vhd")).unwrap();
    std::os::unix::fs::symlink("top.vhd", env.path("mid.vhd")).unwrap();
    env.image("compare -f vhd -F raw top.vhd expected.raw").fails(2, "is a cycle");
}

/// Virtual PC counts cylinders. tapdisk, and whoever made a child, count all of the disk.
#[test]
fn what_a_geometry_leaves_out_is_said_and_seen_by_children() {
    let Some(env) = Env::new() else { return };
    let (a, b) = (b"identity-number0", b"identity-number1");
    let base = File {
        uuid: *a,
        creator: *b"vpc ",
        geometry: [1, 44, 4, 17],
        batmap: false,
        ..File::dynamic(10 * MIB)
    }
    .with([(5, 1), (20399, 2), (20400, 3), (20479, 4)]);
    let top = File::child(10 * MIB, b, a, "base.vhd").with([(6, 5)]);
    std::fs::write(env.path("base.vhd"), base.bytes()).unwrap();
    std::fs::write(env.path("top.vhd"), top.bytes()).unwrap();
    std::fs::write(env.path("expected.raw"), expected(&[&top, &base], &[])).unwrap();
    env.image("compare -f vhd -F raw top.vhd expected.raw").ok();
    let infos = env.image("info -f vhd --backing-chain --json top.vhd");
    assert!(!infos.err.contains("geometry"), "{infos:?}");
    assert_eq!(infos.json()[1]["virtual-size"], 10 * MIB);
    // By itself the base is what QEMU shows of it.
    let size = 20400 * 512;
    let said = "10444800 bytes that its geometry has";
    let info = env.image("info -f vhd --json base.vhd");
    assert!(info.err.contains(said) && info.err.contains("it has 10485760"), "{info:?}");
    assert_eq!(info.json()["virtual-size"], size);
    let theirs = env.qemu_img("info -f vpc --output=json base.vhd").json();
    assert_eq!(theirs["virtual-size"], size);
    let converted = env.image("convert -f vhd -O raw base.vhd base.raw");
    assert!(converted.err.contains(said), "{converted:?}");
    converted.ok();
    env.qemu_img("compare -f vpc -F raw base.vhd base.raw").ok();
}

/// As logical volumes are: links in the group's folder, device nodes with other names elsewhere.
#[test]
fn names_are_relative_to_the_links_that_lead_to_a_child() {
    let Some(env) = Env::new() else { return };
    chain(&env);
    std::fs::create_dir(env.path("dev")).unwrap();
    std::fs::create_dir(env.path("VG")).unwrap();
    let all = ["top.vhd", "mid.vhd", "base.vhd", "disk.raw"];
    for (i, name) in all.iter().enumerate() {
        std::fs::rename(env.path(name), env.path(&format!("dev/dm-{i}"))).unwrap();
        let link = env.path(&format!("VG/{name}"));
        std::os::unix::fs::symlink(format!("../dev/dm-{i}"), link).unwrap();
    }
    env.image("compare -f vhd -F raw VG/top.vhd expected.raw").ok();
    // What may be opened is said of the devices, not of the links.
    env.image("compare -f vhd -F raw --allow-backing dev VG/top.vhd expected.raw").ok();
    env.image("compare -f vhd -F raw --allow-backing VG VG/top.vhd expected.raw")
        .fails(2, "outside of the directories");
    let infos = env.image("info -f vhd --backing-chain --json VG/top.vhd").json();
    assert!(infos[2]["filename"].as_str().unwrap().ends_with("/dev/dm-2"), "{infos}");
    // The other way round: names beside the files themselves, one of which is reached by a link.
    std::fs::create_dir(env.path("links")).unwrap();
    for (i, name) in all.iter().enumerate() {
        std::fs::remove_file(env.path(&format!("VG/{name}"))).unwrap();
        std::fs::rename(env.path(&format!("dev/dm-{i}")), env.path(&format!("VG/{name}"))).unwrap();
    }
    std::os::unix::fs::symlink("../VG/top.vhd", env.path("links/top.vhd")).unwrap();
    std::os::unix::fs::symlink("../VG/mid.vhd", env.path("links/mid.vhd")).unwrap();
    env.image("compare -f vhd -F raw links/top.vhd expected.raw").ok();
}

#[test]
fn what_is_not_done_is_said() {
    let Some(env) = Env::new() else { return };
    env.image("create -q -f vhd a.vhd 10M").ok();
    env.image("resize -f vhd a.vhd 20M").fails(2, "convert it to qcow2 first");
    env.image("create -f vhd b.vhd 4T").fails(1, "at most 2190433320960");
    env.image("create -f vhd -b a.vhd -F raw b.vhd").fails(2, "read, but not made");
    env.image("create -f vhd -o preallocation=full b.vhd 1M").fails(2, "subformat=dynamic|fixed");
    env.image("create -f vhd mem:64M 1M").fails(1, "only made in files");
    env.image("convert -n -f vhd -O vhd a.vhd a.vhd").fails(1, "is the source");
    env.image("check -r all -f vhd a.vhd").fails(63, "not repaired");
    env.image("check -f vhd no.vhd").fails(1, "no.vhd");
    let mut bytes = std::fs::read(env.path("a.vhd")).unwrap();
    bytes[20] ^= 1;
    std::fs::write(env.path("a.vhd"), bytes).unwrap();
    env.image("check -f vhd a.vhd").fails(2, "copy of the footer");
    let nbd =
        env.run(env!("CARGO_BIN_EXE_polldisk"), &["nbd", "--socket", "s", "-f", "vhd", "a.vhd"]);
    nbd.fails(2, "serve it with --read-only");
}

/// A server; killed if the test ends before it.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Serves the chain with these arguments, and reads it by several clients at once.
fn serve(env: &Env, reactors: usize, more: &[&str]) {
    let socket = env.path("nbd.sock");
    let mut server = Server(
        Command::new(env!("CARGO_BIN_EXE_polldisk"))
            .args(["nbd", "--format", "vhd", "--read-only", "--socket"])
            .args([&socket, &env.path("top.vhd")])
            .args(more)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap(),
    );
    let mut line = String::new();
    let out = server.0.stdout.take().unwrap();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(out), &mut line).unwrap();
    assert!(line.starts_with("listening"), "{line}");
    let tasks = std::fs::read_dir(format!("/proc/{}/task", server.0.id())).unwrap().flatten();
    let names = tasks.filter_map(|t| std::fs::read_to_string(t.path().join("comm")).ok());
    assert_eq!(names.filter(|n| n.starts_with("reactor")).count(), reactors);
    let url = format!("nbd+unix:///?socket={}", socket.display());
    let compare = format!("compare -f raw -F raw {url} expected.raw");
    std::thread::scope(|s| {
        for _ in 0..3 {
            s.spawn(|| env.qemu_img(&compare).ok());
        }
    });
    let write = env.run("qemu-io", &["-f", "raw", "-c", "write 0 512", &url]);
    assert!(
        write.code != 0 || write.out.contains("ead-only") || write.err.contains("ead-only"),
        "{write:?}"
    );
    let pid = nix::unistd::Pid::from_raw(server.0.id() as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    for _ in 0..500 {
        if let Some(status) = server.0.try_wait().unwrap() {
            assert!(status.success(), "{status}");
            return;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    panic!("the server does not end");
}

#[test]
fn a_chain_is_served() {
    let Some(env) = Env::new() else { return };
    chain(&env);
    serve(&env, 1, &[]);
    // Each reactor has an image of its own.
    let online = reactor::online_cpus().unwrap();
    let cores: Vec<String> = online.iter().take(2).map(usize::to_string).collect();
    serve(&env, cores.len(), &["--cores", &cores.join(",")]);
}
