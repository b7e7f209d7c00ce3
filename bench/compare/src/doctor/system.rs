//! The rest of a host: who else uses it, what may be counted, which programs and file systems there are.

use node::HostFiles;

use super::{Check, Options, Subject};
use crate::host;

/// Share of processor time that others took of a virtual machine, above which figures tell of them.
const STEAL: f64 = 0.005;

/// Runnable threads, on average over a minute, that are not ours.
const LOAD: f64 = 0.5;

pub(super) fn look(files: &HostFiles, options: &Options) -> Vec<Check> {
    vec![
        hypervisor(files),
        steal(files),
        load(files),
        swap(files),
        transparent(files),
        huge_pages(files),
        counters(files),
        programs(files, options),
        peers(files, options),
        scratch(files, options),
    ]
}

fn hypervisor(files: &HostFiles) -> Check {
    const S: Subject =
        Subject("hypervisor", "waking up, interrupts and clocks cost more in a virtual machine");
    match host::hypervisor(files) {
        None => S.ok("none"),
        Some(xen) if host::is_dom0(files) => S.ok(xen),
        Some(some) => S.warn(
            some,
            "measure on the machine itself, or say that these are figures of a virtual machine",
        ),
    }
}

fn steal(files: &HostFiles) -> Check {
    const S: Subject = Subject("steal", "the hypervisor ran others while this host was to run");
    let text = files.text("proc/stat").unwrap_or_default();
    let line = text.lines().find_map(|l| l.strip_prefix("cpu "));
    // user nice system idle iowait irq softirq steal, then guests' time, which is part of user's.
    let times: Vec<u64> = line
        .map(|l| l.split_whitespace().take(8).filter_map(|n| n.parse().ok()).collect())
        .unwrap_or_default();
    let [.., steal] = times[..] else {
        return S.unknown("/proc/stat cannot be read", "mount -t proc proc /proc");
    };
    let all = times.iter().fold(0u64, |sum, n| sum.saturating_add(*n)).max(1);
    let share = if times.len() == 8 { steal as f64 / all as f64 } else { 0.0 };
    let found = format!("{:.2} % since the host was started", share * 100.0);
    match share > STEAL {
        true => S.warn(found, "a host with processors of its own; more rounds (--rounds)"),
        false => S.ok(found),
    }
}

fn load(files: &HostFiles) -> Check {
    const S: Subject = Subject("load", "other work takes processors, caches and memory");
    let line = files.line("proc/loadavg").unwrap_or_default();
    match line.split_whitespace().next().and_then(|n| n.parse::<f64>().ok()) {
        Some(load) if load < LOAD => S.ok(format!("{load:.2}")),
        Some(load) => S.warn(
            format!("{load:.2} in the last minute"),
            "stop other work and wait a minute; top shows what runs",
        ),
        None => S.unknown("/proc/loadavg cannot be read", "mount -t proc proc /proc"),
    }
}

fn swap(files: &HostFiles) -> Check {
    const S: Subject = Subject("swap", "memory of a server may be on a disk when it is needed");
    let Some(text) = files.text("proc/swaps") else {
        return S.unknown("/proc/swaps cannot be read", "mount -t proc proc /proc");
    };
    match text.lines().skip(1).filter(|l| !l.trim().is_empty()).count() {
        0 => S.ok("none"),
        n => S.warn(format!("{n} areas"), "swapoff -a"),
    }
}

fn transparent(files: &HostFiles) -> Check {
    const S: Subject =
        Subject("transparent-huge-pages", "the kernel moves memory into them meanwhile");
    let line = files.line("sys/kernel/mm/transparent_hugepage/enabled").unwrap_or_default();
    let chosen = line.split_once('[').and_then(|(_, rest)| rest.split_once(']'));
    match chosen.map(|(chosen, _)| chosen) {
        Some("always") => S.warn(
            "always",
            "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled, or report it",
        ),
        Some(other) => S.ok(other),
        None => S.unknown("the kernel does not say", "report the kernel's configuration"),
    }
}

fn huge_pages(files: &HostFiles) -> Check {
    const S: Subject = Subject("huge-pages", "with ordinary pages memory is looked up more often");
    const ALL: &str = "sys/kernel/mm/hugepages";
    let count = |size: String| {
        let all = files.number(&format!("{ALL}/{size}/nr_hugepages")).filter(|n| *n > 0)?;
        Some(format!("{all} of {}", size.strip_prefix("hugepages-")?))
    };
    let found: Vec<String> = files.names(ALL).into_iter().filter_map(count).collect();
    match found.is_empty() {
        true => S.warn("none", "polldisk device doctor says how many, and how to have them"),
        false => S.ok(found.join(", ")),
    }
}

fn counters(files: &HostFiles) -> Check {
    const S: Subject =
        Subject("counters", "without them instructions of a server cannot be counted");
    const DEVICES: &str = "sys/bus/event_source/devices";
    let pmu = ["cpu", "cpu_core"].iter().any(|d| files.has(&format!("{DEVICES}/{d}")));
    if !pmu {
        return S.warn(
            "the processor's counters are not to be had",
            "in a virtual machine: have the host give them (QEMU: -cpu host,pmu=on; Xen: vpmu=on)",
        );
    }
    let status = files.text("proc/self/status").unwrap_or_default();
    let effective = status
        .lines()
        .find_map(|l| u64::from_str_radix(l.strip_prefix("CapEff:")?.trim(), 16).ok())
        .unwrap_or(0);
    // CAP_SYS_ADMIN or CAP_PERFMON.
    if effective & (1 << 21 | 1 << 38) != 0 {
        return S.ok("of all processes");
    }
    let paranoid = files.line("proc/sys/kernel/perf_event_paranoid");
    match paranoid.as_deref().and_then(|p| p.parse::<i64>().ok()) {
        Some(n) if n <= 1 => S.ok(format!("perf_event_paranoid is {n}")),
        Some(n) => S.warn(
            format!("perf_event_paranoid is {n}: not the kernel's part"),
            "sysctl kernel.perf_event_paranoid=1, or run as root",
        ),
        None => S.unknown("perf_event_paranoid cannot be read", "run as root"),
    }
}

/// Which of some programs are not there.
fn absent<'a>(files: &HostFiles, options: &Options, names: &[&'a str]) -> Vec<&'a str> {
    let is_there = |name: &str| {
        options.programs.iter().any(|folder| {
            let folder = folder.strip_prefix("/").unwrap_or(folder);
            files.path(folder.join(name)).is_file()
        })
    };
    names.iter().copied().filter(|name| !is_there(name)).collect()
}

fn programs(files: &HostFiles, options: &Options) -> Check {
    const S: Subject = Subject("programs", "each is needed for a part of the figures");
    const ALL: [&str; 4] = ["fio", "perf", "strace", "valgrind"];
    match absent(files, options, &ALL).as_slice() {
        [] => S.ok(ALL.join(", ")),
        missing => S.warn(
            format!("missing: {}", missing.join(", ")),
            "on Debian: apt-get install fio linux-perf strace valgrind",
        ),
    }
}

fn peers(files: &HostFiles, options: &Options) -> Check {
    const S: Subject = Subject("peers", "polldisk is compared with those that are installed");
    const ALL: [&str; 6] =
        ["qemu-storage-daemon", "qemu-nbd", "nbdkit", "tap-ctl", "qemu-dp", "spdk_nvme_perf"];
    let missing = absent(files, options, &ALL);
    let there: Vec<&str> = ALL.into_iter().filter(|p| !missing.contains(p)).collect();
    let advice = "on Debian: apt-get install qemu-utils qemu-system-common nbdkit; on XCP-ng \
                  tap-ctl and qemu-dp are part of the host; spdk_nvme_perf is built from SPDK";
    match (there.is_empty(), missing.is_empty()) {
        (_, true) => S.ok(there.join(", ")),
        (true, _) => S.warn("none", advice),
        _ => S.unknown(
            format!("there: {}; not there: {}", there.join(", "), missing.join(", ")),
            advice,
        ),
    }
}

fn scratch(files: &HostFiles, options: &Options) -> Check {
    const S: Subject = Subject("scratch", "what images lie on decides what is measured");
    let shown = node::printable(&options.scratch.to_string_lossy());
    let Some(mount) = host::mount_of(files, &options.scratch) else {
        return S.unknown(format!("{shown}: no mount was found"), "--scratch DIR");
    };
    let kind = mount.kind;
    match kind.as_str() {
        "ext4" | "xfs" | "ext3" => S.ok(format!("{shown}: {kind}")),
        "tmpfs" | "ramfs" => S.warn(
            format!("{shown}: {kind}, which is memory"),
            "fine for what servers cost; for what disks give: --scratch on the drive",
        ),
        _ => S.warn(
            format!("{shown}: {kind}"),
            "--scratch on ext4 or XFS: others copy, compress or share what is written",
        ),
    }
}
