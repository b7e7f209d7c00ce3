//! The kernel's own path, asked by fio through io_uring: generator and server are one process there, so
//! its processor time has the generator's in it.

use std::path::Path;
use std::process::Command;

use bench::Error;
use bench::run::{Distribution, Job, Outcome, Percentiles, Server, Shape};
use serde_json::Value;

/// Points of the distribution that are kept.
const POINTS: usize = 200;

/// The command that does a job on a file or block device.
///
/// # Errors
/// If fio has no words for the job.
pub(crate) fn command(job: &Job, target: &Path, core: Option<usize>) -> Result<Command, Error> {
    let fail = |what: &str| Err(Error::other(format!("fio is not asked for {what}")));
    let [(size, _)] = job.sizes.0[..] else { return fail("requests of several sizes") };
    let Shape::Depth(depth) = job.shape else { return fail("a rate") };
    if job.mix.trims > 0 {
        return fail("discards");
    }
    let random = match job.distribution {
        Distribution::Sequential => "",
        Distribution::Uniform | Distribution::Zipf(_) => "rand",
        Distribution::Stride(_) => return fail("steps"),
    };
    let kind = match job.mix.reads {
        100 => "read",
        0 => "write",
        _ if random.is_empty() => "readwrite",
        _ => "rw",
    };
    let mut command = Command::new("fio");
    command.args(["--name=job", "--ioengine=io_uring", "--direct=1", "--time_based"]);
    command.arg(format!("--rw={random}{kind}")).arg(format!("--bs={size}"));
    command.arg(format!("--rwmixread={}", job.mix.reads)).arg(format!("--iodepth={depth}"));
    command.arg(format!("--runtime={}ms", millis(job.seconds)));
    command.arg(format!("--ramp_time={}ms", millis(job.ramp)));
    command.arg(format!("--randseed={}", job.seed)).arg("--norandommap");
    command.arg(format!("--offset={}", job.offset));
    if let Some(length) = job.length {
        command.arg(format!("--size={length}"));
    }
    if let Distribution::Zipf(theta) = job.distribution {
        command.arg(format!("--random_distribution=zipf:{theta}"));
    }
    if let Some(every) = job.flush_every {
        command.arg(format!("--fsync={every}"));
    }
    if let Some(core) = core {
        command.arg(format!("--cpus_allowed={core}"));
    }
    command.arg("--percentile_list=50:90:99:99.9:99.99:99.999");
    command.arg("--output-format=json+").arg(format!("--filename={}", escaped(target)));
    Ok(command)
}

/// fio takes a colon for the end of a name.
fn escaped(path: &Path) -> String {
    path.display().to_string().replace('\\', "\\\\").replace(':', "\\:")
}

fn millis(seconds: f64) -> u64 {
    (seconds * 1000.0).round().clamp(0.0, 1e9) as u64
}

/// Reads what it printed.
///
/// # Errors
/// If that is not what fio prints, or nothing was done.
pub(crate) fn outcome(text: &str) -> Result<Outcome, Error> {
    // What is said before the JSON are warnings.
    let json = text.find('{').map_or("", |at| &text[at..]);
    let report: Value = serde_json::from_str(json)
        .map_err(|e| Error::other(format!("fio: {e}: {}", text.trim())))?;
    let job = &report["jobs"][0];
    let side = |name: &str| Side::read(&job[name]);
    let (reads, writes) = (side("read"), side("write"));
    let seconds = reads.seconds.max(writes.seconds);
    let requests = reads.requests.saturating_add(writes.requests);
    if requests == 0 || seconds <= 0.0 {
        return Err(Error::other(format!("fio did nothing: {}", job["error"])));
    }
    let cdf = distribution(&reads, &writes);
    let share = |name: &str| job[name].as_f64().unwrap_or(0.0) / 100.0;
    let cpu = (share("usr_cpu") + share("sys_cpu")) * seconds * 1e9;
    let all = match (&reads.latency, &writes.latency) {
        (Some(one), None) | (None, Some(one)) => *one,
        _ => together(&cdf, &reads, &writes),
    };
    Ok(Outcome {
        seconds,
        requests,
        bytes: reads.bytes.saturating_add(writes.bytes),
        errors: job["total_err"].as_u64().unwrap_or(0),
        iops: requests as f64 / seconds,
        latency_ns: all,
        reads: reads.latency,
        writes: writes.latency,
        trims: None,
        flushes: None,
        cdf: thinned(cdf),
        windows: Vec::new(),
        steady: None,
        server: Server {
            cpu_ns: Some(cpu as u64),
            switches: job["ctx"].as_u64(),
            ..Server::default()
        },
        verified_bytes: 0,
    })
}

/// What it says of reads, or of writes.
struct Side {
    requests: u64,
    bytes: u64,
    seconds: f64,
    latency: Option<Percentiles>,
    /// Nanoseconds and how many requests took about that long.
    bins: Vec<(u64, u64)>,
}

impl Side {
    fn read(side: &Value) -> Side {
        let whole = |v: &Value| v.as_u64().unwrap_or(0);
        let requests = whole(&side["total_ios"]);
        // Completion latency without the time to submit, as far as io_uring tells them apart: all of it.
        let latency = &side["clat_ns"];
        let percent = |name: &str| whole(&latency["percentile"][name]);
        let mut bins: Vec<(u64, u64)> = match latency["bins"].as_object() {
            Some(bins) => {
                bins.iter().filter_map(|(k, n)| Some((k.parse().ok()?, n.as_u64()?))).collect()
            }
            None => Vec::new(),
        };
        bins.sort_unstable();
        Side {
            requests,
            bytes: whole(&side["io_bytes"]),
            seconds: side["runtime"].as_f64().unwrap_or(0.0) / 1000.0,
            latency: (requests > 0).then(|| Percentiles {
                mean: latency["mean"].as_f64().unwrap_or(0.0),
                min: whole(&latency["min"]),
                p50: percent("50.000000"),
                p90: percent("90.000000"),
                p99: percent("99.000000"),
                p99_9: percent("99.900000"),
                p99_99: percent("99.990000"),
                p99_999: percent("99.999000"),
                max: whole(&latency["max"]),
            }),
            bins,
        }
    }
}

/// The share of requests, of both kinds, that were not slower than so many nanoseconds.
fn distribution(reads: &Side, writes: &Side) -> Vec<(u64, f64)> {
    let mut bins: Vec<(u64, u64)> = reads.bins.iter().chain(&writes.bins).copied().collect();
    bins.sort_unstable();
    let all = bins.iter().fold(0u64, |sum, b| sum.saturating_add(b.1)).max(1) as f64;
    let mut sum = 0u64;
    bins.iter()
        .map(|&(ns, n)| {
            sum = sum.saturating_add(n);
            (ns, sum as f64 / all)
        })
        .collect()
}

fn together(cdf: &[(u64, f64)], reads: &Side, writes: &Side) -> Percentiles {
    let at = |share: f64| cdf.iter().find(|p| p.1 >= share).or(cdf.last()).map_or(0, |p| p.0);
    let sides =
        || [reads, writes].into_iter().filter_map(|s| Some((s.requests as f64, s.latency?)));
    let count = sides().map(|s| s.0).sum::<f64>().max(1.0);
    Percentiles {
        mean: sides().map(|(n, l)| n * l.mean).sum::<f64>() / count,
        min: sides().map(|s| s.1.min).min().unwrap_or(0),
        p50: at(0.5),
        p90: at(0.9),
        p99: at(0.99),
        p99_9: at(0.999),
        p99_99: at(0.9999),
        p99_999: at(0.99999),
        max: sides().map(|s| s.1.max).max().unwrap_or(0),
    }
}

/// At most as many points as are kept, the last of them among them.
fn thinned(cdf: Vec<(u64, f64)>) -> Vec<(u64, f64)> {
    let step = cdf.len().div_ceil(POINTS).max(1);
    let last = cdf.len().saturating_sub(1);
    cdf.into_iter()
        .enumerate()
        .filter(|(i, _)| last.abs_diff(*i) % step == 0)
        .map(|p| p.1)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use bench::run::Mix;

    #[test]
    fn the_command_line() {
        let job = Job {
            mix: Mix { reads: 70, trims: 0 },
            shape: Shape::Depth(32),
            ramp: 0.2,
            seconds: 1.5,
            seed: 7,
            ..Job::default()
        };
        let command = command(&job, Path::new("/s/a:b"), Some(1)).unwrap();
        let args: Vec<_> = command.get_args().map(|a| a.to_string_lossy()).collect();
        assert_eq!(
            args.join(" "),
            "--name=job --ioengine=io_uring --direct=1 --time_based --rw=randrw --bs=4096 \
             --rwmixread=70 --iodepth=32 --runtime=1500ms --ramp_time=200ms --randseed=7 \
             --norandommap --offset=0 --cpus_allowed=1 \
             --percentile_list=50:90:99:99.9:99.99:99.999 --output-format=json+ \
             --filename=/s/a\\:b"
        );
        let rate = Shape::Rate { per_second: 1.0, depth: 1 };
        let e = super::command(&Job { shape: rate, ..job }, Path::new("/a"), None).unwrap_err();
        assert!(e.to_string().contains("a rate"), "{e}");
    }

    #[test]
    fn what_it_prints_is_read() {
        let side = |n: u64, bins: &str| {
            format!(
                r#"{{"io_bytes":{},"total_ios":{n},"runtime":500,"clat_ns":{{"min":10,"max":90,
                "mean":20.0,"bins":{bins},"percentile":{{"50.000000":15,"99.999000":80}}}}}}"#,
                n * 4096
            )
        };
        let text = format!(
            r#"fio: a warning
            {{"jobs":[{{"read":{},"write":{},"usr_cpu":20.0,"sys_cpu":30.0,"ctx":9,"total_err":0}}]}}"#,
            side(30, r#"{"15":20,"80":10}"#),
            side(10, r#"{"12":10}"#)
        );
        let o = outcome(&text).unwrap();
        assert_eq!((o.requests, o.bytes, o.iops), (40, 40 * 4096, 80.0));
        assert_eq!(o.server.cpu_ns, Some(250_000_000));
        assert_eq!(o.server.switches, Some(9));
        assert_eq!(o.cdf, [(12, 0.25), (15, 0.75), (80, 1.0)]);
        assert_eq!((o.latency_ns.p50, o.latency_ns.p90), (15, 80));
        assert_eq!(o.reads.unwrap().p99_999, 80);
    }

    #[test]
    fn what_it_does_not_print_is_an_error() {
        assert!(outcome("fio: no such file").unwrap_err().to_string().contains("no such file"));
        assert!(outcome(r#"{"jobs":[]}"#).unwrap_err().to_string().contains("did nothing"));
    }

    #[test]
    fn many_points_are_thinned_and_the_last_is_kept() {
        let many: Vec<_> = (0..1000u64).map(|i| (i, i as f64 / 999.0)).collect();
        let few = thinned(many);
        assert!(few.len() <= POINTS + 1, "{}", few.len());
        assert_eq!(few.last(), Some(&(999, 1.0)));
        assert!(thinned(Vec::new()).is_empty());
    }
}
