//! SPDK's driver, asked by its own tool: the device's path, for a drive that SPDK may take.

use std::process::Command;

use super::find;
use bench::Error;
use bench::run::{Distribution, Job, Outcome, Percentiles, Server, Shape};

/// The command that does a job on the drive at a PCI address.
///
/// # Errors
/// If the tool has no words for the job. Jobs that write are refused: they would destroy what is on the
/// drive.
pub(crate) fn command(job: &Job, address: &str, core: Option<usize>) -> Result<Command, Error> {
    let fail = |what: &str| Err(Error::other(format!("spdk_nvme_perf is not asked for {what}")));
    let [(size, _)] = job.sizes.0[..] else { return fail("requests of several sizes") };
    let Shape::Depth(depth) = job.shape else { return fail("a rate") };
    let pattern = match job.distribution {
        Distribution::Sequential => "read",
        Distribution::Uniform => "randread",
        Distribution::Stride(_) | Distribution::Zipf(_) => return fail("that distribution"),
    };
    if job.changes() {
        return fail("anything that changes a drive");
    }
    let name = "spdk_nvme_perf";
    let mut command = Command::new(find(name).unwrap_or_else(|| name.into()));
    command.args(["-q", &depth.to_string(), "-o", &size.to_string(), "-w", pattern, "-L"]);
    // It takes whole seconds.
    command.args(["-t", &(job.seconds.ceil().max(1.0) as u64).to_string()]);
    command.args(["-a", &(job.ramp.ceil() as u64).to_string()]);
    if let Some(core) = core {
        command.args(["-c", &format!("[{core}]")]);
    }
    command.args(["-r", &format!("trtype:PCIe traddr:{address}")]);
    Ok(command)
}

/// Reads what it printed for a job. It polls all the time, so the processor is busy whatever is done: its
/// time is known only as polling.
///
/// # Errors
/// If that is not what it prints.
pub(crate) fn outcome(text: &str, job: &Job) -> Result<Outcome, Error> {
    let fail = || Error::other(format!("spdk_nvme_perf: no total in: {}", text.trim()));
    let line = text.lines().find_map(|l| l.trim().strip_prefix("Total")).ok_or_else(fail)?;
    let numbers = line.trim_start_matches([' ', ':']).split_whitespace();
    let numbers: Vec<f64> = numbers.filter_map(|n| n.parse().ok()).collect();
    let [iops, mib, mean, min, max] = numbers[..] else { return Err(fail()) };
    let seconds = job.seconds.ceil().max(1.0);
    let ns = |us: f64| (us * 1000.0) as u64;
    let percent = |share: &str| {
        let found = text.lines().find_map(|l| l.trim().strip_prefix(share));
        let us = found.and_then(|l| l.rsplit(':').next()?.trim().strip_suffix("us")?.parse().ok());
        us.map_or(0, ns)
    };
    let latency_ns = Percentiles {
        mean: mean * 1000.0,
        min: ns(min),
        p50: percent("50.00000%"),
        p90: percent("90.00000%"),
        p99: percent("99.00000%"),
        p99_9: percent("99.90000%"),
        p99_99: percent("99.99000%"),
        p99_999: percent("99.99900%"),
        max: ns(max),
    };
    Ok(Outcome {
        seconds,
        requests: (iops * seconds) as u64,
        bytes: (mib * 1_048_576.0 * seconds) as u64,
        errors: 0,
        iops,
        latency_ns,
        reads: Some(latency_ns),
        writes: None,
        trims: None,
        flushes: None,
        cdf: Vec::new(),
        windows: Vec::new(),
        steady: None,
        server: Server { cpu_ns: Some((seconds * 1e9) as u64), ..Server::default() },
        verified_bytes: 0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use bench::run::Mix;

    const PRINTED: &str = "\
========================================================
                                                       Latency(us)
Device Information                     :       IOPS      MiB/s    Average        min        max
PCIE (0000:5e:00.0) NSID 1 from core  1:  571234.10    2231.38      55.98      10.02    1234.11
========================================================
Total                                  :  571234.10    2231.38      55.98      10.02    1234.11

Summary latency data for PCIE (0000:5e:00.0) NSID 1                  from core 1:
=================================================================================
  1.00000% :    12.345us
 50.00000% :    54.321us
 99.00000% :    99.999us
 99.99900% :   345.600us
";

    #[test]
    fn the_command_line() {
        let job = Job { shape: Shape::Depth(8), seconds: 0.3, ramp: 0.1, ..Job::default() };
        let command = command(&job, "0000:5e:00.0", Some(1)).unwrap();
        let args: Vec<_> = command.get_args().map(|a| a.to_string_lossy()).collect();
        assert_eq!(
            args.join(" "),
            "-q 8 -o 4096 -w randread -L -t 1 -a 1 -c [1] -r trtype:PCIe traddr:0000:5e:00.0"
        );
        let writes = Job { mix: Mix { reads: 99, trims: 0 }, ..job };
        let e = super::command(&writes, "0000:5e:00.0", None).unwrap_err();
        assert!(e.to_string().contains("changes a drive"), "{e}");
    }

    #[test]
    fn what_it_prints_is_read() {
        let job = Job { seconds: 2.0, ..Job::default() };
        let o = outcome(PRINTED, &job).unwrap();
        assert_eq!((o.iops, o.requests), (571_234.1, 1_142_468));
        let l = o.latency_ns;
        assert_eq!((l.min, l.p50, l.p99, l.p99_999), (10_020, 54_321, 99_999, 345_600));
        assert!(outcome("no devices", &job).unwrap_err().to_string().contains("no devices"));
    }
}
