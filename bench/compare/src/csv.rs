//! Results as CSV (RFC 4180): a line for each row of each comparison.

use crate::charts::frontend;
use crate::page::labels;
use crate::results::Comparison;

const HEAD: [&str; 34] = [
    "profile",
    "quick",
    "began",
    "peer",
    "frontend",
    "variant",
    "workload",
    "block_size",
    "depth",
    "iops",
    "latency_ns",
    "cpu_us_per_io",
    "cpu_us_per_io_polling",
    "cpu_us_above_floor",
    "syscalls_per_io",
    "instructions_per_io",
    "switches_per_io",
    "ratio",
    "ratio_low",
    "ratio_high",
    "mean_ns",
    "min_ns",
    "p50_ns",
    "p90_ns",
    "p99_ns",
    "p99_9_ns",
    "p99_99_ns",
    "p99_999_ns",
    "max_ns",
    "rounds",
    "errors",
    "steady",
    "labels",
    "command",
];

/// All rows. What could not be told is empty.
///
/// # Errors
/// None that memory does not have.
pub(crate) fn csv(comparisons: &[Comparison]) -> Result<Vec<u8>, ::csv::Error> {
    let mut out = ::csv::Writer::from_writer(Vec::new());
    out.write_record(HEAD)?;
    let real =
        |v: Option<f64>| v.filter(|v| v.is_finite()).map_or(String::new(), |v| v.to_string());
    for c in comparisons {
        for r in &c.results {
            let p = &r.percentiles_ns;
            let interval = r.ratio_interval;
            let errors = r.rounds.iter().fold(0u64, |sum, o| sum.saturating_add(o.errors));
            let steady = r.rounds.iter().filter(|o| o.steady.is_some_and(|s| s.reached)).count();
            let record: [String; HEAD.len()] = [
                c.profile.clone(),
                c.quick.to_string(),
                c.began.to_string(),
                r.peer.clone(),
                frontend(r.frontend).to_lowercase(),
                r.variant.clone(),
                r.workload.clone(),
                r.block_size.to_string(),
                r.depth.to_string(),
                real(Some(r.iops)),
                r.latency_ns.to_string(),
                real(r.cpu_us_per_io),
                real(r.cpu_us_per_io_polling),
                real(r.cpu_us_above_floor),
                real(r.syscalls_per_io),
                real(r.instructions_per_io),
                real(r.switches_per_io),
                real(r.ratio),
                real(interval.map(|i| i[0])),
                real(interval.map(|i| i[1])),
                real(Some(p.mean)),
                p.min.to_string(),
                p.p50.to_string(),
                p.p90.to_string(),
                p.p99.to_string(),
                p.p99_9.to_string(),
                p.p99_99.to_string(),
                p.p99_999.to_string(),
                p.max.to_string(),
                r.rounds.len().to_string(),
                errors.to_string(),
                steady.to_string(),
                labels(r),
                r.command.clone(),
            ];
            out.write_record(record)?;
        }
    }
    out.into_inner().map_err(|e| e.into_error().into())
}
