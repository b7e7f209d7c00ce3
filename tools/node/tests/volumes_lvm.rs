//! Volumes that the tools of LVM2 made, on loop devices: an image is written into them through `vol:`
//! nodes, and then found by where those tools say that the volume lies, for qemu-img to judge.
//! Skipped where the tools or loop devices are missing.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::Command;

use block::{Flags, Op, Status};
use dma::Pool;
use node::{Disk, DiskOptions, NodeSpec, OpenOptions, Parts, open_chain, open_source};
use qcow::create::{CreateOptions, create};
use qcow::open::Format;
use reactor::{Clock, Policy, PortalRequest, Start};

const MIB: u64 = 1 << 20;

/// Loop devices over files, and a configuration of the tools that sees nothing else.
struct Lvm {
    folder: tempfile::TempDir,
    loops: Vec<String>,
}

impl Drop for Lvm {
    fn drop(&mut self) {
        for device in &self.loops {
            let _ = Command::new("losetup").args(["-d", device]).status();
        }
    }
}

impl Lvm {
    fn new(devices: usize) -> Option<Lvm> {
        let mut lvm = Lvm { folder: tempfile::tempdir().unwrap(), loops: Vec::new() };
        for number in 0..devices {
            let file = lvm.folder.path().join(format!("disk{number}"));
            File::create(&file).unwrap().set_len(64 * MIB).unwrap();
            let out = Command::new("losetup").args(["--find", "--show"]).arg(&file).output();
            let Some(out) = out.ok().filter(|out| out.status.success()) else {
                println!("skipped: no loop devices here");
                return None;
            };
            lvm.loops.push(String::from_utf8(out.stdout).unwrap().trim().to_owned());
        }
        let accept: Vec<String> = lvm.loops.iter().map(|l| format!("\"a|^{l}$|\"")).collect();
        let text = format!(
            "devices {{ dir=\"/dev\" scan=[\"/dev\"] filter=[{}, \"r|.*|\"]\n\
             obtain_device_list_from_udev=0 use_devicesfile=0\n\
             external_device_info_source=\"none\" }}\n\
             activation {{ udev_sync=0 udev_rules=0 monitoring=0 }}\n\
             global {{ use_lvmpolld=0 locking_dir=\"{}\" system_id_source=\"none\" }}\n\
             backup {{ backup=0 archive=0 }}\n",
            accept.join(", "),
            lvm.folder.path().join("lock").display(),
        );
        std::fs::write(lvm.folder.path().join("lvm.conf"), text).unwrap();
        if lvm.command("version").output().is_err() {
            println!("skipped: lvm is not installed (Debian: lvm2)");
            return None;
        }
        Some(lvm)
    }

    fn command(&self, word: &str) -> Command {
        let mut command = Command::new("lvm");
        command.arg(word).env("LVM_SYSTEM_DIR", self.folder.path());
        command.env("LVM_SUPPRESS_FD_WARNINGS", "1");
        command
    }

    /// Runs a tool, `%N` being a loop device; returns what it said.
    fn run(&self, line: &str) -> String {
        let mut words = line.split_whitespace();
        let mut command = self.command(words.next().unwrap());
        command.args(["--driverloaded", "n"]);
        command.args(words.map(|word| match word.strip_prefix('%') {
            Some(n) => self.loops[n.parse::<usize>().unwrap()].clone(),
            None => word.to_owned(),
        }));
        let out = command.output().unwrap();
        let text = String::from_utf8([out.stdout, out.stderr].concat()).unwrap();
        assert!(out.status.success(), "{line}: {text}");
        let said = text.lines().filter(|line| !line.contains("Activation disabled"));
        said.collect::<Vec<_>>().join("\n")
    }

    fn rows(&self, line: &str) -> Vec<Vec<String>> {
        let text = self.run(&format!("{line} --noheadings --separator | --units b --nosuffix"));
        let row = |line: &str| line.trim().split('|').map(str::to_owned).collect();
        text.lines().map(row).collect()
    }

    /// A volume's bytes by where the tools say that they are.
    fn extract(&self, volume: &str) -> PathBuf {
        let number = |text: &str| text.parse::<u64>().unwrap();
        let starts = self.rows("pvs -o pv_name,pe_start");
        let extent = number(&self.rows("vgs -o vg_extent_size")[0][0]);
        let fields = "seg_start_pe,seg_size_pe,stripes,stripe_size,seg_pe_ranges";
        let mut segments = self.rows(&format!("lvs --segments -o {fields} vg/{volume}"));
        segments.sort_by_key(|s| number(&s[0]));
        let mut bytes = Vec::new();
        for segment in segments {
            let areas: Vec<(File, u64)> = segment[4]
                .split(' ')
                .map(|range| {
                    let (device, extents) = range.rsplit_once(':').unwrap();
                    let first = number(extents.split_once('-').unwrap().0);
                    let start = starts.iter().find(|s| s[0] == device).unwrap();
                    (File::open(device).unwrap(), number(&start[1]) + first * extent)
                })
                .collect();
            let len = number(&segment[1]) * extent;
            let stripe = if areas.len() > 1 { number(&segment[3]) } else { len };
            for n in 0..len / stripe {
                let (device, begin) = &areas[n as usize % areas.len()];
                let mut part = vec![0; stripe as usize];
                let at = begin + n / areas.len() as u64 * stripe;
                device.read_exact_at(&mut part, at).unwrap();
                bytes.extend(part);
            }
        }
        let path = self.folder.path().join(format!("{volume}.qcow2"));
        std::fs::write(&path, bytes).unwrap();
        path
    }
}

/// Writes (or reads and compares) so many clusters, each with bytes of its own.
fn clusters(node: &str, op: Op, count: u64) {
    let spec = NodeSpec::parse(node).unwrap();
    let chain = open_chain(&spec, &OpenOptions::write(Format::Qcow2)).unwrap();
    let reactors = vec![Start { cpu: None, policy: Policy::Adaptive }];
    let options = DiskOptions { reactors, image: qcow::run::Options::default() };
    let disk = Disk::start(Parts::new(chain).unwrap(), options, Clock::real()).unwrap();
    let mut pool = Pool::new(1, 65536).unwrap();
    let region = pool.region().clone();
    let buf = pool.take().unwrap();
    let mut portal = disk.portal(4, vec![region.clone()]).unwrap();
    for cluster in 0..count {
        let byte = (cluster as u8).wrapping_mul(31) ^ 5;
        if op == Op::Write {
            region.write_seg(&buf.seg(), &vec![byte; 65536]);
        }
        let (offset, seg) = (cluster * 65536, Some(buf.seg()));
        let request = PortalRequest { id: 1, op, flags: Flags::NONE, offset, len: 65536, seg };
        assert_eq!(portal.call(request), Status::Ok, "{cluster}");
        if op == Op::Read {
            let mut data = vec![0; 65536];
            region.read_seg(&buf.seg(), &mut data);
            assert!(data.iter().all(|&b| b == byte), "cluster {cluster}");
        }
    }
    pool.give(buf);
    drop(portal);
    disk.close().unwrap();
}

#[test]
fn the_tools_of_lvm_say_where_the_image_lies() {
    let Some(lvm) = Lvm::new(4) else { return };
    lvm.run("vgcreate --physicalextentsize 1m vg %0 %1 %2 %3");
    lvm.run("lvcreate -y -an -Zn -Wn -l 9 -n line vg");
    lvm.run("lvcreate -y -an -Zn -Wn -l 4 -i 4 -I 16k -n between vg");
    lvm.run("lvcreate -y -an -Zn -Wn -l 12 -i 2 -I 64k -n two vg %1 %2");
    lvm.run("lvcreate -y -an -Zn -Wn -l 12 -i 4 -I 4k -n four vg");
    for volume in ["line", "two", "four"] {
        lvm.run(&format!("lvextend -l +8 vg/{volume}"));
    }
    for volume in ["line", "two", "four"] {
        let node = format!("vol:vg/{volume}@{}", lvm.loops.join(","));
        let spec = NodeSpec::parse(&node).unwrap();
        let mut bytes = open_source(&spec, &OpenOptions::write(Format::Raw)).unwrap();
        create(&mut bytes, "test", &CreateOptions::new(12 * MIB)).unwrap();
        bytes.close().unwrap();
        clusters(&node, Op::Write, 192);
        clusters(&node, Op::Read, 192);
    }
    assert_eq!(lvm.run("vgck vg"), "");
    for volume in ["line", "two", "four"] {
        let path = lvm.extract(volume);
        let check = Command::new("qemu-img").args(["check", "-f", "qcow2"]).arg(&path).output();
        match check {
            Ok(out) => {
                assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stdout));
            }
            Err(_) => println!("skipped: qemu-img is not installed"),
        }
        clusters(path.to_str().unwrap(), Op::Read, 192);
    }
}
