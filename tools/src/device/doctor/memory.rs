//! Memory for DMA: huge pages of each size on each node, and how much may be locked.

use super::Finding;
use crate::device::host::Host;
use crate::image::print::bytes;

/// Rings and PRP lists of one queue pair take more than a megabyte: with less than this not even
/// one disk can be served.
const LOCK_LEAST: u64 = 8 << 20;

/// What some disks take with their buffers.
const LOCK_PLENTY: u64 = 1 << 30;

/// Number of the capability CAP_IPC_LOCK.
const IPC_LOCK: u32 = 14;

pub(super) fn look(host: &Host, found: &mut Vec<Finding>) {
    huge_pages(host, found);
    found.push(lock(host));
}

fn huge_pages(host: &Host, found: &mut Vec<Finding>) {
    const CHECK: &str = "huge-pages";
    const ALL: &str = "sys/kernel/mm/hugepages";
    let size = |name: &str| name.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse().ok();
    let mut sizes: Vec<(u64, String)> =
        host.names(ALL).into_iter().filter_map(|n| Some((size(&n)?, n))).collect();
    sizes.sort();
    let mut any = false;
    let first = found.len();
    for (kib, name) in &sizes {
        let count = |folder: &str| {
            let of = |file: &str| host.number(&format!("{folder}/{name}/{file}")).unwrap_or(0);
            (of("nr_hugepages"), of("free_hugepages"))
        };
        let nodes: Vec<String> = host
            .names("sys/devices/system/node")
            .into_iter()
            .filter_map(|n| n.strip_prefix("node")?.parse::<u32>().ok())
            .map(|n| {
                let (all, free) = count(&format!("sys/devices/system/node/node{n}/hugepages"));
                format!("node {n}: {all} ({free} free)")
            })
            .collect();
        let (all, free) = count(ALL);
        any |= all > 0;
        let by = match nodes.len() {
            0 | 1 => format!("{all} ({free} free)"),
            _ => nodes.join(", "),
        };
        let size = bytes(kib.saturating_mul(1024));
        found.push(Finding::ok(CHECK, format!("{size}: {by}")));
    }
    if any {
        return;
    }
    // Said once, at the size that can always be had.
    found.truncate(first);
    let mend = "echo 512 > /sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages (and \
                vm.nr_hugepages=512 in /etc/sysctl.d for the next boot)";
    found.push(match sizes.is_empty() {
        true => Finding::warning(
            CHECK,
            "the kernel has none; ordinary pages are used",
            "a kernel with CONFIG_HUGETLBFS",
        ),
        false => Finding::warning(CHECK, "none of any size; ordinary pages are used", mend),
    });
}

fn lock(host: &Host) -> Finding {
    const CHECK: &str = "memlock";
    let status = host.text("proc/self/status").unwrap_or_default();
    let effective = status
        .lines()
        .find_map(|l| u64::from_str_radix(l.strip_prefix("CapEff:")?.trim(), 16).ok())
        .unwrap_or(0);
    if effective & 1 << IPC_LOCK != 0 {
        return Finding::ok(CHECK, "no limit: this process has CAP_IPC_LOCK");
    }
    let mend = "ulimit -l unlimited as root before, or LimitMEMLOCK=infinity in the service's unit";
    let limits = host.text("proc/self/limits").unwrap_or_default();
    let line = limits.lines().find_map(|l| l.strip_prefix("Max locked memory"));
    // Soft, hard, unit; the soft one is raised to the hard one when that is needed.
    match line.and_then(|l| l.split_whitespace().nth(1)) {
        Some("unlimited") => Finding::ok(CHECK, "no limit"),
        Some(hard) => match hard.parse() {
            Ok(hard) if hard >= LOCK_PLENTY => Finding::ok(CHECK, bytes(hard)),
            Ok(hard) if hard >= LOCK_LEAST => {
                Finding::warning(CHECK, format!("only {} may be locked", bytes(hard)), mend)
            }
            Ok(hard) => Finding::problem(
                CHECK,
                format!("only {} may be locked: not enough for a queue and buffers", bytes(hard)),
                mend,
            ),
            Err(_) => Finding::warning(CHECK, "the limit cannot be read", mend),
        },
        None => Finding::warning(CHECK, "the limit cannot be read", mend),
    }
}
