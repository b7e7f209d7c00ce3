//! LVM2's own tools on loop devices: what is made here is right for them, and the other way round.

use super::*;

/// Loop devices over `a` and `b`, and a configuration by which the tools see nothing else.
struct Lvm {
    env: Env,
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
    /// `None`, with the reason on the output: there are no tools or loop devices.
    fn new() -> Option<Lvm> {
        if Command::new("lvm").arg("version").output().is_err() {
            println!("skipped: lvm is not installed (Debian: lvm2)");
            return None;
        }
        let mut lvm = Lvm { env: Env::new(), loops: Vec::new() };
        for name in ["a", "b"] {
            lvm.env.disk(name, 64);
            let out =
                Command::new("losetup").args(["--find", "--show"]).arg(lvm.env.path(name)).output();
            let Some(out) = out.ok().filter(|out| out.status.success()) else {
                println!("skipped: no loop devices here");
                return None;
            };
            lvm.loops.push(String::from_utf8(out.stdout).unwrap().trim().to_owned());
        }
        lvm.called("me", "");
        Some(lvm)
    }

    fn called(&self, id: &str, more: &str) {
        let accept: Vec<String> = self.loops.iter().map(|l| format!("\"a|^{l}$|\"")).collect();
        let text = format!(
            "devices {{ dir=\"/dev\" scan=[\"/dev\"] filter=[{}, \"r|.*|\"]\n\
             obtain_device_list_from_udev=0 use_devicesfile=0\n\
             external_device_info_source=\"none\" }}\n\
             activation {{ udev_sync=0 udev_rules=0 monitoring=0 }}\n\
             global {{ use_lvmpolld=0 locking_dir=\"{}\" }}\nbackup {{ backup=0 archive=0 }}\n{more}",
            accept.join(", "),
            self.env.path("lock").display(),
        );
        self.env.called(id, &text);
    }

    /// Runs a tool of LVM.
    fn lvm(&self, line: &str) -> Run {
        let mut words = line.split_whitespace();
        let mut command = Command::new("lvm");
        command.arg(words.next().unwrap()).args(["--driverloaded", "n"]);
        command.args(words.map(|word| self.named(word))).current_dir(self.env.dir.path());
        command.env("LVM_SYSTEM_DIR", self.env.dir.path()).env("LVM_SUPPRESS_FD_WARNINGS", "1");
        let mut run: Run = command.output().unwrap().into();
        let without = |text: &str| {
            let lines = text.lines().filter(|line| !line.contains("Activation disabled"));
            lines.collect::<Vec<_>>().join("\n")
        };
        (run.out, run.err) = (without(&run.out), without(&run.err));
        run
    }

    /// Runs a tool with an option whose value has a space.
    fn with_config(&self, option: &str, line: &str) -> Run {
        let (name, value) = option.split_once(' ').unwrap();
        let mut words = line.split_whitespace();
        let mut command = Command::new("lvm");
        command.arg(words.next().unwrap()).args(["--driverloaded", "n", name, value]).args(words);
        command.current_dir(self.env.dir.path());
        command.env("LVM_SYSTEM_DIR", self.env.dir.path()).env("LVM_SUPPRESS_FD_WARNINGS", "1");
        command.output().unwrap().into()
    }

    /// Devices are named %0 and %1.
    fn named(&self, word: &str) -> String {
        match word.strip_prefix('%') {
            Some(n) => self.loops[n.parse::<usize>().unwrap()].clone(),
            None => word.to_owned(),
        }
    }

    /// Runs `polldisk volume` on the loop devices.
    fn ours(&self, line: &str) -> Run {
        let line: Vec<String> = line.split_whitespace().map(|word| self.named(word)).collect();
        self.env.run(&line.join(" "))
    }

    /// The tools find nothing wrong, and neither do we.
    #[track_caller]
    fn sound(&self) {
        let run = self.lvm("vgck");
        assert!(run.code == 0 && run.out.is_empty() && run.err.is_empty(), "{run:?}");
        for device in ["%0", "%1"] {
            let run = self.lvm(&format!("pvck --dump headers {device}"));
            assert!(!run.out.contains("CHECK") && !run.err.contains("CHECK"), "{run:?}");
        }
        self.ours("check %0 %1").ok();
    }

    /// Fields of a report, a line each.
    #[track_caller]
    fn report(&self, line: &str) -> Vec<String> {
        let text =
            self.lvm(&format!("{line} --noheadings --separator | --units b --nosuffix")).ok();
        text.lines().map(|line| line.trim().to_owned()).collect()
    }
}

#[test]
fn the_tools_see_what_is_made_here() {
    let Some(lvm) = Lvm::new() else { return };
    lvm.ours("create-group vg %0 %1 --tag here").ok();
    lvm.sound();
    assert_eq!(
        lvm.report("vgs -o vg_name,vg_systemid,vg_tags,vg_extent_size"),
        ["vg|me|here|4194304"]
    );
    lvm.ours("create vg/lin --size 8M --tag a=b %0 %1").ok();
    lvm.ours("create vg/str --size 16M --stripes 2 --stripe-size 128k %0 %1").ok();
    lvm.sound();
    let lvs = "lvs -o lv_name,lv_size,stripes,stripe_size,lv_tags -O lv_name";
    assert_eq!(lvm.report(lvs), ["lin|8388608|1|0|a=b", "str|16777216|2|131072|"]);
    lvm.ours("extend vg/lin --size +4M %0 %1").ok();
    lvm.ours("rename vg/str other %0 %1").ok();
    lvm.sound();
    let free = lvm.ours("list --json %0 %1").json()["group"]["free"].to_string();
    assert_eq!(lvm.report("vgs -o vg_free"), [free]);
    assert_eq!(lvm.report("pvs -o pv_mda_count,pv_used -O pv_used").len(), 2);
    assert_eq!(lvm.report("lvs -o lv_name -O lv_name"), ["lin", "other"]);

    // What is printed is a backup for them.
    let text = lvm.ours("export-text %0 %1").ok();
    std::fs::write(lvm.env.path("backup"), text).unwrap();
    lvm.ours("remove vg/lin %0 %1").ok();
    lvm.lvm("vgcfgrestore -f backup vg").ok();
    assert_eq!(lvm.report("lvs -o lv_name -O lv_name"), ["lin", "other"]);
    lvm.sound();
    // Also where nothing is left of a device's metadata.
    let uuid = lvm.report("pvs -o pv_uuid,pv_name");
    let uuid = uuid.iter().find_map(|l| l.strip_suffix(&format!("|{}", lvm.loops[1]))).unwrap();
    let b = File::options().write(true).open(&lvm.loops[1]).unwrap();
    b.write_all_at(&[0; 64 << 10], 0).unwrap();
    b.sync_all().unwrap();
    lvm.lvm(&format!("pvcreate --uuid {uuid} --restorefile backup %1")).ok();
    lvm.lvm("vgcfgrestore -f backup vg").ok();
    assert_eq!(lvm.report("lvs -o lv_name -O lv_name"), ["lin", "other"]);
    lvm.sound();

    // A second host's tools are kept out; taken over, the first one's are.
    lvm.called("you", "");
    let run = lvm.lvm("vgchange --addtag theirs vg");
    assert!(run.code != 0 && run.err.contains("system ID"), "{run:?}");
    // As docs/operations.md says how to get at it from another host, whatever it goes by.
    let us = "--config global/system_id_source=\"lvmlocal\" local/system_id=\"me\"";
    lvm.with_config(us, "vgchange --addtag theirs vg").ok();
    lvm.called("none", "");
    assert_ne!(lvm.lvm("vgchange --addtag no vg").code, 0);
    lvm.with_config(us, "vgchange --addtag theirs2 vg").ok();
    assert!(lvm.report("vgs --foreign -o vg_name,vg_systemid")[0].contains("vg|me"));
    lvm.called("you", "");
    lvm.ours("take-over vg %0 %1").ok();
    lvm.lvm("vgchange --addtag more vg").ok();
    lvm.sound();
    lvm.called("me", "");
    assert_ne!(lvm.lvm("vgchange --addtag no vg").code, 0);
    lvm.called("you", "");
    lvm.ours("remove vg/lin %0 %1").ok();
    lvm.ours("remove vg/other %0 %1").ok();
    lvm.ours("remove-group vg %0 %1").ok();
    assert_eq!(lvm.report("pvs"), Vec::<String>::new());
}

#[test]
fn what_the_tools_make_is_listed_and_changed_here() {
    let Some(lvm) = Lvm::new() else { return };
    lvm.lvm("vgcreate --systemid= --physicalextentsize 1m vg %0 %1").ok();
    lvm.lvm("lvcreate -y -an -Zn -Wn -L 5m -n lin --addtag t vg").ok();
    lvm.lvm("lvcreate -y -an -Zn -Wn -L 6m -i 2 -I 16k -n str vg").ok();
    lvm.lvm("lvcreate -y -an -Zn -Wn -L 1m -p r -n ro vg").ok();
    lvm.sound();
    let list = lvm.ours("list --json %0 %1").json();
    assert_eq!((&list["group"]["system-id"], &list["group"]["ours"]), (&Value::Null, &json!(true)));
    let volumes = &list["volumes"];
    assert_eq!((&volumes[0]["size"], &volumes[0]["tags"]), (&json!(5 * MIB), &json!(["t"])));
    assert_eq!((&volumes[2]["stripes"], &volumes[2]["stripe-size"]), (&json!(2), &json!(16384)));
    assert_eq!(volumes[1]["read-only"], true);
    lvm.ours("extend vg/lin --size 9M %0 %1").ok();
    lvm.ours("extend vg/str --size +2M %0 %1").ok();
    lvm.sound();
    assert_eq!(
        lvm.report("lvs -o lv_name,lv_size -O lv_name"),
        ["lin|9437184", "ro|1048576", "str|8388608"]
    );
    // A group of nobody becomes one of this host, with all that old tools look at.
    lvm.ours("take-over vg %0 %1").ok();
    lvm.sound();
    assert_eq!(lvm.report("vgs -o vg_systemid"), ["me"]);
    let attributes = lvm.report("lvs -o lv_attr -O lv_name");
    let permissions: String = attributes.iter().filter_map(|a| a.chars().nth(1)).collect();
    assert_eq!(permissions, "wrw");
    lvm.lvm("lvextend -L +1m vg/lin").ok();
    lvm.lvm("lvremove -y vg/ro").ok();
    lvm.sound();
    assert_eq!(lvm.ours("list --json %0 %1").json()["volumes"][0]["size"], 10 * MIB);
    // What is not understood is named, and left as it is.
    lvm.lvm("vgexport vg").ok();
    let before = (lvm.env.bytes("a"), lvm.env.bytes("b"));
    for line in ["list %0 %1", "remove vg/lin %0 %1", "take-over vg %0 %1", "export-text %0 %1"] {
        lvm.ours(line).fails(1, &["EXPORTED", "not supported here"]);
    }
    lvm.ours("check %0 %1").fails(1, &["EXPORTED"]);
    assert!(before == (lvm.env.bytes("a"), lvm.env.bytes("b")));
    lvm.lvm("vgimport vg").ok();
    lvm.sound();
    // Theirs is refused like anybody's.
    lvm.ours("create-group x %0 %1").fails(1, &["of volume group vg of the system `me`"]);
}

#[test]
fn a_device_that_the_kernel_uses_is_not_taken() {
    let Some(lvm) = Lvm::new() else { return };
    let made = Command::new("mkfs.ext4").args(["-q", &lvm.loops[0]]).status();
    let mount = lvm.env.path("mnt");
    std::fs::create_dir(&mount).unwrap();
    let mounted = made.is_ok_and(|s| s.success())
        && Command::new("mount").arg(&lvm.loops[0]).arg(&mount).status().is_ok_and(|s| s.success());
    if !mounted {
        println!("skipped: nothing can be mounted here");
        return;
    }
    let run = lvm.ours("create-group vg %0 %1 --force");
    let unmounted = Command::new("umount").arg(&mount).status().unwrap().success();
    run.fails(1, &["is in use by the kernel", "lsblk"]);
    assert!(unmounted);
    lvm.ours("create-group vg %0 %1").fails(1, &["holds an ext4 file system"]);
    lvm.ours("create-group vg %0 %1 --force").ok();
    lvm.sound();
}

#[test]
fn tools_that_go_by_nothing_are_told_how_to_use_a_group() {
    let Some(lvm) = Lvm::new() else { return };
    lvm.called("none", "");
    let run = lvm.ours("create-group vg %0 %1");
    if run.err.contains("this host has no system ID") {
        println!("skipped: no /etc/machine-id");
        return;
    }
    assert!(
        run.err.contains("say system_id_source = \"machineid\" in the section global"),
        "{run:?}"
    );
    run.ok();
    assert_ne!(lvm.lvm("vgchange --addtag no vg").code, 0);
    lvm.called("machineid", "");
    lvm.lvm("vgchange --addtag yes vg").ok();
    lvm.sound();
    // Where they go by another one.
    lvm.called("x", "");
    lvm.ours("remove-group vg %0 %1 ").ok();
    let run = lvm.ours("create-group vg %0 %1 --system-id y");
    assert!(run.err.contains("say extra_system_ids = [ \"y\" ] in the section local"), "{run:?}");
    run.ok();
    assert_ne!(lvm.lvm("vgchange --addtag no vg").code, 0);
    lvm.called("x", "local/extra_system_ids=[\"y\"]");
    lvm.lvm("vgchange --addtag yes vg").ok();
    lvm.sound();
    // Where they go by none, and the group has one that was stated.
    lvm.ours("remove-group vg %0 %1 --system-id y").ok();
    lvm.called("none", "");
    let run = lvm.ours("create-group vg %0 %1 --system-id z");
    assert!(run.err.contains("\"lvmlocal\"") && run.err.contains("system_id = \"z\""), "{run:?}");
    run.ok();
    lvm.called("z", "");
    lvm.lvm("vgchange --addtag yes vg").ok();
}
