//! Hosts of every kind.

use super::*;
use crate::device::fake::Fake;

/// A bare host on which nothing is missing.
fn ready() -> Fake {
    let fake = Fake::new();
    fake.nvme("0000:01:00.0", 0).group(1, &["0000:01:00.0"]);
    fake.file("sys/class/iommu/dmar0/x", "");
    fake.file("proc/cpuinfo", "vendor_id\t: GenuineIntel\n");
    fake.file("proc/cmdline", "quiet intel_iommu=on rcu_nocbs=2-3\n");
    fake.file("proc/interrupts", "           CPU0\n  0:   1   IR-IO-APIC   2-edge timer\n");
    fake.file("sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts", "N\n");
    fake.file("proc/sys/kernel/osrelease", "6.1.0-1\n");
    for (folder, all) in [
        ("sys/kernel/mm/hugepages", 512),
        ("sys/devices/system/node/node0/hugepages", 500),
        ("sys/devices/system/node/node1/hugepages", 12),
    ] {
        fake.file(&format!("{folder}/hugepages-2048kB/nr_hugepages"), &format!("{all}\n"));
        fake.file(&format!("{folder}/hugepages-2048kB/free_hugepages"), "7\n");
        fake.file(&format!("{folder}/hugepages-1048576kB/nr_hugepages"), "0\n");
    }
    limit(&fake, "unlimited");
    fake.file("proc/self/status", "Name:\tx\nCapEff:\t0000000000000000\n");
    fake.file("sys/devices/system/cpu/online", "0-3\n");
    fake.file("sys/devices/system/cpu/isolated", "2-3\n");
    fake.file("sys/devices/system/cpu/nohz_full", "2-3\n");
    fake.file("sys/devices/system/cpu/cpu0/cpufreq/scaling_governor", "performance\n");
    fake.file("sys/devices/system/clocksource/clocksource0/current_clocksource", "tsc\n");
    fake
}

fn limit(fake: &Fake, hard: &str) {
    let text = format!(
        "Limit                     Soft Limit           Hard Limit           Units     \n\
         Max locked memory         65536                {hard}           bytes     \n"
    );
    fake.file("proc/self/limits", &text);
}

fn find(fake: &Fake, check: &str) -> Finding {
    let report = look(&fake.host());
    let found = report.findings.into_iter().find(|f| f.check == check);
    found.unwrap_or_else(|| panic!("no {check}"))
}

/// The level, and that text and mend hold a part.
#[track_caller]
fn says(fake: &Fake, check: &str, level: Level, part: &str, mend: &str) {
    let f = find(fake, check);
    assert_eq!(f.level, level, "{f:?}");
    assert!(f.text.contains(part), "{f:?}");
    assert!(f.mend.as_deref().unwrap_or_default().contains(mend), "{f:?}");
    assert_eq!(f.mend.is_some(), level != Level::Ok, "{f:?}");
    assert_eq!(look(&fake.host()).possible, level != Level::Problem);
}

#[test]
fn a_host_that_is_ready() {
    let fake = ready();
    let report = look(&fake.host());
    assert!(report.possible);
    let not: Vec<_> = report.findings.iter().filter(|f| f.level != Level::Ok).collect();
    assert!(not.is_empty(), "{not:?}");
    let checks: Vec<_> = report.findings.iter().map(|f| f.check).collect();
    let all = [
        "xen",
        "iommu",
        "interrupt-remapping",
        "vfio-pci",
        "vfio_iommu_type1",
        "huge-pages",
        "huge-pages",
        "memlock",
        "isolated-cores",
        "cpu-governor",
        "clock-source",
    ];
    assert_eq!(checks, all);
    assert!(find(&fake, "iommu").text.contains("groups: 1 (dmar0)"));
    let pages = find(&fake, "huge-pages").text;
    assert_eq!(pages, "2 MiB: node 0: 500 (7 free), node 1: 12 (7 free)");
    let mut out = Vec::new();
    text(&mut out, &report).unwrap();
    assert!(String::from_utf8(out).unwrap().ends_with("can be driven here (vfio: nodes)\n"));
    let json = serde_json::to_value(&report).unwrap();
    assert_eq!((&json["possible"], &json["findings"][1]["level"]), (&true.into(), &"ok".into()));
}

#[test]
fn no_iommu() {
    let fake = ready();
    fake.remove("sys/kernel/iommu_groups");
    says(&fake, "iommu", Level::Problem, "off", "switch VT-d on in the firmware");
    fake.file("proc/cmdline", "quiet\n");
    says(&fake, "iommu", Level::Problem, "off", "boot the kernel with intel_iommu=on");
    fake.file("proc/cpuinfo", "vendor_id\t: AuthenticAMD\n");
    says(&fake, "iommu", Level::Problem, "off", "amd_iommu=on");
    fake.remove("proc/cpuinfo");
    says(&fake, "iommu", Level::Problem, "off", "the IOMMU on in the firmware");
    assert!(!look(&fake.host()).findings.iter().any(|f| f.check == "interrupt-remapping"));
    fake.file("sys/module/vfio/parameters/enable_unsafe_noiommu_mode", "Y\n");
    says(&fake, "iommu", Level::Warning, "--unsafe-noiommu is needed", "");
    // Groups that VFIO made up are none.
    fake.file("sys/kernel/iommu_groups/0/name", "vfio-noiommu\n");
    says(&fake, "iommu", Level::Warning, "no-IOMMU mode is on", "");
}

#[test]
fn no_interrupt_remapping() {
    let fake = ready();
    fake.file("proc/interrupts", "  0:   1   IO-APIC   2-edge  DMAR-IR-like\n");
    says(&fake, "interrupt-remapping", Level::Problem, "refuses", "allow_unsafe_interrupts=1");
    fake.file("sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts", "Y\n");
    says(&fake, "interrupt-remapping", Level::Warning, "allowed so", "firmware");
    fake.remove("proc/interrupts");
    says(&fake, "interrupt-remapping", Level::Warning, "cannot be seen", "");
}

#[test]
fn modules() {
    let fake = ready();
    fake.remove("sys/bus/pci/drivers/vfio-pci");
    says(
        &fake,
        "vfio-pci",
        Level::Warning,
        "/lib/modules/6.1.0-1 is not here",
        "modprobe vfio-pci",
    );
    let list =
        "kernel/drivers/vfio/pci/vfio-pci-core.ko.xz:\nkernel/fs/ext4.ko: kernel/vfio-pci.ko\n";
    fake.file("lib/modules/6.1.0-1/modules.dep", list);
    says(&fake, "vfio-pci", Level::Problem, "6.1.0-1 does not have it", "linux-modules-extra");
    fake.file("lib/modules/6.1.0-1/modules.dep", "kernel/drivers/vfio/pci/vfio-pci.ko.xz: a b\n");
    says(&fake, "vfio-pci", Level::Warning, "not loaded", "modprobe vfio-pci");
    fake.remove("sys/module/vfio_iommu_type1");
    says(&fake, "vfio_iommu_type1", Level::Problem, "does not have it", "CONFIG_VFIO");
    fake.file("lib/modules/6.1.0-1/modules.builtin", "kernel/drivers/vfio/vfio_iommu_type1.ko\n");
    says(&fake, "vfio_iommu_type1", Level::Warning, "not loaded", "modprobe vfio_iommu_type1");
    fake.file("dev/iommu", "");
    says(&fake, "vfio_iommu_type1", Level::Ok, "iommufd", "");
    fake.file("proc/sys/kernel/osrelease", "../../etc\n");
    says(&fake, "vfio-pci", Level::Warning, "/lib/modules/ is not", "modprobe");
}

#[test]
fn xen() {
    let fake = ready();
    fake.file("sys/hypervisor/type", "xen\n").file("proc/xen/capabilities", "control_d\n");
    fake.file("sys/hypervisor/guest_type", "PV\n").remove("sys/kernel/iommu_groups");
    says(&fake, "xen", Level::Problem, "a PV dom0", "dom0=pvh");
    says(&fake, "iommu", Level::Problem, "off", "see xen");
    fake.file("sys/hypervisor/guest_type", "PVH\n");
    fake.file("sys/module/vfio/parameters/enable_unsafe_noiommu_mode", "Y\n");
    says(&fake, "xen", Level::Warning, "a dom0 (PVH)", "--unsafe-noiommu");
    fake.file("proc/xen/capabilities", "").remove("sys/hypervisor/guest_type");
    says(&fake, "xen", Level::Warning, "a domain (kind unknown)", "");
    fake.file("sys/hypervisor/type", "kvm\n");
    says(&fake, "xen", Level::Ok, "not run under Xen", "");
}

#[test]
fn memory() {
    let fake = ready();
    fake.file("sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages", "0\n");
    says(&fake, "huge-pages", Level::Warning, "none of any size", "echo 512 > /sys/kernel/mm");
    fake.file("sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages", "x\n");
    fake.file("sys/kernel/mm/hugepages/hugepages-99999999999999999999kB/x", "");
    fake.file("sys/kernel/mm/hugepages/hugepages-18446744073709551615kB/nr_hugepages", "1\n");
    says(&fake, "huge-pages", Level::Ok, "2 MiB", "");
    fake.remove("sys/kernel/mm/hugepages");
    says(&fake, "huge-pages", Level::Warning, "the kernel has none", "CONFIG_HUGETLBFS");
    for (hard, level, part) in [
        ("65536", Level::Problem, "only 64 KiB"),
        ("8388608", Level::Warning, "only 8 MiB"),
        ("2147483648", Level::Ok, "2 GiB"),
        ("lots", Level::Warning, "cannot be read"),
        ("", Level::Warning, "cannot be read"),
    ] {
        limit(&fake, hard);
        says(&fake, "memlock", level, part, "");
    }
    limit(&fake, "0");
    fake.file("proc/self/status", "CapEff:\t0000000000004000\n");
    says(&fake, "memlock", Level::Ok, "CAP_IPC_LOCK", "");
}

#[test]
fn processors() {
    let fake = ready();
    fake.file("proc/cmdline", "rcu_nocbs=3\n");
    says(
        &fake,
        "isolated-cores",
        Level::Warning,
        "not all of them are in rcu_nocbs",
        "nohz_full=2-3",
    );
    fake.file("proc/cmdline", "rcu_nocbs=all\n");
    says(&fake, "isolated-cores", Level::Ok, "2-3", "");
    fake.file("sys/devices/system/cpu/nohz_full", "(null)\n");
    says(&fake, "isolated-cores", Level::Warning, "nohz_full", "");
    fake.file("sys/devices/system/cpu/isolated", "\n");
    says(&fake, "isolated-cores", Level::Warning, "none", "isolcpus=managed_irq,domain,2-3 ");
    fake.file("sys/devices/system/cpu/online", "0-1\n");
    says(&fake, "isolated-cores", Level::Warning, "none", "nohz_full=1 rcu_nocbs=1");
    fake.file("sys/devices/system/cpu/online", "0\n");
    says(&fake, "isolated-cores", Level::Warning, "one processor", "more processors");
    fake.file("sys/devices/system/cpu/cpu1/cpufreq/scaling_governor", "powersave\n");
    says(&fake, "cpu-governor", Level::Warning, "performance, powersave", "cpupower");
    fake.remove("sys/devices/system/cpu/cpu0").remove("sys/devices/system/cpu/cpu1");
    says(&fake, "cpu-governor", Level::Ok, "does not change", "");
    let clock = "sys/devices/system/clocksource/clocksource0";
    fake.file(&format!("{clock}/current_clocksource"), "hpet\n");
    says(&fake, "clock-source", Level::Warning, "hpet", "TSC is not stable");
    fake.file(&format!("{clock}/available_clocksource"), "tsc hpet acpi_pm\n");
    says(&fake, "clock-source", Level::Warning, "hpet", "echo tsc > /sys/devices");
}

#[test]
fn a_host_of_which_nothing_can_be_read() {
    let dir = tempfile::tempdir().unwrap();
    let none = |_: &std::path::Path, _: &str| panic!("the doctor writes nothing");
    let host = Host::fake(dir.path(), dir.path(), Box::new(none));
    let report = look(&host);
    assert!(!report.possible);
    assert!(report.findings.iter().all(|f| f.level == Level::Ok || f.mend.is_some()));
}
