//! The page: the text format of Prometheus, version 0.0.4 (its documentation, "Exposition formats").

use std::fmt::Write as _;

use reactor::Distribution;

use crate::serve::figures::{Disk, Figures, Io, OfReactor, User};

/// Bounds of the buckets of histograms, as powers of two in nanoseconds: 4 µs to 4.3 s.
const BOUNDS: std::ops::RangeInclusive<u32> = 12..=32;

/// Nanoseconds as seconds.
fn seconds(ns: u64) -> f64 {
    ns as f64 / 1e9
}

/// A value of a label: anything at all.
fn escape(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

/// The page under way.
struct Page(String);

impl Page {
    fn put(&mut self, line: std::fmt::Arguments<'_>) {
        // Into a string it cannot fail.
        let _ = self.0.write_fmt(format_args!("{line}\n"));
    }

    fn family(&mut self, name: &str, kind: &str, help: &str) {
        self.put(format_args!("# HELP polldisk_{name} {help}"));
        self.put(format_args!("# TYPE polldisk_{name} {kind}"));
    }

    /// A family with a sample of each of several things, which go by their labels.
    fn samples<T>(&mut self, family: &Family<T>, of: &[(String, &T)]) {
        let (name, kind, help, value) = family;
        self.family(name, kind, help);
        for (labels, thing) in of {
            self.put(format_args!("polldisk_{name}{{{labels}}} {}", value(thing)));
        }
    }

    fn histograms<'a>(
        &mut self,
        (name, help): (&str, &str),
        of: &[(String, &'a Io)],
        value: impl Fn(&'a Io) -> &'a Distribution,
    ) {
        self.family(name, "histogram", help);
        for (labels, io) in of {
            let times = value(io);
            for power in BOUNDS {
                let (bound, n) = (seconds(1 << power), times.below(power));
                self.put(format_args!("polldisk_{name}_bucket{{{labels},le=\"{bound}\"}} {n}"));
            }
            let (sum, count) = (seconds(times.sum()), times.count());
            self.put(format_args!("polldisk_{name}_bucket{{{labels},le=\"+Inf\"}} {count}"));
            self.put(format_args!("polldisk_{name}_sum{{{labels}}} {sum}"));
            self.put(format_args!("polldisk_{name}_count{{{labels}}} {count}"));
        }
    }
}

fn labels(disk: &Disk) -> String {
    let image = escape(&disk.image);
    match &disk.user {
        User::Nbd => format!("image=\"{image}\",frontend=\"nbd\""),
        User::Guest { id, .. } => {
            let (domid, devid) = (id.domid, id.devid);
            format!("image=\"{image}\",frontend=\"blkif\",domid=\"{domid}\",devid=\"{devid}\"")
        }
    }
}

/// Name, type, help, and the value of one thing.
type Family<T> = (&'static str, &'static str, &'static str, fn(&T) -> f64);

/// What there is of each reactor.
const REACTORS: [Family<OfReactor>; 7] = [
    ("reactor_busy_seconds_total", "counter", "Time in turns that had work.", |r| {
        seconds(r.busy_ns)
    }),
    ("reactor_idle_seconds_total", "counter", "Time in turns without work and asleep.", |r| {
        seconds(r.idle_ns)
    }),
    ("reactor_turns_total", "counter", "Turns of the loop.", |r| r.turns as f64),
    ("reactor_idle_turns_total", "counter", "Turns without work.", |r| r.idle_turns as f64),
    ("reactor_sleeps_total", "counter", "Times it went to sleep.", |r| r.sleeps as f64),
    ("reactor_completions_total", "counter", "Requests that devices ended.", |r| {
        r.completions as f64
    }),
    ("reactor_strays_total", "counter", "Completions that nobody waits for.", |r| r.strays as f64),
];

/// What there is of each disk.
const DISKS: [Family<Io>; 9] = [
    ("disk_reads_total", "counter", "Read requests.", |io| io.reads as f64),
    ("disk_writes_total", "counter", "Write requests.", |io| io.writes as f64),
    ("disk_flushes_total", "counter", "Flushes and barriers.", |io| io.flushes as f64),
    ("disk_discards_total", "counter", "Discards.", |io| io.discards as f64),
    ("disk_read_bytes_total", "counter", "Bytes read.", |io| io.read_bytes as f64),
    ("disk_written_bytes_total", "counter", "Bytes written.", |io| io.written_bytes as f64),
    ("disk_errors_total", "counter", "Requests answered with an error.", |io| io.errors as f64),
    ("disk_in_flight", "gauge", "Requests taken and not yet answered.", |io| io.in_flight as f64),
    (
        "disk_in_flight_seconds_total",
        "counter",
        "Time in flight of all requests together: its rate is the mean queue depth.",
        |io| seconds(io.in_flight_ns),
    ),
];

/// All figures.
pub(super) fn page(figures: &Figures) -> String {
    let mut page = Page(String::new());
    let version = env!("CARGO_PKG_VERSION");
    page.family("build_info", "gauge", "The daemon's version.");
    page.put(format_args!("polldisk_build_info{{version=\"{version}\"}} 1"));
    let reactors = figures.reactors.iter().enumerate();
    let reactors: Vec<_> = reactors.map(|(n, r)| (format!("reactor=\"{n}\""), r)).collect();
    for family in &REACTORS {
        page.samples(family, &reactors);
    }
    page.family("vbd_info", "gauge", "The guest whose device it is, and the disk's name in it.");
    for disk in &figures.disks {
        if let User::Guest { name, vm, .. } = &disk.user {
            let (labels, vm) = (labels(disk), vm.as_deref().unwrap_or_default());
            page.put(format_args!("polldisk_vbd_info{{{labels},vbd=\"{name}\",vm=\"{vm}\"}} 1"));
        }
    }
    let disks: Vec<_> = figures.disks.iter().map(|disk| (labels(disk), &disk.io)).collect();
    for family in &DISKS {
        page.samples(family, &disks);
    }
    page.histograms(
        ("disk_read_latency_seconds", "What reads took, of a sample of them."),
        &disks,
        |io| &io.read_latency,
    );
    page.histograms(
        ("disk_write_latency_seconds", "What writes took, of a sample of them."),
        &disks,
        |io| &io.write_latency,
    );
    page.0
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use reactor::Histogram;

    use super::*;
    use crate::serve::device::Id;

    const HOSTILE: &str = "a\"} 1\nb{c=\"\\";

    fn figures() -> Figures {
        let histogram = Histogram::default();
        [100, 4096, 5000, 70_000_000_000].iter().for_each(|&ns| histogram.record(ns));
        let io = Io { reads: 7, in_flight_ns: 1_500_000_000, ..Io::default() };
        let io = Io { read_latency: histogram.read(), ..io };
        let id = Id { domid: 3, devid: 51712 };
        let guest = User::Guest { id, name: "xvda".into(), vm: Some("u-u".into()) };
        let of_reactor = OfReactor {
            turns: u64::MAX,
            idle_turns: 1,
            sleeps: 2,
            completions: 3,
            strays: 0,
            busy_ns: 1,
            idle_ns: 10_000_000,
        };
        Figures {
            reactors: vec![of_reactor.clone(), of_reactor],
            disks: vec![
                Disk { image: HOSTILE.into(), sr: None, user: guest, io },
                Disk { image: HOSTILE.into(), sr: None, user: User::Nbd, io: Io::default() },
            ],
        }
    }

    /// The value in quotes at the beginning of a text, and what follows it.
    fn quoted(text: &str) -> (String, &str) {
        let mut value = String::new();
        let mut chars = text.strip_prefix('"').expect("a quote").char_indices();
        while let Some((at, c)) = chars.next() {
            match c {
                '"' => return (value, &text[at + 2..]),
                '\\' => value.push(match chars.next().expect("what is escaped").1 {
                    'n' => '\n',
                    c @ ('\\' | '"') => c,
                    c => panic!("{c} is escaped"),
                }),
                c => value.push(c),
            }
        }
        panic!("no end of {text}");
    }

    type Series = (String, BTreeMap<String, String>);

    /// A parser that takes nothing but what the documentation of the format says.
    fn parse(page: &str) -> (BTreeMap<String, String>, BTreeMap<Series, f64>) {
        let is_name = |name: &str| {
            !name.is_empty() && name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_')
        };
        let (mut types, mut samples) = (BTreeMap::new(), BTreeMap::new());
        let mut family = String::new();
        assert!(page.ends_with('\n') && !page.contains("\n\n"));
        let mut lines = page.lines();
        while let Some(line) = lines.next() {
            if let Some(help) = line.strip_prefix("# HELP ") {
                let (name, text) = help.split_once(' ').unwrap();
                assert!(is_name(name) && !text.is_empty());
                let kind = lines.next().and_then(|l| l.strip_prefix("# TYPE ")).unwrap();
                let (again, kind) = kind.split_once(' ').unwrap();
                assert_eq!(name, again);
                assert!(["counter", "gauge", "histogram"].contains(&kind));
                assert_eq!(kind == "counter", name.ends_with("_total"));
                family = name.to_owned();
                assert!(types.insert(family.clone(), kind.to_owned()).is_none(), "{name} twice");
                continue;
            }
            let (name, mut rest) = line.split_once('{').expect("labels");
            let suffix =
                name.strip_prefix(&family).unwrap_or_else(|| panic!("{name} is elsewhere"));
            let suffixes: &[&str] = match types[&family].as_str() {
                "histogram" => &["_bucket", "_sum", "_count"],
                _ => &[""],
            };
            assert!(suffixes.contains(&suffix), "{name}");
            let mut labels = BTreeMap::new();
            loop {
                let (label, value) = rest.split_once('=').unwrap();
                assert!(is_name(label));
                let (value, left) = quoted(value);
                assert!(labels.insert(label.to_owned(), value).is_none());
                match left.split_at(1) {
                    (",", left) => rest = left,
                    ("}", left) => {
                        rest = left;
                        break;
                    }
                    _ => panic!("{left}"),
                }
            }
            let value: f64 = rest.strip_prefix(' ').unwrap().parse().unwrap();
            assert!(value.is_finite() && value >= 0.0);
            assert!(samples.insert((name.to_owned(), labels), value).is_none(), "{line} twice");
        }
        (types, samples)
    }

    #[test]
    fn a_page_is_what_the_format_allows_and_names_stay_what_they_are() {
        let (types, samples) = parse(&page(&figures()));
        assert!(types.len() == 1 + 7 + 1 + 9 + 2, "{types:?}");
        let find = |name: &str, labels: &[(&str, &str)]| {
            let wanted = |have: &BTreeMap<String, String>| {
                labels.iter().all(|(k, v)| have.get(*k).is_some_and(|have| have == v))
            };
            let mut found = samples.iter().filter(|((n, l), _)| n == name && wanted(l));
            let (_, value) = found.next().unwrap_or_else(|| panic!("{name} {labels:?}"));
            assert!(found.next().is_none(), "{name} {labels:?} is not one");
            *value
        };
        let guest = [("image", HOSTILE), ("frontend", "blkif"), ("domid", "3"), ("devid", "51712")];
        assert_eq!(find("polldisk_disk_reads_total", &guest), 7.0);
        assert_eq!(find("polldisk_disk_in_flight_seconds_total", &guest), 1.5);
        assert_eq!(find("polldisk_disk_reads_total", &[("frontend", "nbd")]), 0.0);
        assert_eq!(find("polldisk_vbd_info", &[("vm", "u-u"), ("vbd", "xvda")]), 1.0);
        assert_eq!(find("polldisk_reactor_idle_seconds_total", &[("reactor", "1")]), 0.01);
        // Buckets hold all below their bound, and the bounds are those of the histogram.
        let bucket = |le: &str| {
            let labels = [guest[0], guest[1], ("le", le)];
            find("polldisk_disk_read_latency_seconds_bucket", &labels)
        };
        assert_eq!(
            ["0.000004096", "0.000008192", "4.294967296", "+Inf"].map(bucket),
            [1.0, 3.0, 3.0, 4.0]
        );
        assert_eq!(find("polldisk_disk_read_latency_seconds_count", &guest), 4.0);
        assert_eq!(find("polldisk_disk_read_latency_seconds_sum", &guest), 70.000009196);
        let mut bounds: Vec<f64> = samples
            .keys()
            .filter(|(name, l)| {
                name.ends_with("read_latency_seconds_bucket") && l["frontend"] == "nbd"
            })
            .map(|(_, labels)| labels["le"].parse().unwrap())
            .collect();
        bounds.sort_by(f64::total_cmp);
        assert_eq!((bounds.len(), bounds[21]), (22, f64::INFINITY));
    }
}
