//! Devices that hold something: `create-group` names it and refuses, and takes them if told to.

use super::*;

#[test]
fn each_kind_is_refused_and_nothing_of_it_lost() {
    let env = Env::new();
    let len = 8 * MIB;
    let md = b"\xfc\x4e\x2b\xa9";
    let kinds: [(u64, &[u8], &str); 20] = [
        (512, b"EFI PART", "a GPT partition table"),
        (len - 512, b"EFI PART", "the copy of a GPT partition table"),
        (510, b"\x55\xaa", "a boot sector"),
        (1080, b"\x53\xef", "an ext2 file system"),
        (0, b"XFSB", "an XFS file system"),
        (65600, b"_BHRfS_M", "a btrfs file system"),
        (0, b"LUKS\xba\xbe", "a LUKS encrypted device"),
        (len - 65536, md, "an md RAID member (superblock 0.90)"),
        (len - 8192, md, "an md RAID member (superblock 1.0)"),
        (0, md, "an md RAID member (superblock 1.1)"),
        (4096, md, "an md RAID member (superblock 1.2)"),
        (4086, b"SWAPSPACE2", "swap space"),
        (65526, b"SWAPSPACE2", "swap space"),
        (0, b"QFI\xfb", "a QCOW2 image"),
        (0, b"conectix", "a VHD image"),
        (len - 512, b"conectix", "a VHD image"),
        (0, b"LABELONE", "an LVM2 physical volume"),
        (1536, b"LABELONE", "an LVM2 physical volume"),
        (3, b"NTFS    ", "an NTFS file system"),
        (
            4120,
            b"\xc6\x85\x73\xf6\x4e\x1a\x45\xca\x82\x65\xf5\x7f\x48\xba\x6d\x81",
            "a bcache device",
        ),
    ];
    for (offset, bytes, what) in kinds {
        env.disk("good", 8);
        let file = env.disk("bad", 8);
        file.write_all_at(bytes, offset).unwrap();
        let before = env.bytes("bad");
        let text = format!("bad: holds {what}");
        let at = format!("at byte {offset}");
        env.run("create-group vg good bad --metadata-size 1M").fails(1, &[&text, &at, "--force"]);
        assert!(before == env.bytes("bad") && env.bytes("good").iter().all(|&b| b == 0), "{what}");
        let run = env.run("create-group vg good bad --metadata-size 1M --force");
        assert!(run.err.contains(&text) && run.err.contains("it is overwritten"), "{run:?}");
        run.ok();
        env.run("check good bad").ok();
        // And nothing else finds it any more.
        let mut read = vec![0; bytes.len()];
        file.read_exact_at(&mut read, offset).unwrap();
        assert_ne!(read, bytes, "{what}");
    }
}

#[test]
fn what_real_programs_make_is_seen() {
    let env = Env::new();
    let lines = [
        ("mkfs.ext4 -q -F bad", "an ext4 file system"),
        ("mkfs.ext3 -q -F bad", "an ext3 file system"),
        ("mkfs.ext2 -q -F bad", "an ext2 file system"),
        ("mkswap bad", "swap space"),
        ("mkfs.xfs -q -f bad", "an XFS file system"),
        ("mkfs.btrfs -q -f bad", "a btrfs file system"),
        ("mkfs.vfat bad", "a FAT file system"),
        ("qemu-img create -q -f qcow2 bad 64M", "a QCOW2 image"),
        ("qemu-img create -q -f vpc -o subformat=fixed bad 64M", "a VHD image"),
        ("qemu-img create -q -f vpc bad 64M", "a VHD image"),
        ("cryptsetup -q luksFormat --type luks2 bad lvm.conf", "a LUKS encrypted device"),
        ("sgdisk -o bad", "a GPT partition table"),
    ];
    let mut seen = 0;
    for (line, what) in lines {
        let file = env.disk("bad", 300);
        let mut words = line.split_whitespace();
        let mut command = Command::new(words.next().unwrap());
        command.args(words).current_dir(env.dir.path()).stdin(Stdio::null());
        command.env("PATH", format!("{}:/sbin:/usr/sbin", std::env::var("PATH").unwrap()));
        // Not all of them are everywhere.
        if !command.output().is_ok_and(|out| out.status.success()) {
            println!("skipped: {line}");
            continue;
        }
        let file = File::options().write(true).open(env.path("bad")).unwrap_or(file);
        let len = file.metadata().unwrap().len().max(64 * MIB);
        // A VHD's footer is at the end.
        if !line.contains("fixed") {
            file.set_len(len).unwrap();
        }
        env.run("create-group vg bad").fails(1, &[&format!("bad: holds {what}")]);
        seen += 1;
    }
    println!("{seen} kinds were made by their own programs");
}
