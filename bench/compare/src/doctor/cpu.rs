//! Processors: for threads that poll, and for figures that come out the same tomorrow.

use node::{HostFiles, cpu_list};

use super::{Check, Subject};
use crate::host::{self, CPUS};

/// Microseconds: waking up from a deeper state than this is part of every request that waits.
const DEEP: u64 = 10;

/// What also decides how well polling works, whatever is measured: isolation, governor, clock.
pub fn processors(files: &HostFiles) -> Vec<Check> {
    vec![isolated(files), governor(files), clock(files)]
}

pub(super) fn look(files: &HostFiles) -> Vec<Check> {
    vec![turbo(files), smt(files), idle(files), throttling(files), mitigations(files)]
}

fn isolated(files: &HostFiles) -> Check {
    const S: Subject = Subject("isolated-cores", "other threads interrupt those that poll");
    let list = |file: &str| files.cpus(&format!("{CPUS}/{file}"));
    let online = list("online");
    let cmdline = files.text("proc/cmdline").unwrap_or_default();
    let offloaded = cmdline.split_whitespace().find_map(|w| w.strip_prefix("rcu_nocbs="));
    let offloaded = match offloaded {
        Some("all") => online.clone(),
        list => cpu_list(list.unwrap_or_default()),
    };
    let (isolated, tickless) = (list("isolated"), list("nohz_full"));
    let all = |name: &str| {
        format!("isolcpus=managed_irq,domain,{name} nohz_full={name} rcu_nocbs={name}")
    };
    if isolated.is_empty() {
        let Some(&last) = online.last().filter(|_| online.len() > 1) else {
            let found = "one processor: whatever polls shares it with all else";
            return S.warn(found, "a host with more processors");
        };
        let some = match online.len() {
            2 | 3 => last.to_string(),
            n => format!("{}-{last}", online[n - 2]),
        };
        // A partition of cpusets isolates at run time, and shows nowhere else.
        let partition = files.line("sys/fs/cgroup/cpuset.cpus.isolated");
        if let Some(partition) = partition.filter(|p| !cpu_list(p).is_empty()) {
            let found = format!("{partition} by a partition of cpusets, without nohz_full");
            return S.warn(found, format!("boot the kernel with {}", all(&partition)));
        }
        return S.warn("none", format!("boot the kernel with {}", all(&some)));
    }
    let missing = |from: &[u32]| isolated.iter().any(|c| !from.contains(c));
    let mut lacks = Vec::new();
    if missing(&tickless) {
        lacks.push("nohz_full");
    }
    if missing(&offloaded) {
        lacks.push("rcu_nocbs");
    }
    let name = files.line(&format!("{CPUS}/isolated")).unwrap_or_default();
    if lacks.is_empty() {
        return S.ok(format!("{name} (for --cores)"));
    }
    let found = format!("{name}, but not all of them are in {}", lacks.join(" and "));
    S.warn(found, format!("boot the kernel with {}", all(&name)))
}

fn governor(files: &HostFiles) -> Check {
    const S: Subject =
        Subject("cpu-governor", "a processor that was slowed down is slow to speed up again");
    match host::governors(files).as_slice() {
        [] => S.unknown(
            "the kernel does not change the processors' speed",
            "report what the firmware's power profile is set to (performance, if it can be chosen)",
        ),
        [one] if one == "performance" => S.ok("performance"),
        some => S.warn(some.join(", "), "cpupower frequency-set -g performance"),
    }
}

fn clock(files: &HostFiles) -> Check {
    const S: Subject =
        Subject("clock-source", "a look at any clock but the processor's own may be a system call");
    let found = host::clock(files, "current");
    if found.as_deref() == Some("tsc") {
        return S.ok("tsc");
    }
    let available = host::clock(files, "available").unwrap_or_default();
    let advice = match available.split_whitespace().any(|w| w == "tsc") {
        true => "echo tsc > /sys/devices/system/clocksource/clocksource0/current_clocksource",
        false => {
            "the TSC is not stable or not offered to this virtual machine (dmesg | grep -i tsc says \
             why)"
        }
    };
    S.warn(found.as_deref().unwrap_or("unknown"), advice)
}

fn turbo(files: &HostFiles) -> Check {
    const S: Subject = Subject("turbo", "speed depends on temperature and on what other cores do");
    let switch = match files.has(&format!("{CPUS}/intel_pstate/no_turbo")) {
        true => format!("echo 1 > /{CPUS}/intel_pstate/no_turbo"),
        false => format!("echo 0 > /{CPUS}/cpufreq/boost"),
    };
    match host::turbo(files) {
        Some(false) => S.ok("off"),
        Some(true) => S.warn("on", format!("{switch}, or report that it was on")),
        None => S.unknown("the kernel cannot tell", "report what the firmware is set to"),
    }
}

fn smt(files: &HostFiles) -> Check {
    const S: Subject = Subject("smt", "two processors of one core share its speed and its caches");
    match host::smt(files) {
        Some(false) => S.ok("off"),
        Some(true) => {
            let pair = files.line(&format!("{CPUS}/cpu0/topology/thread_siblings_list"));
            let pair = pair.map_or(String::new(), |p| format!(" (one core: {p})"));
            S.warn(
                format!("on{pair}"),
                format!(
                    "echo off > /{CPUS}/smt/control, or give generator and server a core each and \
                     leave its other processor idle"
                ),
            )
        }
        None => S.unknown("the kernel cannot tell", "report what the firmware is set to"),
    }
}

fn idle(files: &HostFiles) -> Check {
    const S: Subject = Subject(
        "idle-states",
        "a server that sleeps pays for waking up with each request; one that polls does not",
    );
    let Some(driver) = host::idle_driver(files) else {
        return S.unknown(
            "the kernel has no idle driver",
            "in a virtual machine the host decides; else report the firmware's C-states",
        );
    };
    let deepest = host::idle_states(files).into_iter().max_by_key(|s| s.latency);
    match deepest {
        Some(state) if state.latency > DEEP => S.warn(
            format!("{driver}: down to {}, {} µs to wake up", state.name, state.latency),
            "cpupower idle-set --disable-by-latency 10 for the figures that are to be low, and the \
             defaults for those that users will see; publish both",
        ),
        Some(state) => S.ok(format!("{driver}: down to {}, {} µs", state.name, state.latency)),
        None => S.ok(format!("{driver}: no state")),
    }
}

fn throttling(files: &HostFiles) -> Check {
    const S: Subject = Subject("throttling", "a processor that is too hot runs slower");
    let count = |cpu: &String| {
        let of = |file: &str| files.number(&format!("{cpu}/thermal_throttle/{file}"));
        let (core, package) = (of("core_throttle_count"), of("package_throttle_count"));
        Some(core?.saturating_add(package.unwrap_or(0)))
    };
    let counts: Vec<u64> = host::cpu_folders(files).iter().filter_map(count).collect();
    match counts.iter().fold(0u64, |sum, n| sum.saturating_add(*n)) {
        _ if counts.is_empty() => S.unknown(
            "the kernel does not count it",
            "watch the temperature meanwhile (sensors, ipmitool sdr)",
        ),
        0 => S.ok("never since the host was started"),
        n => S.warn(
            format!("{n} times since the host was started"),
            "look again after measuring: if it has grown, mend the cooling and measure again",
        ),
    }
}

fn mitigations(files: &HostFiles) -> Check {
    const S: Subject = Subject(
        "mitigations",
        "they make system calls dearer, of which peers make several a request",
    );
    let cmdline = files.text("proc/cmdline").unwrap_or_default();
    if cmdline.split_whitespace().any(|w| w == "mitigations=off") {
        return S.warn(
            "switched off (mitigations=off)",
            "boot without mitigations=off: users run with them",
        );
    }
    let all = host::vulnerabilities(files);
    let named = |start: &str| -> Vec<&str> {
        all.iter().filter(|(_, how)| how.starts_with(start)).map(|(n, _)| n.as_str()).collect()
    };
    let (vulnerable, against) = (named("Vulnerable"), named("Mitigation"));
    if all.is_empty() {
        return S.unknown("the kernel does not say", "report the kernel's command line");
    }
    if !vulnerable.is_empty() {
        return S.warn(
            format!("missing against {}", vulnerable.join(", ")),
            "new microcode and kernel, or report it",
        );
    }
    match against.as_slice() {
        [] => S.ok("none is needed"),
        some => S.ok(format!("against {}", some.join(", "))),
    }
}
