//! `cargo xtask lab xen`: Xen with a Debian dom0 under emulation, and guests whose own disk driver
//! talks to a backend in dom0. The cases are shell functions in the files of tools/lab/xen.

mod pack;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::guest;
use crate::cmd::{self, now, program, say};
use crate::suite::{self, Tally};
use crate::tools::{self, Missing};
use pack::Parts;

/// Limit for booting dom0 and ending it; the cases have limits of their own, in dom0.
const BASE: Duration = Duration::from_secs(180);

/// What one case may add to a boot on a busy machine before the machine is given up.
const EACH: Duration = Duration::from_secs(930);

/// The size of the disk that holds the guests' images in dom0.
const IMAGES: u64 = 2 << 30;

/// The size of the device that holds one image.
const DISK: u64 = 64 << 20;

/// The emulated processor: nested paging for PVH; SSE4.2 and POPCNT for x86-64-v2; no RDTSCP, which
/// TCG's SVM does wrong. TCG must be forced to offer a TSC that may be trusted: else dom0's clock is a
/// system call under load, and Xen has each RDTSC of a PVH dom0 trap.
const CPU: &str = "qemu64,+svm,+npt,-rdtscp,+pdpe1gb,+rdrand,+ssse3,+sse4.1,+sse4.2,+popcnt,\
                   +invtsc,x-force-features=on";

/// Who serves the guests' disks.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Backend {
    /// QEMU's own backend, started by the toolstack.
    Qdisk,
    /// The same, with the lab in the toolstack's place, as for polldisk.
    Qemu,
    /// `polldisk serve`.
    Polldisk,
}

/// What dom0 is: a paravirtualized machine as on XCP-ng, or one in a container of hardware.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Dom0 {
    Pv,
    Pvh,
}

/// A case: its name, and whether it is one of the few that run without `--full`.
struct Case {
    name: &'static str,
    quick: bool,
    /// The only backend that it is for.
    backend: Option<Backend>,
}

const fn quick(name: &'static str) -> Case {
    Case { name, quick: true, backend: None }
}

const fn full(name: &'static str) -> Case {
    Case { name, quick: false, backend: None }
}

/// The case that runs only when it is named, and why.
const NOT_IN_FULL: (&str, &str) = (
    "device_calls",
    "under its load a PVH dom0 may die of a triple fault, which is the emulator's; run it by --only",
);

/// One boot.
struct Boot {
    name: &'static str,
    dom0: Dom0,
    cases: &'static [Case],
}

const BOOTS: [Boot; 2] = [
    Boot {
        name: "a PV dom0",
        dom0: Dom0::Pv,
        cases: &[
            quick("interfaces"),
            quick("pv"),
            quick("pv_multi"),
            full("pvh"),
            full("hotplug"),
            full("resize"),
            full("reboot"),
            full("destroy"),
            full("two_guests"),
            full("save"),
            full("calls"),
            Case { name: "restart", quick: true, backend: Some(Backend::Polldisk) },
            Case { name: "crash", quick: true, backend: Some(Backend::Polldisk) },
            Case { name: "xl", quick: false, backend: Some(Backend::Polldisk) },
            Case { name: "hvm", quick: false, backend: Some(Backend::Polldisk) },
            Case { name: "rogue_keys", quick: false, backend: Some(Backend::Polldisk) },
            Case { name: "rogue_ring", quick: false, backend: Some(Backend::Polldisk) },
            Case { name: "rogue_storms", quick: false, backend: Some(Backend::Polldisk) },
        ],
    },
    Boot {
        name: "a PVH dom0",
        dom0: Dom0::Pvh,
        cases: &[
            full("interfaces"),
            full("driver"),
            full("device_pv"),
            full("device_pvh"),
            full("device_calls"),
        ],
    },
];

/// What the command can be told.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Run only the cases whose name contains one of these, separated by commas.
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
    /// Run all cases, not only the few that stand for the others.
    #[arg(long)]
    full: bool,
    /// Who serves the disks.
    #[arg(long, value_enum, default_value = "polldisk")]
    backend: Backend,
}

impl Args {
    fn chosen(&self, boot: &Boot) -> Vec<&'static str> {
        let named = |case: &&Case| match &self.only {
            Some(text) => text.split(',').any(|part| case.name.contains(part)),
            None => (self.full && case.name != NOT_IN_FULL.0) || case.quick,
        };
        let fits = |case: &&Case| case.backend.is_none_or(|backend| backend == self.backend);
        boot.cases.iter().filter(named).filter(fits).map(|case| case.name).collect()
    }
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
    say("lab: Xen, preparing");
    let folder = crate::cache().join("lab-xen");
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let examples = suite::build(&["--package", "xen", "--examples"])?.join("examples");
    let parts = Parts::prepare(&folder, examples.join("rogue"))?;
    let mut total = Tally::default();
    if args.full && args.only.is_none() {
        println!("skipped: lab: {}: {}", NOT_IN_FULL.0, NOT_IN_FULL.1);
        total.skipped += 1;
    }
    for boot in &BOOTS {
        let cases = args.chosen(boot);
        if cases.is_empty() {
            continue;
        }
        // One case with a PVH dom0 is about our NVMe driver alone.
        let needed = args.backend == Backend::Polldisk || boot.dom0 == Dom0::Pvh;
        let mut ours = vec![examples.join("loopback")];
        if needed {
            ours.push(suite::build_polldisk()?);
        }
        let start = now();
        let once = || run_boot(boot, args.backend, &parts, &folder, &ours, &cases);
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
    backend: Backend,
    parts: &Parts,
    folder: &Path,
    ours: &[PathBuf],
    cases: &[&str],
) -> Result<Tally> {
    let initramfs = folder.join("initramfs");
    fs::write(&initramfs, parts.dom0(ours, boot.dom0 == Dom0::Pvh)?)?;
    let images = folder.join("images.img");
    fs::File::create(&images)?.set_len(IMAGES)?;
    let mut mke2fs = tools::command("mke2fs");
    cmd::ok(mke2fs.args(["-q", "-t", "ext4", "-F", "-E", "lazy_itable_init=1"]).arg(&images))?;
    let backend = match backend {
        Backend::Qdisk => "qdisk",
        Backend::Qemu => "qemu",
        Backend::Polldisk => "polldisk",
    };
    // QEMU separates modules by commas.
    let words = format!("console=hvc0 quiet panic=-1 backend={backend} cases={}", cases.join(":"));
    let module =
        |path: &Path, words: &str| format!("{} {words}", path.display()).replace(',', ",,");
    let hypervisor = match boot.dom0 {
        Dom0::Pv => "",
        Dom0::Pvh => "dom0=pvh iommu=no-sharept,no-intremap",
    };
    let drive = |name: &str, path: &Path| {
        format!("file={},format=raw,if=none,id={name},cache=unsafe,discard=unmap", path.display())
    };
    let mut qemu = parts.machine.bare_emulator();
    qemu.args(["-machine", "q35", "-smp", "2", "-m", "3072"])
        .args(["-cpu", CPU])
        .arg("-kernel")
        .arg(&parts.xen)
        .args(["-append", &format!("console=com1 com1=115200,8n1 dom0_mem=1024M,max:1024M dom0_max_vcpus=1 sched=credit2 {hypervisor}")])
        .arg("-initrd")
        .arg(format!("{},{}", module(&parts.kernel, &words), module(&initramfs, "")))
        .args(["-drive", &drive("images", &images)])
        .args(["-device", "nvme,serial=IMAGES,drive=images,addr=3"]);
    if boot.dom0 == Dom0::Pvh {
        let disk = folder.join("disk.img");
        fs::File::create(&disk)?.set_len(DISK)?;
        qemu.args(["-device", "amd-iommu,intremap=off"])
            .args(["-drive", &drive("disk", &disk)])
            .args(["-device", "nvme,serial=DISK,drive=disk,addr=4"]);
    }
    let limit = BASE + EACH * u32::try_from(cases.len())?;
    let tally = guest::run(qemu, folder, cases, &folder.join("console"), limit)?;
    if tally.failed > 0 {
        keep(&images, folder)?;
    }
    Ok(tally)
}

/// Takes the files that failed cases left in the folder `failed` of the images' disk.
fn keep(images: &Path, folder: &Path) -> Result<()> {
    let kept = folder.join("failed");
    if kept.exists() {
        fs::remove_dir_all(&kept)?;
    }
    let what = format!("rdump /failed {}", folder.display());
    match tools::find("debugfs") {
        Some(debugfs) => {
            cmd::ok(program(&debugfs.to_string_lossy(), ["-R", &what]).arg(images))?;
            say(&format!("lab: what failed cases left is in {}", kept.display()));
        }
        None => say(&format!("lab: what failed cases left is in {}:/failed", images.display())),
    }
    Ok(())
}
