//! Pinning a thread to a processor. Isolated processors (`isolcpus=`) work too: they are online but
//! in nobody's default mask, so the mask of the calling thread is not asked.

use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

/// The processors that are online, as the kernel lists them.
///
/// # Errors
/// If the list cannot be read or makes no sense.
pub fn online_cpus() -> Result<Vec<usize>, String> {
    let path = "/sys/devices/system/cpu/online";
    let text = std::fs::read_to_string(path).map_err(|e| format!("{path}: {e}"))?;
    parse_cpu_list(text.trim()).ok_or(format!("{path}: cannot understand {text:?}"))
}

/// Parses a list as the kernel writes it: `0-3,8`.
fn parse_cpu_list(text: &str) -> Option<Vec<usize>> {
    let mut cpus = Vec::new();
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        if last < first || last >= CpuSet::count() {
            return None;
        }
        cpus.extend(first..=last);
    }
    Some(cpus)
}

/// Runs the calling thread on `cpu` alone from now on.
///
/// # Errors
/// If there is no such processor or the process may not use it (a cpuset).
pub fn pin_current_thread(cpu: usize) -> Result<(), String> {
    let refuse = |e: nix::Error| {
        let online = online_cpus().unwrap_or_default();
        format!("cannot run on processor {cpu}: {e}; online are {online:?}")
    };
    let mut set = CpuSet::new();
    set.set(cpu).map_err(refuse)?;
    sched_setaffinity(Pid::from_raw(0), &set).map_err(refuse)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_understood() {
        assert_eq!(parse_cpu_list("0-3,8"), Some(vec![0, 1, 2, 3, 8]));
        assert_eq!(parse_cpu_list("5"), Some(vec![5]));
        assert_eq!(parse_cpu_list("3-1"), None);
        assert_eq!(parse_cpu_list("0-99999999"), None);
        assert_eq!(parse_cpu_list(""), None);
    }

    #[test]
    fn pins_to_an_online_cpu_and_refuses_another() {
        let cpu = *online_cpus().unwrap().last().unwrap();
        std::thread::spawn(move || {
            pin_current_thread(cpu).unwrap();
            assert!(pin_current_thread(1023).unwrap_err().contains("1023"));
            assert!(pin_current_thread(1 << 40).is_err());
        })
        .join()
        .unwrap();
    }
}
