//! The judge: the tools of LVM2 themselves, on loop devices. What they make is read and changed here,
//! what is made here is read and changed by them, and `vgck` finds nothing wrong in either. Without a
//! device-mapper: the tools are told to leave it alone. Skipped where they or loop devices are missing.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use block::{Status, Storage, StorageError};
use volume::{Author, Error, Group, Id, NewGroup, Run, Shape, Vg};

const MIB: u64 = 1 << 20;

/// A file as a device.
struct Bytes(File);

impl Bytes {
    fn failed(what: &'static str, offset: u64, len: usize) -> StorageError {
        StorageError { what, offset, len: len as u64, status: Status::Medium, detail: 0 }
    }
}

impl Storage for Bytes {
    fn len(&self) -> u64 {
        self.0.metadata().unwrap().len()
    }

    fn capacity(&self) -> u64 {
        self.len()
    }

    fn read_only(&self) -> bool {
        false
    }

    fn read_at(&mut self, offset: u64, into: &mut [u8]) -> Result<(), StorageError> {
        let len = into.len();
        self.0.read_exact_at(into, offset).map_err(|_| Bytes::failed("read", offset, len))
    }

    fn write_at(&mut self, offset: u64, from: &[u8]) -> Result<(), StorageError> {
        self.0.write_all_at(from, offset).map_err(|_| Bytes::failed("write", offset, from.len()))
    }

    fn write_zeroes_at(&mut self, offset: u64, len: u64) -> Result<(), StorageError> {
        self.write_at(offset, &vec![0; len as usize])
    }

    fn flush(&mut self) -> Result<(), StorageError> {
        // The tools read through the same page cache.
        Ok(())
    }

    fn set_len(&mut self, _len: u64) -> Result<(), StorageError> {
        Ok(())
    }
}

/// Loop devices over files, and a configuration of the tools that sees nothing else.
struct Lvm {
    folder: tempfile::TempDir,
    files: Vec<PathBuf>,
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
    /// So many devices. `None`, with the reason on the output: there are no tools or loop devices.
    fn new(devices: usize, size: u64) -> Option<Lvm> {
        let folder = tempfile::tempdir().unwrap();
        let mut lvm = Lvm { folder, files: Vec::new(), loops: Vec::new() };
        for number in 0..devices {
            let file = lvm.folder.path().join(format!("disk{number}"));
            File::create(&file).unwrap().set_len(size).unwrap();
            let out = Command::new("losetup").args(["--find", "--show"]).arg(&file).output();
            let Some(out) = out.ok().filter(|out| out.status.success()) else {
                println!("skipped: no loop devices here");
                return None;
            };
            lvm.loops.push(String::from_utf8(out.stdout).unwrap().trim().to_owned());
            lvm.files.push(file);
        }
        lvm.configure("me");
        if Command::new("lvm")
            .arg("version")
            .env("LVM_SYSTEM_DIR", lvm.folder.path())
            .output()
            .is_err()
        {
            println!("skipped: lvm is not installed (Debian: lvm2)");
            return None;
        }
        Some(lvm)
    }

    /// The host that the tools run on is called `us`.
    fn configure(&self, us: &str) {
        let accept: Vec<String> = self.loops.iter().map(|l| format!("\"a|^{l}$|\"")).collect();
        let text = format!(
            "devices {{ dir=\"/dev\" scan=[\"/dev\"] filter=[{}, \"r|.*|\"]\n\
             obtain_device_list_from_udev=0 use_devicesfile=0\n\
             external_device_info_source=\"none\" }}\n\
             activation {{ udev_sync=0 udev_rules=0 monitoring=0 }}\n\
             global {{ use_lvmpolld=0 locking_dir=\"{}\" system_id_source=\"lvmlocal\" }}\n\
             local {{ system_id=\"{us}\" }}\nbackup {{ backup=0 archive=0 }}\n",
            accept.join(", "),
            self.folder.path().join("lock").display(),
        );
        std::fs::write(self.folder.path().join("lvm.conf"), text).unwrap();
    }

    /// Runs a tool; whether it succeeded, and all that it said.
    fn try_run(&self, line: &str) -> (bool, String) {
        let mut words = line.split_whitespace();
        let mut command = Command::new("lvm");
        command.arg(words.next().unwrap()).args(["--driverloaded", "n"]);
        command.args(words.map(|word| match word.strip_prefix('%') {
            Some(n) => self.loops[n.parse::<usize>().unwrap()].clone(),
            None => word.to_owned(),
        }));
        command.env("LVM_SYSTEM_DIR", self.folder.path()).env("LVM_SUPPRESS_FD_WARNINGS", "1");
        let out = command.output().unwrap();
        let text = [out.stdout, out.stderr].concat();
        let text = String::from_utf8(text).unwrap();
        let said: Vec<&str> =
            text.lines().filter(|line| !line.contains("Activation disabled")).collect();
        (out.status.success(), said.join("\n"))
    }

    fn run(&self, line: &str) -> String {
        let (good, said) = self.try_run(line);
        assert!(good, "{line}: {said}");
        said
    }

    /// A report, as rows of fields.
    fn rows(&self, line: &str) -> Vec<Vec<String>> {
        let text = self.run(&format!("{line} --noheadings --separator | --units b --nosuffix"));
        let row = |line: &str| line.trim().split('|').map(str::to_owned).collect();
        text.lines().map(row).collect()
    }

    fn devices(&self) -> Vec<Bytes> {
        let open = |file: &PathBuf| OpenOptions::new().read(true).write(true).open(file).unwrap();
        self.files.iter().map(open).map(Bytes).collect()
    }

    fn open(&self) -> Group<Bytes> {
        Group::open(self.devices(), Some("me")).unwrap()
    }

    /// The tools find nothing wrong, and see the same group as we do.
    fn agree(&self, vg: &Vg) {
        let said = self.run(&format!("vgck {}", vg.name));
        assert_eq!(said, "", "vgck");
        for (number, file) in self.files.iter().enumerate() {
            let (good, said) = self.try_run(&format!("pvck --dump headers {}", file.display()));
            assert!(good && !said.contains("CHECK") && !said.contains("WARN"), "{said}");
            let (good, said) = self.try_run(&format!("pvck %{number}"));
            assert!(good, "{said}");
        }
        let fields = "vg_name,vg_uuid,vg_seqno,vg_extent_size,vg_free_count,lv_count,vg_systemid";
        let want = [
            vg.name.clone(),
            vg.id.to_string(),
            vg.seqno.to_string(),
            vg.extent_bytes().to_string(),
            vg.free_extents().to_string(),
            vg.lvs.iter().filter(|lv| lv.visible()).count().to_string(),
            vg.system_id.clone().unwrap_or_default(),
        ];
        assert_eq!(self.rows(&format!("vgs -o {fields}")), [want.to_vec()]);
        let fields =
            "lv_name,lv_uuid,lv_tags,seg_start_pe,seg_size_pe,stripes,stripe_size,seg_pe_ranges";
        let mut rows = self.rows(&format!("lvs -a -o {fields} -O lv_name,seg_start_pe"));
        let mut want = Vec::new();
        for lv in &vg.lvs {
            let mut tags = lv.tags.clone();
            tags.sort();
            for segment in &lv.segments {
                let range = |Run { pv, first, count }: Run| {
                    format!("{}:{first}-{}", self.loop_of(vg, pv), first + count - 1)
                };
                let ranges: Vec<String> = segment.runs().map(range).collect();
                want.push(vec![
                    lv.name.clone(),
                    lv.id.to_string(),
                    tags.join(","),
                    segment.start.to_string(),
                    segment.count.to_string(),
                    segment.areas.len().to_string(),
                    (segment.stripe_size * 512).to_string(),
                    ranges.join(" "),
                ]);
            }
        }
        rows.sort();
        want.sort();
        assert_eq!(rows, want);
    }

    /// The loop device of a physical volume.
    fn loop_of(&self, vg: &Vg, pv: usize) -> String {
        let mut devices = self.devices();
        let at = devices.iter_mut().position(|device| {
            let label = volume::Label::read(device).unwrap();
            label.is_some_and(|label| label.id == vg.pvs[pv].id)
        });
        self.loops[at.unwrap()].clone()
    }
}

fn author() -> Author {
    Author { host: "here".to_owned(), time: 1_700_000_000 }
}

fn create(vg: &mut Vg, name: &str, extents: u64, stripes: u32) -> volume::Result<()> {
    let shape = Shape { stripes, stripe_size: 128 };
    vg.create_lv(Id::random().unwrap(), name, extents, shape, &author())
}

fn new_group() -> NewGroup {
    NewGroup {
        name: "pd-0".to_owned(),
        system_id: Some("me".to_owned()),
        tags: Vec::new(),
        extent: 4 * MIB,
        metadata: volume::DEFAULT_METADATA,
    }
}

#[test]
fn the_tools_accept_what_is_made_here() {
    for devices in [1, 2, 4] {
        let Some(lvm) = Lvm::new(devices, 64 * MIB) else { return };
        let mut group = Group::create(lvm.devices(), &new_group(), &author()).unwrap();
        lvm.agree(group.vg());
        group
            .change(&author(), "volumes of all \"shapes\"", |vg| {
                vg.tags.push("of-group".to_owned());
                create(vg, "pd-lin", 3, 1)?;
                if vg.pvs.len() >= 2 {
                    create(vg, "pd-two", 4, 2)?;
                }
                if vg.pvs.len() >= 4 {
                    create(vg, "pd-four", 8, 4)?;
                }
                create(vg, "pd-lin2", 1, 1)?;
                vg.extend_lv("pd-lin", 2)?;
                vg.tag_lv("pd-lin", "a/b:c=d")?;
                vg.tag_lv("pd-lin", "x+y&z#1!-.")
            })
            .unwrap();
        lvm.agree(group.vg());
        group.change(&author(), "away", |vg| vg.remove_lv("pd-lin2")).unwrap();
        group.change(&author(), "renamed", |vg| vg.rename_lv("pd-lin", "new.name+_1")).unwrap();
        lvm.agree(group.vg());
        assert_eq!(lvm.rows("vgs -o vg_tags"), [["of-group"]]);
        let areas = lvm.rows("pvs -o pv_name,pv_mda_size,pe_start");
        assert_eq!(areas.len(), devices);
        for area in areas {
            assert!(
                area[1].parse::<u64>().unwrap() >= 16 * MIB && area[2] == (17 * MIB).to_string()
            );
        }
        // Their backup is a text that we read, and they restore what they saved.
        let backup = lvm.folder.path().join("backup");
        lvm.run(&format!("vgcfgbackup -f {} pd-0", backup.display()));
        let mut saved = Vg::read(&std::fs::read(&backup).unwrap()).unwrap();
        for (saved, pv) in saved.pvs.iter_mut().zip(&group.vg().pvs) {
            // The hint where the device is.
            saved.extra.clone_from(&pv.extra);
        }
        assert_eq!(saved, *group.vg());
        lvm.run(&format!("vgcfgrestore -f {} pd-0", backup.display()));
        let restored = lvm.open();
        assert_eq!(restored.vg().lvs, group.vg().lvs);
        lvm.agree(restored.vg());
        // Another host's tools, and ours on another host, leave it alone.
        lvm.configure("you");
        let (good, said) = lvm.try_run("vgchange --addtag theirs pd-0");
        assert!(!good && said.contains("system ID"), "{said}");
        let other = Group::open(lvm.devices(), Some("you"));
        assert!(matches!(other, Err(Error::Foreign { .. })));
        lvm.configure("me");
        // Removed groups leave devices that the tools take as new ones.
        let mut group = restored;
        group
            .change(&author(), "", |vg| {
                vg.lvs.clear();
                Ok(())
            })
            .unwrap();
        group.remove().unwrap();
        assert_eq!(lvm.run("vgs"), "");
        assert_eq!(lvm.run("pvs"), "");
        lvm.run("pvcreate %0");
    }
}

#[test]
fn what_the_tools_make_is_changed_here_and_there_in_turns() {
    let Some(lvm) = Lvm::new(3, 64 * MIB) else { return };
    // Small areas: texts go round the ring several times.
    for number in 0..3 {
        lvm.run(&format!("pvcreate --dataalignment 4k --metadatasize 32k %{number}"));
    }
    lvm.run("vgcreate --physicalextentsize 1m vg %0 %1 %2");
    lvm.run("lvcreate -y -an -Zn -Wn -l 5 -n lin vg");
    lvm.run("lvcreate -y -an -Zn -Wn -l 6 -i 3 -I 16k -n str --addtag t1 --addtag t2 vg");
    lvm.run("lvcreate -y -an -Zn -Wn -l 1 -n odd -r 256 --alloc anywhere -k y -M y --minor 77 vg");
    lvm.run("lvcreate -y -an -Zn -Wn -l 1 -n ro -p r vg");
    lvm.agree(lvm.open().vg());
    let (mut rounds, mut at) = (0, 0);
    for round in 0..8 {
        let mut group = lvm.open();
        group
            .change(&author(), "round", |vg| {
                create(vg, &format!("ours{round}"), 3, 1 + round % 3)?;
                vg.grow_lv("lin", 1)?;
                vg.extend_lv("str", 3)?;
                vg.tag_lv("odd", &format!("round{round}"))?;
                if round > 3 {
                    vg.remove_lv(&format!("ours{}", round - 3))?;
                }
                Ok(())
            })
            .unwrap();
        let vg = group.vg().clone();
        lvm.agree(&vg);
        let device = &mut group.into_devices()[0];
        let area = volume::Label::read(device).unwrap().unwrap().metadata[0];
        let live = volume::MetadataArea::read(device, area).unwrap().live.unwrap();
        rounds += u32::from(live.offset < at);
        at = live.offset;
        // What we do not know is as it was.
        let odd = lvm
            .rows("lvs -o lv_read_ahead,lv_allocation_policy,lv_minor,lv_skip_activation vg/odd");
        assert_eq!(odd, [["131072", "anywhere", "77", "skip activation"]]);
        match round % 4 {
            0 => lvm.run("lvextend -l +1 vg/lin"),
            1 => lvm.run(&format!("lvrename vg ours{round} theirs{round}")),
            2 => lvm.run("vgchange --addtag tag vg"),
            _ => lvm.run("lvchange --addtag more vg/str"),
        };
        let read = lvm.open();
        assert!(read.vg().seqno > vg.seqno, "their change is seen");
        lvm.agree(read.vg());
        if round % 4 == 1 {
            let mut group = read;
            let back =
                |vg: &mut Vg| vg.rename_lv(&format!("theirs{round}"), &format!("ours{round}"));
            group.change(&author(), "back", back).unwrap();
        }
    }
    assert!(rounds > 0, "the ring was never gone round");
}

#[test]
fn the_tools_see_the_state_that_is_seen_here_where_copies_differ() {
    let Some(lvm) = Lvm::new(2, 64 * MIB) else { return };
    let mut group = Group::create(lvm.devices(), &new_group(), &author()).unwrap();
    group.change(&author(), "a", |vg| create(vg, "a", 3, 2)).unwrap();
    let vg = group.vg().clone();
    let mut devices = group.into_devices();
    // The last device has not got the change: its header leads to the text before.
    let mut old = vec![0; 512];
    let area = volume::Label::read(&mut devices[1]).unwrap().unwrap().metadata[0];
    devices[1].read_at(area.offset, &mut old).unwrap();
    let mut group = lvm.open();
    group.change(&author(), "b", |vg| create(vg, "b", 3, 1)).unwrap();
    let newer = group.vg().clone();
    devices[1].write_at(area.offset, &old).unwrap();
    drop(group);
    assert!(newer.seqno > vg.seqno);
    let group = lvm.open();
    assert_eq!(*group.vg(), newer);
    lvm.agree(&newer);
    // And without us.
    devices[1].write_at(area.offset, &old).unwrap();
    lvm.run("vgchange --addtag fixed pd-0");
    let fixed = lvm.open();
    assert_eq!((fixed.vg().lvs.clone(), fixed.vg().tags.len()), (newer.lvs, 1));
    lvm.agree(fixed.vg());
}

#[test]
fn what_is_not_done_here_is_left_alone() {
    let Some(lvm) = Lvm::new(2, 64 * MIB) else { return };
    let hash = |file: &Path| crc32fast::hash(&std::fs::read(file).unwrap());
    for (line, word) in [
        ("lvcreate -y -an --type cache-pool -l2 --poolmetadatasize 8m -n p vg", "cache-pool"),
        ("lvcreate -y -an --type zero -L 8m -n z vg", "zero"),
        ("vgchange -p 9 vg", ""),
        ("vgexport vg", "EXPORTED"),
        ("pvchange --metadataignore y %1", ""),
        ("vgchange -y --systemid you vg", "belongs to the system `you`"),
    ] {
        lvm.run("pvcreate -y %0 %1");
        lvm.run("vgcreate -y vg %0 %1");
        lvm.run("lvcreate -y -an -Zn -Wn -l 1 -n a vg");
        lvm.run(line);
        let before: Vec<u32> = lvm.files.iter().map(|file| hash(file)).collect();
        match Group::open(lvm.devices(), Some("me")) {
            Err(error) => assert!(!word.is_empty() && error.to_string().contains(word), "{error}"),
            Ok(mut group) => {
                assert_eq!(word, "", "{line} was accepted");
                group.change(&author(), "b", |vg| create(vg, "b", 2, 1)).unwrap();
                lvm.agree(group.vg());
            }
        }
        if !word.is_empty() {
            let after: Vec<u32> = lvm.files.iter().map(|file| hash(file)).collect();
            assert_eq!(before, after, "{line}");
        }
        for device in &mut lvm.devices() {
            device.write_zeroes_at(0, MIB).unwrap();
        }
    }
}
