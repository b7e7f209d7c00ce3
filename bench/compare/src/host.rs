//! What a host is, as far as its files tell: for reports, and for the doctor, which judges it.

use std::path::Path;

use node::{HostFiles, printable};

use crate::results::Host;

pub(crate) const CPUS: &str = "sys/devices/system/cpu";

/// What the files of a host do not tell.
#[derive(Clone, Copy, Debug, Default)]
pub struct About<'a> {
    /// Processors of generator and server; `None`: not pinned.
    pub cores: Option<[usize; 2]>,
    /// Where images lie: an absolute path.
    pub scratch: Option<&'a Path>,
    /// What was done to the device before, as whoever measures says.
    pub preconditioning: Option<&'a str>,
}

/// Describes a host for a report. What cannot be found out is said to be unknown.
pub fn describe(files: &HostFiles, about: &About<'_>) -> Host {
    let mut facts: Vec<(String, String)> = Vec::new();
    let mut fact = |name: &str, value: Option<String>| {
        facts.push((name.to_owned(), value.unwrap_or_else(|| "unknown".to_owned())));
    };
    fact("Machine", machine(files));
    fact("Firmware", firmware(files));
    fact("CPU", cpu(files));
    fact("Governor", governor(files));
    fact("Turbo", turbo(files).map(|on| if on { "on" } else { "off" }.to_owned()));
    fact("SMT", smt(files).map(|on| if on { "on" } else { "off" }.to_owned()));
    fact("Idle states", idle(files));
    let isolated = files.line(&format!("{CPUS}/isolated")).unwrap_or_else(|| "none".to_owned());
    fact("Isolated processors", Some(isolated));
    fact("Mitigations", mitigations(files));
    fact("Memory", memory(files));
    fact("Operating system", os(files));
    fact("Kernel", kernel(files));
    fact("Kernel parameters", parameters(files));
    fact("Xen or other hypervisor", Some(hypervisor(files).unwrap_or_else(|| "none".to_owned())));
    fact("Clock source", clock(files, "current"));
    let drives = drives(files);
    for drive in &drives {
        fact("NVMe drive", Some(drive.describe()));
    }
    if drives.is_empty() {
        fact("NVMe drive", Some("none".to_owned()));
    }
    if let Some(scratch) = about.scratch {
        fact("Images lie on", mount_of(files, scratch).map(|m| m.describe(files)));
    }
    let said = about.preconditioning.map(printable);
    fact("Preconditioning", Some(said.unwrap_or_else(|| "not stated".to_owned())));
    let processors = files.cpus(&format!("{CPUS}/online")).len();
    Host { facts, processors, cores: about.cores }
}

fn machine(files: &HostFiles) -> Option<String> {
    joined(files, &["sys_vendor", "product_name"])
}

fn firmware(files: &HostFiles) -> Option<String> {
    joined(files, &["bios_vendor", "bios_version", "bios_date"])
}

fn joined(files: &HostFiles, names: &[&str]) -> Option<String> {
    let of = |name: &&str| files.line(&format!("sys/class/dmi/id/{name}"));
    let parts: Vec<String> = names.iter().filter_map(of).collect();
    (!parts.is_empty()).then(|| parts.join(" "))
}

/// A value of /proc/cpuinfo, of the first processor that has one.
fn cpuinfo(files: &HostFiles, key: &str) -> Option<String> {
    let text = files.text("proc/cpuinfo")?;
    let value = |line: &str| {
        let (name, value) = line.split_once(':')?;
        (name.trim() == key).then(|| printable(value.trim()))
    };
    text.lines().find_map(value).filter(|v| !v.is_empty())
}

fn cpu(files: &HostFiles) -> Option<String> {
    let mut text = cpuinfo(files, "model name")?;
    let online = files.cpus(&format!("{CPUS}/online")).len();
    text.push_str(&format!(", {online} processors"));
    let nodes = nodes(files).len();
    if nodes > 1 {
        text.push_str(&format!(" on {nodes} NUMA nodes"));
    }
    if let Some(microcode) = cpuinfo(files, "microcode") {
        text.push_str(&format!(", microcode {microcode}"));
    }
    Some(text)
}

/// The NUMA nodes.
pub(crate) fn nodes(files: &HostFiles) -> Vec<u32> {
    let number = |name: String| name.strip_prefix("node")?.parse().ok();
    files.names("sys/devices/system/node").into_iter().filter_map(number).collect()
}

/// The folders of processors in sysfs.
pub(crate) fn cpu_folders(files: &HostFiles) -> Vec<String> {
    let is_cpu = |n: &String| n.strip_prefix("cpu").is_some_and(|n| n.parse::<u32>().is_ok());
    let names = files.names(CPUS).into_iter().filter(is_cpu);
    names.map(|name| format!("{CPUS}/{name}")).collect()
}

/// The governors in use; none where the kernel does not change speeds.
pub(crate) fn governors(files: &HostFiles) -> Vec<String> {
    let of = |cpu: &String| files.line(&format!("{cpu}/cpufreq/scaling_governor"));
    let mut governors: Vec<String> = cpu_folders(files).iter().filter_map(of).collect();
    governors.sort();
    governors.dedup();
    governors
}

fn governor(files: &HostFiles) -> Option<String> {
    let all = governors(files);
    if all.is_empty() {
        return Some("none: the kernel does not change the processors' speed".to_owned());
    }
    let of = |file: &str| files.line(&format!("{CPUS}/cpu0/cpufreq/{file}"));
    let mut text = all.join(", ");
    if let Some(driver) = of("scaling_driver") {
        text.push_str(&format!(" ({driver})"));
    }
    let mhz = |file: &str| Some(of(file)?.parse::<u64>().ok()? / 1000);
    if let (Some(least), Some(most)) = (mhz("scaling_min_freq"), mhz("scaling_max_freq")) {
        text.push_str(&format!(", {least} to {most} MHz"));
    }
    Some(text)
}

/// Whether processors may run faster than their rated speed, if the kernel can tell.
pub(crate) fn turbo(files: &HostFiles) -> Option<bool> {
    if let Some(off) = files.number(&format!("{CPUS}/intel_pstate/no_turbo")) {
        return Some(off == 0);
    }
    files.number(&format!("{CPUS}/cpufreq/boost")).map(|on| on != 0)
}

/// Whether processors share cores.
pub(crate) fn smt(files: &HostFiles) -> Option<bool> {
    files.number(&format!("{CPUS}/smt/active")).map(|active| active != 0)
}

/// An idle state that is not switched off.
pub(crate) struct Idle {
    pub(crate) name: String,
    /// Microseconds to come back from it.
    pub(crate) latency: u64,
}

/// The idle states of the first processor.
pub(crate) fn idle_states(files: &HostFiles) -> Vec<Idle> {
    let folder = format!("{CPUS}/cpu0/cpuidle");
    let state = |name: String| {
        let of = |file: &str| format!("{folder}/{name}/{file}");
        let off = files.number(&of("disable")).is_some_and(|n| n != 0);
        let state = Idle { name: files.line(&of("name"))?, latency: files.number(&of("latency"))? };
        (!off).then_some(state)
    };
    files.names(&folder).into_iter().filter_map(state).collect()
}

pub(crate) fn idle_driver(files: &HostFiles) -> Option<String> {
    files.line(&format!("{CPUS}/cpuidle/current_driver")).filter(|d| d != "none")
}

fn idle(files: &HostFiles) -> Option<String> {
    let driver = idle_driver(files)?;
    let states = idle_states(files);
    let states: Vec<String> =
        states.iter().map(|s| format!("{} ({} µs)", s.name, s.latency)).collect();
    Some(format!("{driver}: {}", if states.is_empty() { "none".into() } else { states.join(", ") }))
}

/// What the kernel does about faults of processors, by fault.
pub(crate) fn vulnerabilities(files: &HostFiles) -> Vec<(String, String)> {
    let folder = format!("{CPUS}/vulnerabilities");
    let of = |name: String| Some((name.clone(), files.line(&format!("{folder}/{name}"))?));
    files.names(&folder).into_iter().filter_map(of).collect()
}

fn mitigations(files: &HostFiles) -> Option<String> {
    let all = vulnerabilities(files);
    let against: Vec<&str> = all
        .iter()
        .filter(|(_, how)| how.starts_with("Mitigation"))
        .map(|(what, _)| what.as_str())
        .collect();
    match (all.is_empty(), against.is_empty()) {
        (true, _) => None,
        (_, true) => Some("none active".to_owned()),
        _ => Some(against.join(", ")),
    }
}

fn memory(files: &HostFiles) -> Option<String> {
    let text = files.text("proc/meminfo")?;
    let kib = |key: &str| -> Option<u64> {
        let line = text.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix(':'))?;
        line.split_whitespace().next()?.parse().ok()
    };
    let total = kib("MemTotal")? as f64 / 1_048_576.0;
    let huge = kib("HugePages_Total").unwrap_or(0);
    let size = kib("Hugepagesize").unwrap_or(0);
    Some(format!("{total:.1} GiB; huge pages: {huge} of {size} KiB"))
}

fn os(files: &HostFiles) -> Option<String> {
    let text = files.text("etc/os-release")?;
    let name = text.lines().find_map(|l| l.strip_prefix("PRETTY_NAME="))?;
    Some(printable(name.trim_matches('"')))
}

fn kernel(files: &HostFiles) -> Option<String> {
    let of = |file: &str| files.line(&format!("proc/sys/kernel/{file}"));
    let release = of("osrelease")?;
    Some(of("version").map_or(release.clone(), |version| format!("{release} ({version})")))
}

/// Beginnings of the kernel's parameters that change what is measured. The rest is left out: a page that is
/// published need not tell how a host is reached.
const TELLING: [&str; 24] = [
    "amd_iommu",
    "amd_pstate",
    "clocksource",
    "cpuidle",
    "default_hugepagesz",
    "hugepages",
    "idle",
    "intel_idle",
    "intel_iommu",
    "intel_pstate",
    "iommu",
    "irqaffinity",
    "isolcpus",
    "mitigations",
    "nohz",
    "nosmt",
    "nvme",
    "pcie_aspm",
    "preempt",
    "processor.",
    "rcu_nocb",
    "spec",
    "transparent_hugepage",
    "tsc",
];

/// Parameters that the kernel was booted with, as far as they matter here.
fn parameters(files: &HostFiles) -> Option<String> {
    let line = files.line("proc/cmdline")?;
    // What stands after two hyphens is for the first process.
    let words = line.split_whitespace().take_while(|word| *word != "--");
    let telling: Vec<&str> = words.filter(|w| TELLING.iter().any(|t| w.starts_with(t))).collect();
    Some(if telling.is_empty() { "none that matters".to_owned() } else { telling.join(" ") })
}

/// Under what the kernel runs; `None`: on the machine itself.
pub(crate) fn hypervisor(files: &HostFiles) -> Option<String> {
    let of = |file: &str| files.line(&format!("sys/hypervisor/{file}"));
    if of("type").as_deref() == Some("xen") {
        let version = ["major", "minor", "extra"].map(|part| of(&format!("version/{part}")));
        let version = match version {
            [Some(major), Some(minor), extra] => {
                format!("{major}.{minor}{}", extra.unwrap_or_default())
            }
            _ => "of unknown version".to_owned(),
        };
        let domain = if is_dom0(files) { "dom0" } else { "domain" };
        let kind = of("guest_type").unwrap_or_else(|| "kind unknown".to_owned());
        return Some(format!("Xen {version}, {domain} ({kind})"));
    }
    let flags = cpuinfo(files, "flags").unwrap_or_default();
    let virtual_machine = flags.split_whitespace().any(|f| f == "hypervisor");
    virtual_machine.then(|| match machine(files) {
        Some(machine) => format!("a virtual machine ({machine})"),
        None => "a virtual machine".to_owned(),
    })
}

/// Whether this is Xen's own domain, from which guests are served.
pub(crate) fn is_dom0(files: &HostFiles) -> bool {
    files.text("proc/xen/capabilities").is_some_and(|c| c.contains("control_d"))
}

/// A clock source: the `current` one or those `available`.
pub(crate) fn clock(files: &HostFiles, which: &str) -> Option<String> {
    files.line(&format!("sys/devices/system/clocksource/clocksource0/{which}_clocksource"))
}

/// An NVMe function.
pub(crate) struct Drive {
    pub(crate) address: String,
    /// The kernel's controller, like `nvme0`, if the kernel has it.
    pub(crate) name: Option<String>,
    pub(crate) model: Option<String>,
    pub(crate) driver: Option<String>,
    firmware: Option<String>,
    /// The node it is at; `None` if the firmware does not say.
    pub(crate) node: Option<u32>,
    bytes: u64,
}

impl Drive {
    fn describe(&self) -> String {
        let unknown = || "of unknown model".to_owned();
        let mut text = format!("{}: {}", self.address, self.model.clone().unwrap_or_else(unknown));
        if self.bytes > 0 {
            text.push_str(&format!(", {:.0} GB", self.bytes as f64 / 1e9));
        }
        if let Some(firmware) = &self.firmware {
            text.push_str(&format!(", firmware {firmware}"));
        }
        if let Some(node) = self.node {
            text.push_str(&format!(", NUMA node {node}"));
        }
        let driver = self.driver.as_deref().unwrap_or("none");
        text.push_str(&format!(", driver {driver}"));
        text
    }
}

/// The NVMe functions of a host, by address.
pub(crate) fn drives(files: &HostFiles) -> Vec<Drive> {
    const ALL: &str = "sys/bus/pci/devices";
    let drive = |address: String| {
        let of = |file: &str| format!("{ALL}/{address}/{file}");
        if !files.line(&of("class"))?.starts_with("0x0108") {
            return None;
        }
        let name = files.names(&of("nvme")).into_iter().next();
        let says = |file: &str| files.line(&of(&format!("nvme/{}/{file}", name.as_deref()?)));
        let ids = ["vendor", "device"].map(|file| files.line(&of(file)));
        let model = says("model").or(match ids {
            [Some(vendor), Some(device)] => Some(format!("PCI {vendor}:{device}")),
            _ => None,
        });
        let driver = files.link(&of("driver"));
        let sectors = |disk: &String| files.number(&format!("sys/block/{disk}/size"));
        let disks = name.as_ref().map(|n| (n, files.names("sys/block")));
        let bytes = disks.map_or(0, |(name, disks)| {
            let mine = disks.iter().filter(|d| d.starts_with(&format!("{name}n")));
            mine.filter_map(sectors).fold(0u64, |sum, n| sum.saturating_add(n.saturating_mul(512)))
        });
        Some(Drive {
            model,
            firmware: says("firmware_rev"),
            driver: driver.and_then(|d| Some(printable(d.rsplit('/').next()?))),
            node: files.line(&of("numa_node")).and_then(|n| n.parse().ok()),
            bytes,
            name,
            address,
        })
    };
    files.names(ALL).into_iter().filter_map(drive).collect()
}

/// Where a path lies.
pub(crate) struct Mount {
    /// The file system, like `ext4`.
    pub(crate) kind: String,
    source: String,
    /// `major:minor` of its device.
    device: String,
}

impl Mount {
    fn describe(&self, files: &HostFiles) -> String {
        let name = files.link(&format!("sys/dev/block/{}", self.device));
        let name = name.and_then(|l| Some(printable(l.rsplit('/').next()?)));
        match name {
            Some(name) => format!("{} on {} ({name})", self.kind, self.source),
            None => format!("{} ({})", self.kind, self.source),
        }
    }
}

/// The mount that a path, which is absolute, lies in.
pub(crate) fn mount_of(files: &HostFiles, path: &Path) -> Option<Mount> {
    let text = files.text("proc/self/mountinfo")?;
    let mount = |line: &str| {
        // 36 35 98:0 / /mnt rw,noatime master:1 - ext3 /dev/root rw; see proc(5).
        let (left, right) = line.split_once(" - ")?;
        let mut left = left.split(' ');
        let (device, point) = (left.nth(2)?, left.nth(1)?);
        let mut right = right.split(' ');
        let (kind, source) = (right.next()?, right.next()?);
        // A blank in a name is written in octal.
        let point = point.replace("\\040", " ");
        let [kind, source, device] = [kind, source, device].map(printable);
        path.starts_with(&point).then_some((point.len(), Mount { kind, source, device }))
    };
    // Of those that are as deep, the last one is on top.
    text.lines().filter_map(mount).max_by_key(|(depth, _)| *depth).map(|(_, mount)| mount)
}
