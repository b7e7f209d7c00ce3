//! Hosts made of files, one fault each.

use std::fs;
use std::os::unix::fs::symlink;

use super::*;
use crate::host::{About, describe};

struct Fake(tempfile::TempDir);

const CPU: &str = "sys/devices/system/cpu";
const FUNCTION: &str = "sys/bus/pci/devices/0000:5e:00.0";

impl Fake {
    /// A host on which there is nothing to say against figures: four processors on two nodes, two of
    /// them isolated, and an Optane drive of the kernel's.
    fn ready() -> Fake {
        let fake = Fake(tempfile::tempdir().unwrap());
        fake.file("proc/cmdline", "quiet isolcpus=2-3 nohz_full=2-3 rcu_nocbs=2-3 key=1 -- idle=x\n")
            .file(
                "proc/cpuinfo",
                "processor\t: 0\nmodel name\t: Xeon <Gold>\nflags\t\t: fpu vme\nmicrocode\t: 0x1\n",
            )
            .file("proc/stat", "cpu  100 0 100 9800 0 0 0 1 0 0\ncpu0 1 1 1 1\n")
            .file("proc/loadavg", "0.04 0.10 0.20 1/300 4242\n")
            .file("proc/swaps", "Filename Type Size Used Priority\n")
            .file("proc/meminfo", "MemTotal: 16777216 kB\nHugePages_Total: 4\nHugepagesize: 2048 kB\n")
            .file("proc/self/status", "CapEff:\t0000000000000000\n")
            .file("proc/sys/kernel/perf_event_paranoid", "1\n")
            .file("proc/sys/kernel/osrelease", "6.1.0\n")
            .file("proc/sys/kernel/version", "#1 SMP\n")
            .file("proc/self/mountinfo", "20 1 8:1 / / rw - ext4 /dev/sda1 rw\n21 20 259:1 / /fast\\040disk rw - xfs /dev/nvme0n1 rw\n")
            .file("proc/interrupts", "   CPU0\n  30:  1  PCI-MSI 1-edge nvme0q0\n  31:  1  PCI-MSI 1-edge nvme0q1\n")
            .file("proc/irq/30/smp_affinity_list", "0-3\n")
            .file("proc/irq/31/smp_affinity_list", "0-3\n")
            .file("proc/irq/31/effective_affinity_list", "1\n")
            .file("proc/7/comm", "sshd\n")
            .file("etc/os-release", "NAME=x\nPRETTY_NAME=\"Debian 12\"\n")
            .file("sys/class/dmi/id/sys_vendor", "ACME\n")
            .file("sys/class/dmi/id/product_name", "R1\n")
            .file("sys/class/dmi/id/bios_version", "2.1\n")
            .file(&format!("{CPU}/online"), "0-3\n")
            .file(&format!("{CPU}/isolated"), "2-3\n")
            .file(&format!("{CPU}/nohz_full"), "2-3\n")
            .file(&format!("{CPU}/intel_pstate/no_turbo"), "1\n")
            .file(&format!("{CPU}/smt/active"), "0\n")
            .file(&format!("{CPU}/cpuidle/current_driver"), "intel_idle\n")
            .file(&format!("{CPU}/cpu0/cpuidle/state0/name"), "POLL\n")
            .file(&format!("{CPU}/cpu0/cpuidle/state0/latency"), "0\n")
            .file(&format!("{CPU}/cpu0/cpuidle/state1/name"), "C1\n")
            .file(&format!("{CPU}/cpu0/cpuidle/state1/latency"), "2\n")
            .file(&format!("{CPU}/cpu0/cpuidle/state2/name"), "C6\n")
            .file(&format!("{CPU}/cpu0/cpuidle/state2/latency"), "133\n")
            .file(&format!("{CPU}/cpu0/cpuidle/state2/disable"), "1\n")
            .file(&format!("{CPU}/cpu0/cpufreq/scaling_governor"), "performance\n")
            .file(&format!("{CPU}/cpu0/cpufreq/scaling_driver"), "intel_pstate\n")
            .file(&format!("{CPU}/cpu0/cpufreq/scaling_min_freq"), "1200000\n")
            .file(&format!("{CPU}/cpu0/cpufreq/scaling_max_freq"), "3500000\n")
            .file(&format!("{CPU}/cpu0/thermal_throttle/core_throttle_count"), "0\n")
            .file(&format!("{CPU}/cpu0/thermal_throttle/package_throttle_count"), "0\n")
            .file(&format!("{CPU}/vulnerabilities/meltdown"), "Mitigation: PTI\n")
            .file(&format!("{CPU}/vulnerabilities/l1tf"), "Not affected\n")
            .file("sys/devices/system/clocksource/clocksource0/current_clocksource", "tsc\n")
            .file("sys/devices/system/node/node0/cpulist", "0-1\n")
            .file("sys/devices/system/node/node1/cpulist", "2-3\n")
            .file("sys/kernel/mm/transparent_hugepage/enabled", "always [madvise] never\n")
            .file("sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages", "512\n")
            .file("sys/bus/event_source/devices/cpu/type", "4\n")
            .file(&format!("{FUNCTION}/class"), "0x010802\n")
            .file(&format!("{FUNCTION}/vendor"), "0x8086\n")
            .file(&format!("{FUNCTION}/device"), "0x2700\n")
            .file(&format!("{FUNCTION}/numa_node"), "1\n")
            .file(&format!("{FUNCTION}/nvme/nvme0/model"), "INTEL SSDPED1D480GA     \n")
            .file(&format!("{FUNCTION}/nvme/nvme0/firmware_rev"), "E2010325\n")
            .file("sys/block/nvme0n1/size", "937703088\n");
        symlink("../../../bus/pci/drivers/nvme", fake.0.path().join(FUNCTION).join("driver"))
            .unwrap();
        for program in ["fio", "perf", "strace", "valgrind", "qemu-storage-daemon", "qemu-nbd"] {
            fake.file(&format!("usr/bin/{program}"), "");
        }
        for program in ["nbdkit", "tap-ctl", "qemu-dp", "spdk_nvme_perf"] {
            fake.file(&format!("usr/sbin/{program}"), "");
        }
        fake
    }

    fn file(&self, path: &str, text: &str) -> &Fake {
        let path = self.0.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
        self
    }

    fn remove(&self, path: &str) -> &Fake {
        let path = self.0.path().join(path);
        if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) }.unwrap();
        self
    }

    fn files(&self) -> HostFiles {
        HostFiles::below(self.0.path())
    }

    fn look(&self) -> Report {
        let programs = vec!["/usr/bin".into(), "/usr/sbin".into()];
        look(&self.files(), &Options { scratch: "/fast disk/images".into(), programs })
    }

    /// The state of a check, and that what was found and what to do hold a part.
    #[track_caller]
    fn says(&self, name: &str, state: State, found: &str, advice: &str) -> &Fake {
        let report = self.look();
        let check = report.checks.iter().find(|c| c.name == name);
        let check = check.unwrap_or_else(|| panic!("no {name}"));
        assert_eq!(check.state, state, "{check:?}");
        assert!(check.found.contains(found), "{check:?}");
        assert!(check.advice.as_deref().unwrap_or_default().contains(advice), "{check:?}");
        assert_eq!(check.advice.is_some(), state != State::Ok, "{check:?}");
        if state == State::Warn {
            assert!(!report.ready);
        }
        self
    }
}

use State::{Ok as Good, Unknown, Warn};

#[test]
fn a_host_that_is_ready() {
    let fake = Fake::ready();
    let report = fake.look();
    let not: Vec<_> = report.checks.iter().filter(|c| c.state != Good).collect();
    assert!(not.is_empty() && report.ready, "{not:?}");
    let names: Vec<_> = report.checks.iter().map(|c| c.name).collect();
    let mut once = names.clone();
    once.sort_unstable();
    once.dedup();
    assert_eq!(once.len(), names.len(), "{names:?}");
    let json = serde_json::to_value(&report).unwrap();
    assert_eq!(json["ready"], true);
    let first = &json["checks"][0];
    assert_eq!((&first["name"], &first["state"]), (&"isolated-cores".into(), &"ok".into()));
    assert!(first["do"].is_null() && first["why"].is_string() && first["found"].is_string());
}

#[test]
fn a_host_of_which_nothing_can_be_read() {
    let dir = tempfile::tempdir().unwrap();
    let files = HostFiles::below(dir.path());
    let report = look(&files, &Options { scratch: "/".into(), programs: Vec::new() });
    assert!(!report.ready);
    assert!(report.checks.iter().all(|c| (c.state == Good) == c.advice.is_none()));
    let facts = describe(&files, &About::default()).facts;
    assert!(facts.iter().any(|(name, value)| name == "CPU" && value == "unknown"), "{facts:?}");
}

#[test]
fn isolation() {
    let fake = Fake::ready();
    fake.file(&format!("{CPU}/isolated"), "\n").says("isolated-cores", Warn, "none", "isolcpus=");
    fake.says("nvme-interrupts", Unknown, "1 queues", "isolated-cores");
    fake.says("numa", Unknown, "0000:5e:00.0: 2-3", "--cores");
    fake.file("sys/fs/cgroup/cpuset.cpus.isolated", "3\n");
    fake.says("isolated-cores", Warn, "3 by a partition", "nohz_full=3");
    fake.file(&format!("{CPU}/isolated"), "1-3\n");
    fake.says("isolated-cores", Warn, "not all of them are in nohz_full and rcu_nocbs", "=1-3");
    fake.says("nvme-interrupts", Warn, "nvme0q1", "managed_irq");
}

#[test]
fn speed() {
    let fake = Fake::ready();
    fake.file(&format!("{CPU}/cpu1/cpufreq/scaling_governor"), "powersave\n");
    fake.says("cpu-governor", Warn, "performance, powersave", "cpupower");
    fake.remove(&format!("{CPU}/cpu0/cpufreq")).remove(&format!("{CPU}/cpu1"));
    fake.says("cpu-governor", Unknown, "does not change", "firmware");
    fake.file(&format!("{CPU}/intel_pstate/no_turbo"), "0\n");
    fake.says("turbo", Warn, "on", "no_turbo");
    fake.remove(&format!("{CPU}/intel_pstate")).says("turbo", Unknown, "cannot", "firmware");
    fake.file(&format!("{CPU}/cpufreq/boost"), "1\n").says("turbo", Warn, "on", "cpufreq/boost");
    fake.file(&format!("{CPU}/cpufreq/boost"), "0\n").says("turbo", Good, "off", "");
    fake.file(&format!("{CPU}/smt/active"), "1\n").says("smt", Warn, "on", "smt/control");
    fake.file(&format!("{CPU}/cpu0/topology/thread_siblings_list"), "0,64\n");
    fake.says("smt", Warn, "on (one core: 0,64)", "a core each");
    fake.remove(&format!("{CPU}/smt")).says("smt", Unknown, "cannot", "firmware");
    fake.file(&format!("{CPU}/cpu0/cpuidle/state2/disable"), "0\n");
    fake.says("idle-states", Warn, "down to C6, 133 µs", "idle-set");
    fake.file(&format!("{CPU}/cpuidle/current_driver"), "none\n");
    fake.says("idle-states", Unknown, "no idle driver", "C-states");
    fake.file(&format!("{CPU}/cpu0/thermal_throttle/core_throttle_count"), "7\n");
    fake.says("throttling", Warn, "7 times", "cooling");
    fake.remove(&format!("{CPU}/cpu0/thermal_throttle")).says("throttling", Unknown, "", "sensors");
    let clock = "sys/devices/system/clocksource/clocksource0";
    fake.file(&format!("{clock}/current_clocksource"), "xen\n");
    fake.says("clock-source", Warn, "xen", "TSC is not stable");
    fake.file(&format!("{clock}/available_clocksource"), "tsc xen\n");
    fake.says("clock-source", Warn, "xen", "echo tsc > /sys/devices");
}

#[test]
fn mitigations() {
    let fake = Fake::ready();
    fake.says("mitigations", Good, "against meltdown", "");
    fake.file(&format!("{CPU}/vulnerabilities/mds"), "Vulnerable: no microcode\n");
    fake.says("mitigations", Warn, "missing against mds", "microcode");
    fake.file("proc/cmdline", "mitigations=off\n").says("mitigations", Warn, "off", "users run");
    fake.file("proc/cmdline", "\n").remove(&format!("{CPU}/vulnerabilities"));
    fake.says("mitigations", Unknown, "does not say", "command line");
}

#[test]
fn drives() {
    let fake = Fake::ready();
    fake.says("preconditioning", Good, "INTEL SSDPED1D480GA", "");
    fake.file(&format!("{FUNCTION}/nvme/nvme0/model"), "SAMSUNG MZ\n");
    fake.says("preconditioning", Unknown, "SAMSUNG MZ", "nvme smart-log /dev/nvme0");
    fake.remove(&format!("{FUNCTION}/nvme"));
    fake.says("preconditioning", Unknown, "PCI 0x8086:0x2700", "polldisk device bind 0000:5e");
    fs::remove_file(fake.0.path().join(FUNCTION).join("driver")).unwrap();
    symlink("../drivers/vfio-pci", fake.0.path().join(FUNCTION).join("driver")).unwrap();
    fake.says("preconditioning", Unknown, "", "polldisk device health vfio:0000:5e:00.0");
    fake.file(&format!("{FUNCTION}/numa_node"), "0\n");
    fake.says("numa", Warn, "no isolated processor is near 0000:5e:00.0", "0000:5e:00.0: 0-1");
    fake.file(&format!("{FUNCTION}/numa_node"), "-1\n");
    fake.says("numa", Unknown, "does not say", "manual");
    fake.file("proc/8/comm", "irqbalance\n").says("irqbalance", Warn, "running", "systemctl stop");
    fake.file("proc/interrupts", "x\n").says("nvme-interrupts", Good, "none", "");
    fake.remove(FUNCTION).says("preconditioning", Good, "no NVMe drive", "");
}

#[test]
fn system() {
    let fake = Fake::ready();
    fake.file("proc/stat", "cpu  100 0 100 9700 0 0 0 100 0 0\n")
        .says("steal", Warn, "1.00 %", "own");
    fake.file("proc/stat", "cpu  x\n").says("steal", Unknown, "/proc/stat", "mount");
    fake.file("proc/loadavg", "3.50 1 1 1/3 4\n").says("load", Warn, "3.50", "stop other work");
    fake.file("proc/loadavg", "\n").says("load", Unknown, "", "mount");
    fake.file("proc/swaps", "Filename\n/dev/sda2 partition\n")
        .says("swap", Warn, "1 areas", "swapoff");
    fake.remove("proc/swaps").says("swap", Unknown, "", "mount");
    let thp = "sys/kernel/mm/transparent_hugepage/enabled";
    fake.file(thp, "[always] never\n").says("transparent-huge-pages", Warn, "always", "madvise");
    fake.file(thp, "x\n").says("transparent-huge-pages", Unknown, "does not say", "");
    fake.remove("sys/kernel/mm/hugepages").says("huge-pages", Warn, "none", "device doctor");
    fake.file("proc/sys/kernel/perf_event_paranoid", "3\n");
    fake.says("counters", Warn, "perf_event_paranoid is 3", "sysctl");
    fake.remove("proc/sys/kernel/perf_event_paranoid").says("counters", Unknown, "cannot", "root");
    fake.file("proc/self/status", "CapEff:\t0000004000000000\n").says("counters", Good, "all", "");
    fake.remove("sys/bus/event_source").says("counters", Warn, "not to be had", "pmu=on");
    fake.remove("usr/bin/perf").says("programs", Warn, "missing: perf", "apt-get");
    fake.remove("usr/sbin").says("peers", Unknown, "not there: nbdkit, tap-ctl, qemu-dp", "SPDK");
    fake.remove("usr/bin").says("peers", Warn, "none", "apt-get");
}

#[test]
fn hypervisors() {
    let fake = Fake::ready();
    fake.file("proc/cpuinfo", "flags : fpu hypervisor\n");
    fake.says("hypervisor", Warn, "a virtual machine (ACME R1)", "the machine itself");
    fake.file("sys/hypervisor/type", "xen\n").file("sys/hypervisor/guest_type", "PVH\n");
    fake.says("hypervisor", Warn, "Xen of unknown version, domain (PVH)", "");
    for (part, text) in [("major", "4\n"), ("minor", "17\n"), ("extra", ".3\n")] {
        fake.file(&format!("sys/hypervisor/version/{part}"), text);
    }
    fake.file("proc/xen/capabilities", "control_d\n");
    fake.says("hypervisor", Good, "Xen 4.17.3, dom0 (PVH)", "");
}

#[test]
fn file_systems() {
    let fake = Fake::ready();
    fake.says("scratch", Good, "/fast disk/images: xfs", "");
    let mount = "21 1 0:9 / /fast\\040disk rw - ";
    fake.file("proc/self/mountinfo", &format!("{mount}tmpfs none rw\n"));
    fake.says("scratch", Warn, "which is memory", "on the drive");
    fake.file("proc/self/mountinfo", &format!("{mount}btrfs /dev/x rw\n"));
    fake.says("scratch", Warn, "btrfs", "ext4 or XFS");
    fake.file("proc/self/mountinfo", "- \n21 - x\n").says(
        "scratch",
        Unknown,
        "no mount",
        "--scratch",
    );
}

#[test]
fn a_description() {
    let fake = Fake::ready();
    fake.file("sys/dev/block/x", "");
    symlink("../../block/nvme0n1", fake.0.path().join("sys/dev/block/259:1")).unwrap();
    let about = About {
        cores: Some([2, 3]),
        scratch: Some("/fast disk/x".as_ref()),
        preconditioning: Some("twice\x1b at random"),
    };
    let host = describe(&fake.files(), &about);
    assert_eq!((host.processors, host.cores), (4, Some([2, 3])));
    for (name, value) in [
        ("Machine", "ACME R1"),
        ("Firmware", "2.1"),
        ("CPU", "Xeon <Gold>, 4 processors on 2 NUMA nodes, microcode 0x1"),
        ("Governor", "performance (intel_pstate), 1200 to 3500 MHz"),
        ("Turbo", "off"),
        ("Idle states", "intel_idle: POLL (0 µs), C1 (2 µs)"),
        ("Isolated processors", "2-3"),
        ("Mitigations", "meltdown"),
        ("Memory", "16.0 GiB; huge pages: 4 of 2048 KiB"),
        ("Operating system", "Debian 12"),
        ("Kernel", "6.1.0 (#1 SMP)"),
        ("Xen or other hypervisor", "none"),
        ("Kernel parameters", "isolcpus=2-3 nohz_full=2-3 rcu_nocbs=2-3"),
        ("Clock source", "tsc"),
        (
            "NVMe drive",
            "0000:5e:00.0: INTEL SSDPED1D480GA, 480 GB, firmware E2010325, NUMA node 1, driver nvme",
        ),
        ("Images lie on", "xfs on /dev/nvme0n1 (nvme0n1)"),
        ("Preconditioning", "twice? at random"),
    ] {
        let found = host.facts.iter().find(|(n, _)| n == name);
        assert_eq!(found.map(|(_, v)| v.as_str()), Some(value), "{name}");
    }
}
