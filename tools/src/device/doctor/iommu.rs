//! What VFIO needs of the host: an IOMMU that also remaps interrupts, modules, and no Xen that
//! keeps the machine's addresses to itself.

use super::Finding;
use crate::device::host::Host;

/// Which kind of guest of Xen this is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Xen {
    No,
    /// Paravirtualised: addresses are not the machine's.
    Pv,
    Other,
}

pub(super) fn look(host: &Host, found: &mut Vec<Finding>) {
    let (kind, finding) = xen(host);
    found.push(finding);
    let groups = iommu_groups(host);
    found.push(iommu(host, kind, groups));
    if groups > 0 {
        found.push(remapping(host));
    }
    found.push(module(host, "vfio-pci", "sys/bus/pci/drivers/vfio-pci"));
    // Linux 6.2 and later have another way, in which the older one's module is not needed.
    found.push(match host.has("dev/iommu") && !host.has(TYPE1) {
        true => Finding::ok("vfio_iommu_type1", "not loaded, and not needed: there is iommufd"),
        false => module(host, "vfio_iommu_type1", TYPE1),
    });
}

const TYPE1: &str = "sys/module/vfio_iommu_type1";

fn xen(host: &Host) -> (Xen, Finding) {
    const CHECK: &str = "xen";
    if host.line("sys/hypervisor/type").as_deref() != Some("xen") {
        return (Xen::No, Finding::ok(CHECK, "the kernel does not run under Xen"));
    }
    let capabilities = host.text("proc/xen/capabilities").unwrap_or_default();
    let domain = if capabilities.contains("control_d") { "dom0" } else { "domain" };
    match host.line("sys/hypervisor/guest_type").as_deref() {
        Some("PV") => {
            let text = format!(
                "a PV {domain}: it has no IOMMU, and does not know the machine's addresses; file: \
                 and block devices work"
            );
            let mend = "boot Xen with dom0=pvh, or drive the device from an HVM driver domain \
                        (docs/hosts.md)";
            (Xen::Pv, Finding::problem(CHECK, text, mend))
        }
        kind => {
            let kind = kind.unwrap_or("kind unknown");
            let text = format!("a {domain} ({kind}): Xen keeps the IOMMU to itself");
            let mend = "modprobe vfio enable_unsafe_noiommu_mode=1, and polldisk with \
                        --unsafe-noiommu; only where the device can be trusted";
            (Xen::Other, Finding::warning(CHECK, text, mend))
        }
    }
}

/// How many groups there are that an IOMMU makes.
fn iommu_groups(host: &Host) -> usize {
    let made_up = |group: &String| {
        let name = host.line(&format!("sys/kernel/iommu_groups/{group}/name"));
        name.as_deref() == Some("vfio-noiommu")
    };
    host.names("sys/kernel/iommu_groups").iter().filter(|g| !made_up(g)).count()
}

fn iommu(host: &Host, xen: Xen, groups: usize) -> Finding {
    const CHECK: &str = "iommu";
    if groups > 0 {
        let kinds = host.names("sys/class/iommu").join(", ");
        let by = if kinds.is_empty() { String::new() } else { format!(" ({kinds})") };
        return Finding::ok(CHECK, format!("on; groups: {groups}{by}"));
    }
    let mode = host.line("sys/module/vfio/parameters/enable_unsafe_noiommu_mode");
    let unsafe_mode = mode.is_some_and(|m| m == "Y" || m == "1");
    let cpu = host.text("proc/cpuinfo").unwrap_or_default();
    let cmdline = host.text("proc/cmdline").unwrap_or_default();
    let (parameter, firmware) = if cpu.contains("GenuineIntel") {
        ("intel_iommu=on", "VT-d")
    } else if cpu.contains("AuthenticAMD") || cpu.contains("HygonGenuine") {
        ("amd_iommu=on", "IOMMU (AMD-Vi)")
    } else {
        ("", "the IOMMU")
    };
    let given = cmdline.split_whitespace().any(|w| w == parameter);
    let without = "or, where the device can be trusted: modprobe vfio \
                   enable_unsafe_noiommu_mode=1, and polldisk with --unsafe-noiommu";
    let mend = if xen != Xen::No {
        "see xen".to_owned()
    } else if parameter.is_empty() || given {
        format!(
            "switch {firmware} on in the firmware; in a virtual machine, give it a virtual IOMMU \
             (QEMU: -device intel-iommu,intremap=on); {without}"
        )
    } else {
        format!(
            "boot the kernel with {parameter} (GRUB_CMDLINE_LINUX in /etc/default/grub, then \
             update-grub), and {firmware} switched on in the firmware; {without}"
        )
    };
    match unsafe_mode {
        true => Finding::warning(
            CHECK,
            "off; no-IOMMU mode is on: devices can write anywhere, and --unsafe-noiommu is needed",
            mend,
        ),
        false => Finding::problem(CHECK, "off: there is no IOMMU group", mend),
    }
}

fn remapping(host: &Host) -> Finding {
    const CHECK: &str = "interrupt-remapping";
    let Some(interrupts) = host.text("proc/interrupts") else {
        return Finding::warning(
            CHECK,
            "cannot be seen: /proc/interrupts is not there",
            "mount -t proc proc /proc",
        );
    };
    // The names of interrupt controllers whose interrupts are remapped begin so.
    if interrupts.split_whitespace().any(|w| w.starts_with("IR-")) {
        return Finding::ok(CHECK, "on");
    }
    let allowed = host.line("sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts");
    let mend = "switch interrupt remapping (x2APIC) on in the firmware and remove intremap=off from \
                the kernel's command line; in a virtual machine: -device intel-iommu,intremap=on; \
                or, if nobody hostile drives devices here: modprobe vfio_iommu_type1 \
                allow_unsafe_interrupts=1";
    match allowed.as_deref() {
        Some("Y" | "1") => Finding::warning(
            CHECK,
            "off, and allowed so: a device can forge interrupts of others",
            mend,
        ),
        _ => Finding::problem(CHECK, "off: VFIO refuses devices", mend),
    }
}

fn module(host: &Host, name: &'static str, loaded: &str) -> Finding {
    if host.has(loaded) {
        return Finding::ok(name, "loaded");
    }
    let release = host.line("proc/sys/kernel/osrelease").filter(|r| !r.contains('/'));
    let release = release.unwrap_or_default();
    let lists = ["modules.dep", "modules.builtin"]
        .map(|list| host.text(&format!("lib/modules/{release}/{list}")));
    let is =
        |path: &str| path.rsplit('/').next().is_some_and(|f| f.starts_with(&format!("{name}.ko")));
    let load = format!("modprobe {name}");
    if lists.iter().all(Option::is_none) {
        let text = format!("not loaded, and /lib/modules/{release} is not here to look in");
        return Finding::warning(name, text, load);
    }
    let there = lists.iter().flatten().flat_map(|l| l.lines());
    match there.filter_map(|l| l.split(':').next()).any(is) {
        true => Finding::warning(name, "not loaded (`device bind` loads it)", load),
        false => Finding::problem(
            name,
            format!("the kernel {release} does not have it"),
            "install the kernel's other modules (linux-modules-extra on some distributions), or a \
             kernel with CONFIG_VFIO_PCI and CONFIG_VFIO_IOMMU_TYPE1",
        ),
    }
}
