//! NVMe drives: who gets their interrupts, which memory and processors are near, and what they hold.

use node::{HostFiles, cpu_list};

use super::{Check, Subject};
use crate::host::{self, CPUS, Drive};

pub(super) fn look(files: &HostFiles) -> Vec<Check> {
    let drives = host::drives(files);
    let isolated = files.cpus(&format!("{CPUS}/isolated"));
    vec![
        interrupts(files, &isolated),
        balancer(files),
        numa(files, &drives, &isolated),
        preconditioning(&drives),
    ]
}

/// Interrupts of the kernel's NVMe queues, with the processors that take them.
fn nvme_interrupts(files: &HostFiles) -> Vec<(String, Vec<u32>)> {
    let text = files.text("proc/interrupts").unwrap_or_default();
    let queue = |line: &str| {
        let (number, rest) = line.split_once(':')?;
        let number: u32 = number.trim().parse().ok()?;
        let name = rest.split_whitespace().last()?;
        // nvme0q3; q0 is the admin queue, which is idle.
        let (_, queue) = name.strip_prefix("nvme")?.split_once('q')?;
        if queue.parse::<u32>().ok()? == 0 {
            return None;
        }
        let of = |file: &str| files.line(&format!("proc/irq/{number}/{file}"));
        let list = of("effective_affinity_list").or_else(|| of("smp_affinity_list"))?;
        Some((node::printable(name), cpu_list(&list)))
    };
    text.lines().filter_map(queue).collect()
}

fn interrupts(files: &HostFiles, isolated: &[u32]) -> Check {
    const S: Subject =
        Subject("nvme-interrupts", "an interrupt on a polling core is time that nobody counts");
    let all = nvme_interrupts(files);
    if all.is_empty() {
        return S.ok("none: no drive is the kernel's, or none has queues");
    }
    let on: Vec<&str> = all
        .iter()
        .filter(|(_, cpus)| cpus.iter().any(|c| isolated.contains(c)))
        .map(|(name, _)| name.as_str())
        .collect();
    match on.as_slice() {
        [] if isolated.is_empty() => S.unknown(
            format!("{} queues, and no isolated processor to keep free of them", all.len()),
            "see isolated-cores",
        ),
        [] => S.ok(format!("{} queues, none on isolated processors", all.len())),
        some => S.warn(
            format!("{} on isolated processors", some.join(", ")),
            "boot the kernel with isolcpus=managed_irq,domain,LIST, or bind the drive to polldisk \
             (polldisk device bind)",
        ),
    }
}

fn balancer(files: &HostFiles) -> Check {
    const S: Subject = Subject("irqbalance", "interrupts move while something is measured");
    let is_balancer = |pid: &String| {
        pid.parse::<u32>().is_ok()
            && files.line(&format!("proc/{pid}/comm")).as_deref() == Some("irqbalance")
    };
    match files.names("proc").iter().any(is_balancer) {
        true => S.warn("running", "systemctl stop irqbalance"),
        false => S.ok("not running"),
    }
}

fn numa(files: &HostFiles, drives: &[Drive], isolated: &[u32]) -> Check {
    const S: Subject =
        Subject("numa", "a drive at another node's bus is reached through the link between them");
    let nodes = host::nodes(files);
    if nodes.len() < 2 {
        return S.ok("one node");
    }
    if drives.is_empty() {
        return S.ok(format!("{} nodes, no NVMe drive", nodes.len()));
    }
    let cpus = |node: u32| files.cpus(&format!("sys/devices/system/node/node{node}/cpulist"));
    let mut far = Vec::new();
    let mut where_to = Vec::new();
    for drive in drives {
        let Some(node) = drive.node else {
            return S.unknown(
                format!("{}: the firmware does not say at which node", drive.address),
                "look into the board's manual, and give --cores of that node",
            );
        };
        let near = cpus(node);
        let list = files.line(&format!("sys/devices/system/node/node{node}/cpulist"));
        where_to.push(format!("{}: {}", drive.address, list.unwrap_or_else(|| "?".to_owned())));
        if !isolated.is_empty() && !isolated.iter().any(|c| near.contains(c)) {
            far.push(drive.address.as_str());
        }
    }
    let where_to = where_to.join("; ");
    match far.as_slice() {
        [] if isolated.is_empty() => S.unknown(
            format!("{} nodes; processors near the drives: {where_to}", nodes.len()),
            "give --cores of these",
        ),
        [] => S.ok(format!("isolated processors are near every drive ({where_to})")),
        some => S.warn(
            format!("no isolated processor is near {}", some.join(", ")),
            format!("isolate processors of the drive's node ({where_to})"),
        ),
    }
}

/// Whether a drive of this model writes in place: then what was written before does not matter.
fn writes_in_place(model: &str) -> bool {
    let model = model.to_uppercase();
    ["OPTANE", "SSDPE21", "SSDPED1", "SSDPEL1", "SSDPF21"].iter().any(|part| model.contains(part))
}

fn preconditioning(drives: &[Drive]) -> Check {
    const S: Subject = Subject(
        "preconditioning",
        "a drive that is new or freshly formatted is faster than it will be once it is full",
    );
    let say = |drive: &Drive| {
        let model = drive.model.as_deref().unwrap_or("unknown model");
        format!("{} ({model})", drive.address)
    };
    let flash: Vec<&Drive> = drives
        .iter()
        .filter(|d| !writes_in_place(d.model.as_deref().unwrap_or_default()))
        .collect();
    if drives.is_empty() {
        return S.ok("no NVMe drive");
    }
    let Some(first) = flash.first() else {
        let all: Vec<String> = drives.iter().map(say).collect();
        return S.ok(format!("writes in place, write it once: {}", all.join(", ")));
    };
    let all: Vec<String> = flash.iter().map(|d| say(d)).collect();
    let health = match (&first.name, first.driver.as_deref()) {
        (Some(name), _) => format!("nvme smart-log /dev/{name}"),
        (None, Some("vfio-pci")) => format!("polldisk device health vfio:{}", first.address),
        (None, _) => format!("polldisk device bind {0}, device health vfio:{0}", first.address),
    };
    S.unknown(
        format!("no file tells what was written to {}", all.join(", ")),
        format!(
            "{health} tells percentage used and bytes written; then write it twice over at random as \
             docs/benchmarking.md says, and state it with --preconditioning"
        ),
    )
}
