//! Charts of a comparison as SVG: latency, IOPS, processor time, system calls, distributions, ratios, and
//! lines over what a profile varies.
//!
//! What is not finite, or beyond any measurement, is left out, since results may come from anywhere.

mod draw;
mod rows;
mod scale;
pub(crate) mod theme;

use bench::run::Percentiles;

use crate::results::{Comparison, Row};
pub(crate) use draw::figure;
use draw::{Bar, Dot, Line};
pub(crate) use rows::{Entry, POLLDISK, Panel, Rows, Series, bytes, frontend};
use scale::Scale;

/// More than anything that is measured, in any unit; and less.
const MOST: f64 = 1e15;
const LEAST: f64 = 1e-6;

/// Nines that an axis shows at most: 99.999 %.
const NINES: u32 = 5;

/// A chart.
pub(crate) struct Chart {
    /// Its file's name.
    pub(crate) file: String,
    /// What it shows, for those who do not see it.
    alt: String,
    svg: String,
}

impl Chart {
    /// As an element of the page; `id` is its own there.
    pub(crate) fn inline(&self, id: &str) -> String {
        self.with(&format!("class=\"chart\" aria-labelledby=\"{id}\""), id, "")
    }

    /// As a file of its own.
    pub(crate) fn alone(&self) -> String {
        let style = format!(
            "<style>{}</style><rect width=\"100%\" height=\"100%\" fill=\"var(--ground)\"/>",
            theme::css()
        );
        let head = "class=\"chart\" aria-labelledby=\"t\" xmlns=\"http://www.w3.org/2000/svg\"";
        self.with(head, "t", &style)
    }

    fn with(&self, attributes: &str, id: &str, after: &str) -> String {
        // The head that plotters writes ends with the first `>`.
        let (head, body) = self.svg.split_once('>').unwrap_or_default();
        let view = head.split_once("viewBox=\"").and_then(|(_, rest)| rest.split_once('"'));
        let view = view.map_or("0 0 1 1", |(view, _)| view);
        let alt = maud::html! { (self.alt) }.into_string();
        format!(
            "<svg {attributes} role=\"img\" viewBox=\"{view}\">\
             <title id=\"{id}\">{alt}</title>{after}{body}"
        )
    }
}

/// Charts of one kind.
pub(crate) struct Group {
    /// What they show.
    pub(crate) title: &'static str,
    /// How to read them.
    pub(crate) note: &'static str,
    pub(crate) charts: Vec<Chart>,
}

/// A quantity.
struct Metric {
    title: &'static str,
    note: &'static str,
    /// For names of files.
    slug: &'static str,
    value: fn(&Row) -> Option<f64>,
    longer: fn(&Row) -> Option<f64>,
}

const METRICS: [Metric; 4] = [
    Metric {
        title: "Latency, µs",
        note: "Median, from request to response. Less is better.",
        slug: "latency",
        value: |r| Some(r.latency_ns as f64 / 1000.0),
        longer: |_| None,
    },
    Metric {
        title: "IOPS",
        note: "Requests a second. More is better.",
        slug: "iops",
        value: |r| Some(r.iops),
        longer: |_| None,
    },
    Metric {
        title: "CPU per I/O, µs",
        note: "Processor time of the server for each request; of a server that polls, the time in which it \
               had work. Paler bars, and figures in brackets: with the time in which it polled in vain. \
               Less is better.",
        slug: "cpu",
        value: |r| r.cpu_us_per_io,
        longer: |r| r.cpu_us_per_io_polling,
    },
    Metric {
        title: "System calls per I/O",
        note: "Of the server, for each request. Less is better.",
        slug: "syscalls",
        value: |r| r.syscalls_per_io,
        longer: |_| None,
    },
];

const RATIO_NOTE: &str = "Processor time for each request over polldisk's, with the 95 % confidence interval \
                          over the rounds. The line is polldisk: right of it, a peer takes more.";

const CDF_NOTE: &str = "Share of requests that were answered within a time. The time is logarithmic, and each \
                        line up is a tenth of the requests that are left. Further left is better.";

/// What can be drawn.
fn sound(value: f64) -> Option<f64> {
    (value.is_finite() && (0.0..=MOST).contains(&value)).then_some(value)
}

/// What can be drawn on a logarithmic axis.
fn positive(value: f64) -> Option<f64> {
    sound(value).filter(|v| *v >= LEAST)
}

/// A name for files and anchors: letters, digits and hyphens.
pub(crate) fn slug(text: &str) -> String {
    let mut slug: String = text
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' })
        .take(60)
        .collect();
    while slug.contains("--") {
        slug = slug.replace("--", "-");
    }
    slug.trim_matches('-').to_owned()
}

/// What a chart is made from.
struct Plot<'a> {
    rows: &'a Rows<'a>,
    panel: &'a Panel<'a>,
}

type Drawn = Option<Result<Chart, String>>;

fn chart(title: &str, panel: &str, said: &[String], svg: Result<String, String>) -> Drawn {
    let alt = format!("{title}; {panel}: {}", said.join("; "));
    (!said.is_empty()).then(|| Ok(Chart { file: String::new(), alt, svg: svg? }))
}

impl Plot<'_> {
    fn series(&self, entry: &Entry<'_>) -> &Series {
        &self.rows.series[entry.series]
    }

    /// How an entry differs from others of its peer: its way, and where it is on what is varied, unless
    /// all are there.
    fn how(&self, entry: &Entry<'_>) -> String {
        let how = self.series(entry).how();
        let same = self.panel.entries.iter().all(|e| e.at == entry.at);
        match (&self.rows.varied, entry.at) {
            (Some((name, values)), Some(at)) if !same => format!("{how}, {name} {}", values[at]),
            _ => how,
        }
    }

    fn metric(&self, metric: &Metric) -> Drawn {
        match &self.rows.varied {
            Some((name, values)) if self.panel.varies() => self.sweep(metric, name, values),
            _ => self.bars(metric),
        }
    }

    fn bars(&self, metric: &Metric) -> Drawn {
        let bar = |e: &Entry<'_>| {
            Some(Bar {
                name: e.row.peer.clone(),
                how: self.how(e),
                series: e.series,
                value: (metric.value)(e.row).and_then(sound)?,
                longer: (metric.longer)(e.row).and_then(sound),
            })
        };
        let bars: Vec<Bar> = self.panel.entries.iter().filter_map(bar).collect();
        let said: Vec<String> =
            bars.iter().map(|b| format!("{} ({}) {}", b.name, b.how, figure(b.value))).collect();
        let svg = draw::bars(metric.title, &self.panel.name, &bars);
        chart(metric.title, &self.panel.name, &said, svg)
    }

    /// A metric over what is varied.
    fn sweep(&self, metric: &Metric, varied: &str, values: &[String]) -> Drawn {
        let mut lines: Vec<Line> = Vec::new();
        for entry in &self.panel.entries {
            let point = (metric.value)(entry.row).and_then(positive);
            let Some(point) = point.zip(entry.at).map(|(v, at)| (at as f64, v)) else { continue };
            match lines.iter_mut().find(|l| l.series == entry.series) {
                Some(line) => line.points.push(point),
                None => lines.push(Line {
                    name: self.series(entry).name(),
                    series: entry.series,
                    points: vec![point],
                }),
            }
        }
        let say = |l: &Line| {
            let figures: Vec<String> = l
                .points
                .iter()
                .map(|(at, v)| format!("{} at {}", figure(*v), values[*at as usize]))
                .collect();
            format!("{} {}", l.name, figures.join(", "))
        };
        let said: Vec<String> = lines.iter().map(say).collect();
        let title = format!("{}, by {varied}", metric.title);
        let scales = (Scale::Names(values.to_vec()), Scale::Log);
        let svg = draw::lines(&title, &self.panel.name, scales, &lines, true);
        chart(&title, &self.panel.name, &said, svg)
    }

    fn distribution(&self) -> Drawn {
        const TITLE: &str = "Requests answered within, µs";
        let (mut lines, mut said): (Vec<Line>, Vec<String>) = (Vec::new(), Vec::new());
        for e in &self.panel.entries {
            // Of several of one colour, the first.
            let points = nines(e.row);
            if points.len() < 2 || lines.iter().any(|l| l.series == e.series) {
                continue;
            }
            let name = format!("{} ({})", e.row.peer, self.how(e));
            let p = &e.row.percentiles_ns;
            let [p50, p99] = [p.p50, p.p99].map(|n| figure(n as f64 / 1000.0));
            said.push(format!("{name}: half within {p50}, 99 % within {p99}"));
            lines.push(Line { name, series: e.series, points });
        }
        let most = lines.iter().flat_map(|l| l.points.last()).map(|p| p.1).fold(1.0, f64::max);
        let scales = (Scale::Log, Scale::Nines((most.ceil() as u32).clamp(2, NINES)));
        let svg = draw::lines(TITLE, &self.panel.name, scales, &lines, false);
        chart(TITLE, &self.panel.name, &said, svg)
    }

    fn ratios(&self) -> Drawn {
        const TITLE: &str = "CPU per I/O, times polldisk's";
        let dot = |e: &Entry<'_>| {
            let interval = e.row.ratio_interval;
            Some(Dot {
                name: e.row.peer.clone(),
                how: self.how(e),
                series: e.series,
                value: e.row.ratio.and_then(positive)?,
                interval: interval.and_then(|[a, b]| Some([positive(a)?, positive(b)?])),
            })
        };
        let others = self.panel.entries.iter().filter(|e| e.row.peer != POLLDISK);
        let dots: Vec<Dot> = others.filter_map(dot).collect();
        let said: Vec<String> =
            dots.iter().map(|d| format!("{} ({}) {}", d.name, d.how, figure(d.value))).collect();
        let svg = draw::ratios(TITLE, &self.panel.name, &dots);
        chart(TITLE, &self.panel.name, &said, svg)
    }
}

/// The distribution of a row's latencies in microseconds, as nines: of the round with the median rate,
/// else from its percentiles.
fn nines(row: &Row) -> Vec<(f64, f64)> {
    let mut rounds: Vec<_> = row.rounds.iter().filter(|o| !o.cdf.is_empty()).collect();
    rounds.sort_by(|a, b| a.iops.total_cmp(&b.iops));
    let shares: Vec<(u64, f64)> = match rounds.get(rounds.len() / 2) {
        Some(round) => round.cdf.clone(),
        None => {
            let Percentiles { min, p50, p90, p99, p99_9, p99_99, p99_999, .. } = row.percentiles_ns;
            let tail = [(p99, 0.99), (p99_9, 0.999), (p99_99, 0.9999), (p99_999, 0.99999)];
            [(min, 0.0), (p50, 0.5), (p90, 0.9)].into_iter().chain(tail).collect()
        }
    };
    let most = f64::from(NINES);
    let mut points: Vec<(f64, f64)> = shares
        .into_iter()
        .filter_map(|(ns, share)| {
            let us = positive(ns as f64 / 1000.0)?;
            let share = sound(share).filter(|s| *s <= 1.0)?;
            Some((us, (-(1.0 - share).max(1e-9).log10()).clamp(0.0, most)))
        })
        .collect();
    points.sort_by(|a, b| a.0.total_cmp(&b.0));
    points
}

/// All charts of a comparison; `prefix` begins the names of their files.
///
/// # Errors
/// What could not be drawn.
pub(crate) fn charts(c: &Comparison, prefix: &str) -> Result<Vec<Group>, String> {
    let rows = Rows::of(c);
    let plots = || rows.panels.iter().map(|panel| Plot { rows: &rows, panel });
    let mut groups = Vec::new();
    let mut group = |title, slug: &str, note, drawn: Vec<Drawn>| {
        let drawn = drawn.into_iter().flatten();
        let mut charts = drawn.collect::<Result<Vec<Chart>, String>>()?;
        for (n, chart) in charts.iter_mut().enumerate() {
            chart.file = format!("{prefix}-{slug}-{}.svg", n + 1);
        }
        if !charts.is_empty() {
            groups.push(Group { title, note, charts });
        }
        Ok::<(), String>(())
    };
    for metric in &METRICS {
        let drawn = plots().map(|p| p.metric(metric)).collect();
        group(metric.title, metric.slug, metric.note, drawn)?;
    }
    group("CPU ratio", "ratio", RATIO_NOTE, plots().map(|p| p.ratios()).collect())?;
    group("Latency distribution", "cdf", CDF_NOTE, plots().map(|p| p.distribution()).collect())?;
    Ok(groups)
}
