//! The report: one HTML page that needs nothing else, with the results as JSON and CSV and the charts as SVG
//! beside it.

mod answer;
mod flames;
#[cfg(test)]
mod tests;

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use maud::{DOCTYPE, Markup, PreEscaped, html};

use crate::charts::{self, Chart, Group, POLLDISK, figure, theme};
use crate::results::{Comparison, Host, Row};
use answer::answer;
use flames::Picture;

/// Why a report could not be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A chart or flame graph.
    #[error("{0}")]
    Draw(String),
    /// A file that holds no results.
    #[error("{}: {why}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// A file.
    #[error("cannot write {}: {error}", path.display())]
    Write {
        /// Which.
        path: PathBuf,
        /// Why.
        error: std::io::Error,
    },
}

/// The folder, within a report's, of charts and flame graphs.
const CHARTS: &str = "charts";

/// Writes a report of comparisons into a folder, which is made if it is not there: `report.html`,
/// `results.json` (the comparison; a list, if there are several), `results.csv`, and `charts/*.svg`.
/// Files of these names are replaced.
///
/// # Errors
/// If a file cannot be written, or a chart not be drawn.
pub fn write(dir: &Path, comparisons: &[Comparison]) -> Result<(), Error> {
    let folder = dir.join(CHARTS);
    fs::create_dir_all(&folder).map_err(|error| Error::Write { path: folder.clone(), error })?;
    let put = |path: PathBuf, text: &[u8]| {
        fs::write(&path, text).map_err(|error| Error::Write { path, error })
    };
    let profiles = comparisons
        .iter()
        .enumerate()
        .map(|(n, c)| Profile::new(n, c))
        .collect::<Result<Vec<_>, _>>()?;
    for profile in &profiles {
        for chart in profile.groups.iter().flat_map(|g| &g.charts) {
            put(folder.join(&chart.file), chart.alone().as_bytes())?;
        }
        for flame in &profile.flames {
            put(folder.join(&flame.file), flame.interactive.as_bytes())?;
        }
    }
    put(dir.join("report.html"), page(&profiles).into_string().as_bytes())?;
    let json = match comparisons {
        [one] => serde_json::to_vec_pretty(one),
        several => serde_json::to_vec_pretty(several),
    };
    let json = json.map_err(|e| Error::Draw(format!("cannot write JSON: {e}")))?;
    put(dir.join("results.json"), &json)?;
    let csv = crate::csv::csv(comparisons);
    put(dir.join("results.csv"), &csv.map_err(|e| Error::Draw(format!("cannot write CSV: {e}")))?)
}

/// More than results of all profiles take.
const MOST: u64 = 256 << 20;

/// Reads results that were written as JSON: a comparison, or a list of them.
///
/// # Errors
/// If the file cannot be read, is too large, or holds something else.
pub fn read(path: &Path) -> Result<Vec<Comparison>, Error> {
    let fail = |why: String| Error::Read { path: path.to_owned(), why };
    let file = fs::File::open(path).map_err(|e| fail(format!("cannot read it: {e}")))?;
    let mut text = Vec::new();
    let got = file.take(MOST + 1).read_to_end(&mut text);
    if got.map_err(|e| fail(format!("cannot read it: {e}")))? as u64 > MOST {
        return Err(fail(format!("larger than {} MiB: these are no results", MOST >> 20)));
    }
    let list = text.iter().find(|b| !b.is_ascii_whitespace()) == Some(&b'[');
    let parsed = match list {
        true => serde_json::from_slice(&text),
        false => serde_json::from_slice(&text).map(|one| vec![one]),
    };
    parsed.map_err(|e| {
        fail(format!("these are no results of `polldisk bench compare --json` or --out: {e}"))
    })
}

/// A comparison with its pictures.
struct Profile<'a> {
    comparison: &'a Comparison,
    /// Its own in the page and among files.
    id: String,
    answer: String,
    groups: Vec<Group>,
    flames: Vec<Picture>,
}

impl<'a> Profile<'a> {
    fn new(n: usize, comparison: &'a Comparison) -> Result<Profile<'a>, Error> {
        // Two comparisons may have one name.
        let id = format!("{}-{}", n + 1, charts::slug(&comparison.profile));
        let id = id.trim_end_matches('-').to_owned();
        let groups = charts::charts(comparison, &id).map_err(Error::Draw)?;
        let flames = flames::pictures(comparison, &id);
        Ok(Profile { comparison, answer: answer(comparison), id, groups, flames })
    }
}

fn page(profiles: &[Profile<'_>]) -> Markup {
    let hosts: Vec<&Host> = profiles.iter().map(|p| &p.comparison.host).collect();
    let one_host = hosts.windows(2).all(|pair| pair[0].facts == pair[1].facts);
    let days: Vec<String> = profiles.iter().map(|p| date(p.comparison.began)).collect();
    html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width,initial-scale=1";
                meta name="color-scheme" content="light dark";
                title { "polldisk and its peers" }
                style { (PreEscaped(theme::css())) (PreEscaped(include_str!("style.css"))) }
            }
            body {
                header {
                    h1 { "polldisk and its peers" }
                    p.muted {
                        "The same requests, sent by the same generator, answered by polldisk and by other \
                         servers of virtual disks, in turns."
                        @if let (Some(first), Some(last)) = (days.iter().min(), days.iter().max()) {
                            " Measured " (first)
                            @if first != last { " to " (last) }
                            "."
                        }
                    }
                    dl.summary {
                        @for p in profiles {
                            dt {
                                a href={ "#" (p.id) } { (p.comparison.profile) } " "
                                @if p.comparison.quick { (quick()) }
                            }
                            dd { (p.answer) }
                        }
                    }
                }
                main {
                    @if let (true, Some(host)) = (one_host, hosts.first()) { (host_section(host, true)) }
                    @for p in profiles { (profile(p, !one_host)) }
                }
                footer {
                    p {
                        "Made by polldisk " (env!("CARGO_PKG_VERSION")) ". The figures are in results.json and \
                         results.csv beside this page, the charts in the folder charts. "
                        code { "polldisk bench report" } " makes the page anew from the former."
                    }
                }
            }
        }
    }
}

fn quick() -> Markup {
    html! { span.badge { "shortened run" } }
}

fn host_section(host: &Host, first: bool) -> Markup {
    let cores = host.cores.map_or_else(
        || "not pinned".to_owned(),
        |[generator, server]| format!("generator on {generator}, server on {server}"),
    );
    html! {
        h2.first[first] id=[first.then_some("host")] { "Host" }
        (scroll("Host", html! {
            table.facts {
                tbody {
                    @for (name, value) in &host.facts {
                        tr { th scope="row" { (name) } td { (value) } }
                    }
                    tr { th scope="row" { "Processors to be had" } td { (host.processors) } }
                    tr { th scope="row" { "Pinned" } td { (cores) } }
                }
            }
        }))
    }
}

/// What scrolls in its own box where it is too wide, by keyboard too.
fn scroll(name: &str, inner: Markup) -> Markup {
    html! { div.scroll role="region" aria-label=(name) tabindex="0" { (inner) } }
}

fn profile(p: &Profile<'_>, with_host: bool) -> Markup {
    let c = p.comparison;
    html! {
        section aria-labelledby=(p.id) {
            h2 id=(p.id) { (c.profile) " " @if c.quick { (quick()) } }
            p { (c.question) }
            p.answer { (p.answer) }
            @if c.quick {
                p.note { "Rounds were shortened: these figures show that it works; they are not to be published." }
            }
            @for group in &p.groups { (charts_of(group, &p.id)) }
            @if !p.flames.is_empty() {
                h3 { "Where the time goes" }
                p.note {
                    "Flame graphs of the servers under load: the wider a frame, the more of the samples had it \
                     on their stack. The files in the folder charts can be searched and zoomed."
                }
                @for flame in &p.flames { (flame_graph(flame)) }
            }
            h3 { "All figures" }
            @if c.results.is_empty() { p { "None." } } @else { (table(c)) }
            h3 { "Peers" }
            (peers(c))
            @if with_host { (host_section(&c.host, false)) }
            @if !c.notes.is_empty() {
                h3 { "Notes" }
                ul { @for note in &c.notes { li { (note) } } }
            }
            h3 { "How to measure it again" }
            p.note { "The whole profile, then single rows of the table by their numbers. Begun " (date(c.began)) "." }
            ol.commands {
                li { pre { (c.command) } }
                @for (rows, command) in commands(&c.results) {
                    li { span.muted { (rows) } pre { (command) } }
                }
            }
        }
    }
}

fn charts_of(group: &Group, id: &str) -> Markup {
    let element = |n: usize, chart: &Chart| {
        let own = format!("{id}-{}-{n}", charts::slug(group.title));
        PreEscaped(chart.inline(&own))
    };
    html! {
        h3 { (group.title) }
        p.note { (group.note) }
        div.grid {
            @for (n, chart) in group.charts.iter().enumerate() { figure { (element(n, chart)) } }
        }
    }
}

fn flame_graph(flame: &Picture) -> Markup {
    html! {
        figure {
            figcaption { strong { (flame.title) } " " span.muted { "(" (flame.samples) " samples)" } }
            (scroll(&flame.title, html! { img src=(flame.url) alt=(flame.alt); }))
        }
    }
}

fn peers(c: &Comparison) -> Markup {
    html! {
        (scroll("Peers", html! {
            table {
                thead { tr { th scope="col" { "Peer" } th scope="col" { "Version" } th scope="col" { "Took part" } } }
                tbody {
                    @for peer in &c.peers {
                        tr {
                            th scope="row" { (peer.name) }
                            td { (peer.version.as_deref().unwrap_or("–")) }
                            td {
                                @match &peer.absent {
                                    Some(why) => { "no: " (why) },
                                    None => { "yes" },
                                }
                            }
                        }
                    }
                }
            }
        }))
    }
}

/// Columns of figures: name, and value as text.
type Column = (&'static str, fn(&Row) -> Option<String>);

fn us(ns: u64) -> Option<String> {
    Some(figure(ns as f64 / 1000.0))
}

fn real(value: Option<f64>) -> Option<String> {
    value.filter(|v| v.is_finite()).map(figure)
}

const COLUMNS: [Column; 14] = [
    ("IOPS", |r| real(Some(r.iops))),
    ("p50 µs", |r| us(r.latency_ns)),
    ("p99 µs", |r| us(r.percentiles_ns.p99)),
    ("p99.9 µs", |r| us(r.percentiles_ns.p99_9)),
    ("p99.99 µs", |r| us(r.percentiles_ns.p99_99)),
    ("max µs", |r| us(r.percentiles_ns.max)),
    ("CPU µs", |r| real(r.cpu_us_per_io)),
    ("with polling", |r| real(r.cpu_us_per_io_polling)),
    ("above NBD floor", |r| real(r.cpu_us_above_floor)),
    ("syscalls", |r| real(r.syscalls_per_io)),
    ("instructions", |r| real(r.instructions_per_io)),
    ("switches", |r| real(r.switches_per_io)),
    ("ratio", |r| real(r.ratio)),
    ("95 % interval", |r| {
        let [low, high] = r.ratio_interval.filter(|i| i.iter().all(|v| v.is_finite()))?;
        Some(format!("{} to {}", figure(low), figure(high)))
    }),
];

fn table(c: &Comparison) -> Markup {
    let rows = &c.results;
    // Columns that nobody has are left out.
    let columns: Vec<&Column> =
        COLUMNS.iter().filter(|(_, value)| rows.iter().any(|r| value(r).is_some())).collect();
    let variants = rows.iter().any(|r| !r.variant.is_empty());
    let errors = |r: &Row| r.rounds.iter().fold(0u64, |sum, o| sum.saturating_add(o.errors));
    let failed = rows.iter().any(|r| errors(r) > 0);
    html! {
        p.note {
            "For each request, medians of the rounds. – is what could not be told here. The ratio is of CPU µs \
             over polldisk's, through the same frontend where polldisk has it, else through its ring."
        }
        (scroll("All figures", html! {
            table.rows {
                thead {
                    tr {
                        th.n scope="col" { "#" }
                        th scope="col" { "Peer" }
                        th scope="col" { "Through" }
                        @if variants { th scope="col" { "Variant" } }
                        th scope="col" { "Workload" }
                        th.n scope="col" { "Size" }
                        th.n scope="col" { "Depth" }
                        @for (name, _) in &columns { th.n scope="col" { (name) } }
                        @if failed { th.n scope="col" { "failed" } }
                    }
                }
                tbody {
                    @for (n, r) in rows.iter().enumerate() {
                        tr.own[r.peer == POLLDISK] {
                            td.n { (n + 1) }
                            th scope="row" { (r.peer) }
                            td { (charts::frontend(r.frontend)) }
                            @if variants { td title=(labels(r)) { (r.variant) } }
                            td { (r.workload) }
                            td.n { (charts::bytes(r.block_size)) }
                            td.n { (r.depth) }
                            @for (_, value) in &columns { td.n { (value(r).unwrap_or_else(|| "–".to_owned())) } }
                            @if failed { td.n { (errors(r)) } }
                        }
                    }
                }
            }
        }))
    }
}

/// What a profile says of a row, in a line.
pub(crate) fn labels(row: &Row) -> String {
    let one = |(name, value): (&String, &String)| format!("{name}={value}");
    row.labels.iter().map(one).collect::<Vec<_>>().join("; ")
}

/// Commands, each once, with the numbers of the rows that it measures.
fn commands(rows: &[Row]) -> Vec<(String, &str)> {
    let mut all: Vec<(Vec<usize>, &str)> = Vec::new();
    for (n, row) in rows.iter().enumerate().filter(|(_, r)| !r.command.is_empty()) {
        match all.iter_mut().find(|(_, command)| *command == row.command) {
            Some((numbers, _)) => numbers.push(n + 1),
            None => all.push((vec![n + 1], &row.command)),
        }
    }
    let named = |numbers: Vec<usize>| {
        let text: Vec<String> = numbers.iter().map(usize::to_string).collect();
        format!("# {}", text.join(", "))
    };
    all.into_iter().map(|(numbers, command)| (named(numbers), command)).collect()
}

/// A time as day and minute, UTC; a proleptic Gregorian calendar.
fn date(seconds: u64) -> String {
    // Days since 1 March of year 0, so that a leap day is the last one of its year; in cycles of 400 years.
    let days = (seconds / 86_400).min(u64::MAX / 4) + 719_468;
    let (cycle, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let of_month = day - (153 * month + 2) / 5 + 1;
    let (month, next) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    let (hour, minute) = (seconds / 3600 % 24, seconds / 60 % 60);
    format!("{:04}-{month:02}-{of_month:02} {hour:02}:{minute:02} UTC", cycle * 400 + year + next)
}
