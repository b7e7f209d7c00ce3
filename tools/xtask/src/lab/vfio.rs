//! `cargo xtask lab nvme`: NVMe devices of QEMU behind its IOMMU, in a guest with a Debian kernel that
//! hands them to vfio-pci. The cases are shell functions in tools/lab/vfio/cases.sh.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::{guest, module};
use crate::cmd::{now, say};
use crate::qemu::{BOOT, Machine};
use crate::suite::{self, Tally};
use crate::tools::{self, Missing};

const INIT: &str = include_str!("../../../lab/vfio/init.sh");
const CASES: &str = include_str!("../../../lab/vfio/cases.sh");

/// What the guest loads: VFIO for PCI devices behind an IOMMU; logical volumes, images as block devices
/// and a file system, by which the kernel gets at what polldisk wrote.
const DRIVERS: [&str; 5] = ["vfio-pci", "vfio_iommu_type1", "dm-mod", "nbd", "ext4"];

/// One boot: what it is called, its cases.
struct Boot {
    name: &'static str,
    iommu: bool,
    cases: &'static [&'static str],
}

const BOOTS: [Boot; 3] = [
    Boot {
        name: "an IOMMU: data",
        iommu: true,
        cases: &[
            "refusals",
            "device",
            "kernel_writes",
            "kernel_reads",
            "namespaces",
            "two_devices",
            "client",
            "qcow2",
            "stripe",
            "volumes",
            "bench",
            "compare",
            "memlock",
        ],
    },
    Boot {
        name: "an IOMMU: trouble",
        iommu: true,
        cases: &["errors", "ladder", "unbind", "silent", "unplug"],
    },
    Boot {
        name: "no IOMMU",
        iommu: false,
        cases: &["noiommu_refused", "noiommu_huge", "noiommu_small", "noiommu_unplug"],
    },
];

/// What the command can be told.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Run only the cases whose name contains one of these, separated by commas.
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
}

/// Runs the command; false when a case failed.
pub(crate) fn command(args: &Args) -> Result<bool> {
    let tally = match run(args) {
        Err(error) => match error.downcast_ref::<Missing>() {
            Some(missing) => {
                println!("skipped: lab: {missing}");
                Tally { skipped: 1, ..Tally::default() }
            }
            None => return Err(error),
        },
        Ok(tally) => tally,
    };
    println!("{tally}");
    Ok(tally.good())
}

fn run(args: &Args) -> Result<Tally> {
    const PROGRAMS: [&str; 5] = ["qemu-img", "qemu-io", "qemu-nbd", "mke2fs", "lvm"];
    tools::need(&PROGRAMS)?;
    let machine = Machine::prepare()?;
    let folder = crate::cache().join("lab-vfio");
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let mut paths = vec![suite::build_polldisk()?];
    paths
        .push(suite::build(&["--package", "node", "--example", "ladder"])?.join("examples/ladder"));
    paths.extend(PROGRAMS.map(|name| tools::find(name).unwrap_or_default()));
    // One case needs it, which says so where it is not.
    if tools::need(&["fio"]).is_ok() {
        paths.extend(tools::find("fio"));
    }
    let programs = guest::programs(&paths)?;
    let mut total = Tally::default();
    for boot in &BOOTS {
        let chosen = |case: &&str| {
            args.only.as_ref().is_none_or(|text| text.split(',').any(|t| case.contains(t)))
        };
        let cases: Vec<&str> = boot.cases.iter().copied().filter(chosen).collect();
        if cases.is_empty() {
            continue;
        }
        let start = now();
        let once = || run_boot(boot, &machine, &folder, &programs, &cases);
        let tally = match guest::despite_crash(once) {
            Err(error) if error.chain().any(|e| e.is::<Missing>()) => {
                println!("skipped: lab: all cases with {}: {error:#}", boot.name);
                Tally { skipped: cases.len() as u64, ..Tally::default() }
            }
            done => done?,
        };
        let seconds = start.elapsed().as_secs_f64();
        say(&format!("lab: boot with {}: {tally} in {seconds:.1} s", boot.name));
        total.add(&tally);
    }
    if total == Tally::default() {
        bail!("no case has this text in its name");
    }
    Ok(total)
}

fn run_boot(
    boot: &Boot,
    machine: &Machine,
    folder: &Path,
    programs: &BTreeMap<String, Vec<u8>>,
    cases: &[&str],
) -> Result<Tally> {
    let mut files: Vec<(&str, &[u8])> = vec![("cases.sh", CASES.as_bytes())];
    files.extend(programs.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice())));
    let module = match boot.iommu {
        true => Vec::new(),
        false => module::vfio_without_iommu(&machine.release())?,
    };
    if !boot.iommu {
        files.push(("lib/vfio.ko", &module));
        files.push(("lib/vfio.ko.options", b"enable_unsafe_noiommu_mode=1"));
    }
    let initramfs = folder.join("initramfs");
    fs::write(&initramfs, machine.initramfs(INIT, &DRIVERS, &files)?)?;
    let words = format!("intel_iommu=on cases={}", cases.join(","));
    let mut qemu = machine.emulator(&initramfs, &words);
    qemu.args(["-machine", "q35", "-smp", "2", "-m", "4096"]);
    if boot.iommu {
        qemu.args(["-device", "intel-iommu,intremap=on"]);
    }
    let disk = |name: &str, mib: u64| -> Result<String> {
        let path: PathBuf = folder.join(format!("{name}.img"));
        fs::File::create(&path)?.set_len(mib << 20)?;
        Ok(format!("file,node-name={name},filename={},discard=unmap", path.display()))
    };
    let disks = [("a", 16), ("b1", 8), ("b3", 8), ("s", 16), ("hot", 16), ("e", 16)];
    for (name, mib) in disks.into_iter().chain([("v1", 40), ("v2", 40)]) {
        qemu.args(["-blockdev", &disk(name, mib)?]);
    }
    // Reads of the block at 1 MiB and writes of the one at 2 MiB fail.
    qemu.args([
        "-blockdev",
        "blkdebug,node-name=bad,image=e,inject-error.0.event=none,inject-error.0.iotype=read,\
         inject-error.0.sector=2048,inject-error.1.event=none,inject-error.1.iotype=write,\
         inject-error.1.sector=4096",
    ]);
    // Slow enough that requests are with the device while something happens to it.
    qemu.args(["-object", "throttle-group,id=slow,x-iops-total=500"])
        .args(["-blockdev", "throttle,node-name=slow,throttle-group=slow,file=s"]);
    let blocks = "logical_block_size=4096,physical_block_size=4096";
    for device in [
        "nvme,id=a,serial=A,drive=a",
        "nvme,id=b,serial=B,mdts=1",
        "nvme-ns,bus=b,drive=b1,nsid=1",
        &format!("nvme-ns,bus=b,drive=b3,nsid=3,{blocks}"),
        "nvme,id=s,serial=S,drive=slow",
        "nvme,id=v,serial=V",
        "nvme-ns,bus=v,drive=v1,nsid=1",
        "nvme-ns,bus=v,drive=v2,nsid=2",
        "nvme,id=e,serial=E,drive=bad",
        "pcie-root-port,id=rp0,chassis=1,slot=1",
        "nvme,id=hot,serial=H,drive=hot,bus=rp0",
    ] {
        qemu.args(["-device", device]);
    }
    guest::run(qemu, folder, cases, &folder.join("console"), BOOT)
}
