//! From rounds to [`Row`]s: medians, ratios, and what is above the floor.

use std::collections::BTreeMap;

use bench::run::{Job, Outcome, Server};

use crate::peer::{Peer, Setup};
use crate::ratio::{median, ratio};
use crate::results::{Frontend, Row};

/// What one server made of one job.
pub(crate) struct Cell<'a> {
    pub(crate) setup: &'a Setup,
    pub(crate) labels: &'a BTreeMap<String, String>,
    pub(crate) job: &'a Job,
    /// In order.
    pub(crate) rounds: Vec<Outcome>,
    /// A run of its own, in which system calls were counted.
    pub(crate) counted: Option<Outcome>,
    /// The command that does it again.
    pub(crate) command: String,
}

/// A figure for each request, of each round; `None` if a round has none.
fn each(rounds: &[Outcome], of: impl Fn(&Server) -> Option<u64>) -> Option<Vec<f64>> {
    let per = |o: &Outcome| Some(of(&o.server)? as f64 / o.requests.max(1) as f64);
    rounds.iter().map(per).collect()
}

impl Cell<'_> {
    /// Microseconds of the server's processor for each request, by round: of one that polls, those in
    /// which it had work.
    fn cpu(&self) -> Option<Vec<f64>> {
        let ns = each(&self.rounds, |s| s.busy_ns.or(s.cpu_ns))?;
        // fio's processor time is told in percent, of which some rounds are too short.
        let us: Vec<f64> = ns.iter().map(|ns| ns / 1000.0).collect();
        us.iter().all(|&us| us > 0.0).then_some(us)
    }

    fn is_floor(&self) -> bool {
        *self.setup == Setup::NbdkitMemory
    }

    fn is_ours(&self, frontend: Frontend) -> bool {
        self.setup.peer() == Peer::Polldisk && self.setup.frontend() == frontend
    }
}

/// The rows of a case's cells of one job, in which polldisk's come first.
pub(crate) fn rows(cells: &[Cell<'_>]) -> Vec<Row> {
    let ours = |frontend| cells.iter().find(|c| c.is_ours(frontend)).and_then(Cell::cpu);
    let floor = cells.iter().find(|c| c.is_floor()).and_then(Cell::cpu);
    let floor = floor.as_deref().and_then(median);
    let row = |cell: &Cell<'_>| {
        let frontend = cell.setup.frontend();
        let against =
            ours(frontend).or_else(|| ours(Frontend::Ring)).or_else(|| ours(Frontend::Nbd));
        row(cell, against.as_deref(), floor)
    };
    cells.iter().filter_map(row).collect()
}

fn row(cell: &Cell<'_>, ours: Option<&[f64]>, floor: Option<f64>) -> Option<Row> {
    let (setup, job, rounds) = (cell.setup, cell.job, &cell.rounds);
    let of = |get: fn(&Outcome) -> f64| median(&rounds.iter().map(get).collect::<Vec<_>>());
    let iops = of(|o| o.iops)?;
    let cpu = cell.cpu();
    let ratio = cpu.as_deref().zip(ours).and_then(|(cpu, ours)| ratio(cpu, ours));
    let cpu_us_per_io = cpu.as_deref().and_then(median);
    let middle = |of: fn(&Server) -> Option<u64>| each(rounds, of).as_deref().and_then(median);
    // Figures that cost time to count are those of the run of their own.
    let counted = |of: fn(&Server) -> Option<u64>| {
        let alone = cell.counted.as_ref().and_then(|o| each(std::slice::from_ref(o), of)?.pop());
        alone.or_else(|| middle(of))
    };
    let polls = rounds.iter().any(|o| o.server.busy_ns.is_some());
    let polling = if polls { middle(|s| s.cpu_ns) } else { None };
    let above = match (setup.frontend(), cpu_us_per_io, floor) {
        (Frontend::Nbd, Some(cpu), Some(floor)) => Some(cpu - floor),
        _ => None,
    };
    // The round in the middle stands for all where there is no median of a whole distribution.
    let nearest = |o: &&Outcome| (o.iops - iops).abs();
    let typical = rounds.iter().min_by(|a, b| nearest(a).total_cmp(&nearest(b)))?;
    let labels = cell.labels;
    let mut variant = setup.variant();
    for (name, value) in labels {
        let comma = if variant.is_empty() { "" } else { ", " };
        variant = format!("{variant}{comma}{name}={value}");
    }
    let most = job.sizes.0.iter().max_by_key(|s| s.1);
    Some(Row {
        peer: setup.peer().name().to_owned(),
        frontend: setup.frontend(),
        variant,
        workload: job.name.clone(),
        block_size: most.map_or(0, |s| s.0),
        depth: job.depth(),
        iops,
        latency_ns: of(|o| o.latency_ns.p50 as f64)? as u64,
        cpu_us_per_io,
        cpu_us_per_io_polling: polling.map(|ns| ns / 1000.0),
        syscalls_per_io: counted(|s| s.syscalls),
        instructions_per_io: counted(|s| s.instructions),
        switches_per_io: middle(|s| s.switches),
        ratio: ratio.map(|r| r.value),
        ratio_interval: ratio.and_then(|r| r.interval),
        cpu_us_above_floor: above,
        percentiles_ns: typical.latency_ns,
        rounds: rounds.clone(),
        labels: labels.clone(),
        command: cell.command.clone(),
    })
}

#[cfg(test)]
mod tests {
    use bench::run::Percentiles;

    use super::*;
    use crate::peer::Leaf;
    use crate::peer::qemu::Aio;

    fn outcome(iops: f64, cpu_us: f64, busy_us: Option<f64>, syscalls: Option<u64>) -> Outcome {
        let ns = |us: f64| (us * 1000.0 * 100.0) as u64;
        Outcome {
            seconds: 1.0,
            requests: 100,
            bytes: 409_600,
            errors: 0,
            iops,
            latency_ns: Percentiles { p50: (1e9 / iops) as u64, ..Percentiles::default() },
            reads: None,
            writes: None,
            trims: None,
            flushes: None,
            cdf: Vec::new(),
            windows: Vec::new(),
            steady: None,
            server: Server {
                cpu_ns: Some(ns(cpu_us)),
                busy_ns: busy_us.map(ns),
                syscalls,
                ..Server::default()
            },
            verified_bytes: 0,
        }
    }

    #[test]
    fn a_row_puts_its_peer_beside_polldisk_through_the_same_frontend() {
        let setups = [
            Setup::polldisk(Frontend::Ring, Leaf::Model),
            Setup::polldisk(Frontend::Nbd, Leaf::File),
            Setup::qsd(Aio::Native),
            Setup::NbdkitMemory,
            Setup::Fio,
        ];
        let cpu: [[f64; 3]; 5] = [
            [10.0, 10.0, 10.0],
            [4.0, 6.0, 5.0],
            [8.0, 12.0, 10.0],
            [3.0, 3.0, 3.0],
            [2.0, 2.0, 2.0],
        ];
        let (labels, job) = (BTreeMap::from([("chain".into(), "8".into())]), Job::default());
        let cell = |n: usize| {
            let ring = n == 0;
            let rounds =
                cpu[n].map(|us| outcome(1e6 / us, us, ring.then_some(0.5), ring.then_some(0)));
            let counted = (n == 2).then(|| outcome(1.0, 1.0, None, Some(950)));
            let (setup, command) = (&setups[n], String::new());
            Cell { setup, labels: &labels, job: &job, rounds: rounds.into(), counted, command }
        };
        let cells: Vec<_> = (0..5).map(cell).collect();
        let rows = rows(&cells);
        let [ring, nbd, qsd, floor, fio] = &rows[..] else { panic!("{}", rows.len()) };
        assert_eq!((ring.cpu_us_per_io, ring.cpu_us_per_io_polling), (Some(0.5), Some(10.0)));
        assert_eq!((ring.ratio, ring.syscalls_per_io), (Some(1.0), Some(0.0)));
        assert_eq!(ring.cpu_us_above_floor, None);
        assert_eq!((nbd.ratio, nbd.cpu_us_above_floor), (Some(1.0), Some(2.0)));
        assert_eq!(nbd.cpu_us_per_io_polling, None);
        assert_eq!((qsd.ratio, qsd.ratio_interval), (Some(2.0), Some([2.0, 2.0])));
        assert_eq!((qsd.cpu_us_above_floor, qsd.syscalls_per_io), (Some(7.0), Some(9.5)));
        assert_eq!((qsd.iops, qsd.latency_ns), (1e5, 10_000));
        assert_eq!((floor.ratio, floor.cpu_us_above_floor), (Some(0.6), Some(0.0)));
        assert_eq!((fio.ratio, fio.cpu_us_above_floor), (Some(4.0), None));
        assert_eq!(qsd.variant, "aio=native, chain=8");
        assert_eq!((qsd.block_size, qsd.depth, qsd.rounds.len()), (4096, 1, 3));
    }
}
