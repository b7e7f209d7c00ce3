//! Processors for threads that poll: isolated, at full speed, with a clock that costs no system
//! call. None of it is needed for `vfio:` to work.

use super::Finding;
use crate::device::host::Host;

/// More processors than any host has: a list that names more is nonsense.
const MOST: u32 = 16384;

const CPUS: &str = "sys/devices/system/cpu";

pub(super) fn look(host: &Host, found: &mut Vec<Finding>) {
    found.push(isolated(host));
    found.push(governor(host));
    found.push(clock(host));
}

fn isolated(host: &Host) -> Finding {
    const CHECK: &str = "isolated-cores";
    let list = |file: &str| cpus(&host.line(&format!("{CPUS}/{file}")).unwrap_or_default());
    let online = list("online");
    let cmdline = host.text("proc/cmdline").unwrap_or_default();
    let offloaded = cmdline.split_whitespace().find_map(|w| w.strip_prefix("rcu_nocbs="));
    let offloaded = match offloaded {
        Some("all") => online.clone(),
        list => cpus(list.unwrap_or_default()),
    };
    let (isolated, tickless) = (list("isolated"), list("nohz_full"));
    let all = |name: &str| {
        format!("isolcpus=managed_irq,domain,{name} nohz_full={name} rcu_nocbs={name}")
    };
    if isolated.is_empty() {
        let Some(&last) = online.last().filter(|_| online.len() > 1) else {
            let text = "one processor: whatever polls shares it with all else";
            return Finding::warning(CHECK, text, "a host with more processors");
        };
        let some = match online.len() {
            2 | 3 => last.to_string(),
            n => format!("{}-{last}", online[n - 2]),
        };
        let mend = format!("boot the kernel with {}", all(&some));
        return Finding::warning(CHECK, "none: other threads interrupt those that poll", mend);
    }
    let missing = |from: &[u32]| isolated.iter().any(|c| !from.contains(c));
    let mut lacks = Vec::new();
    if missing(&tickless) {
        lacks.push("nohz_full");
    }
    if missing(&offloaded) {
        lacks.push("rcu_nocbs");
    }
    let name = host.line(&format!("{CPUS}/isolated")).unwrap_or_default();
    if lacks.is_empty() {
        return Finding::ok(CHECK, format!("{name} (for --cores)"));
    }
    let text = format!("{name}, but not all of them are in {}", lacks.join(" and "));
    Finding::warning(CHECK, text, format!("boot the kernel with {}", all(&name)))
}

fn governor(host: &Host) -> Finding {
    const CHECK: &str = "cpu-governor";
    let is_cpu = |n: &String| n.strip_prefix("cpu").is_some_and(|n| n.parse::<u32>().is_ok());
    let mut governors: Vec<String> = host
        .names(CPUS)
        .into_iter()
        .filter(is_cpu)
        .filter_map(|cpu| host.line(&format!("{CPUS}/{cpu}/cpufreq/scaling_governor")))
        .collect();
    governors.sort();
    governors.dedup();
    match governors.as_slice() {
        [] => Finding::ok(CHECK, "the kernel does not change the processors' speed"),
        [one] if one == "performance" => Finding::ok(CHECK, "performance"),
        some => Finding::warning(
            CHECK,
            format!("{}: processors slow down, and are slow to speed up again", some.join(", ")),
            "cpupower frequency-set -g performance",
        ),
    }
}

fn clock(host: &Host) -> Finding {
    const CHECK: &str = "clock-source";
    const FOLDER: &str = "sys/devices/system/clocksource/clocksource0";
    let of = |file: &str| host.line(&format!("{FOLDER}/{file}_clocksource"));
    match of("current") {
        Some(current) if current == "tsc" => Finding::ok(CHECK, "tsc"),
        current => {
            let text = format!(
                "{}: the kernel does not use the processor's own clock",
                current.as_deref().unwrap_or("unknown")
            );
            let available = of("available").unwrap_or_default();
            let mend = match available.split_whitespace().any(|w| w == "tsc") {
                true => format!("echo tsc > /{FOLDER}/current_clocksource"),
                false => "the TSC is not stable or not offered to this virtual machine (dmesg | \
                          grep -i tsc says why)"
                    .to_owned(),
            };
            Finding::warning(CHECK, text, mend)
        }
    }
}

/// A list like `0-3,8`; nothing if it is none.
fn cpus(text: &str) -> Vec<u32> {
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (u32, u32) = (first.parse().ok()?, last.parse().ok()?);
        (last < MOST).then_some(first..=last)
    };
    text.trim().split(',').filter_map(range).flatten().collect()
}

#[cfg(test)]
mod tests {
    use super::cpus;

    #[test]
    fn lists() {
        assert_eq!(cpus("0-3,8\n"), [0, 1, 2, 3, 8]);
        for nothing in ["", "(null)", "-", "a-b", "3-1", "0-4294967295", "managed_irq"] {
            assert!(cpus(nothing).is_empty(), "{nothing}");
        }
    }
}
