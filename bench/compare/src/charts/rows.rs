//! Rows of a comparison by what was sent, by who answered and how, and by what the profile varies.

use crate::results::{Comparison, Frontend, Row};

/// polldisk's name in results.
pub(crate) const POLLDISK: &str = "polldisk";

/// The part of a variant that names the memory for L2 tables, and what it is called on an axis.
const CACHE: &str = "l2-cache ";
const CACHE_NAME: &str = "L2 cache";

/// What stands on the axis for a server that was told nothing of it.
const DEFAULT: &str = "default";

/// Who answered, and how: what one colour stands for.
#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Series {
    pub(crate) peer: String,
    pub(crate) frontend: Frontend,
    /// The variant without what is varied.
    pub(crate) way: String,
}

impl Series {
    /// Through what, and in which way.
    pub(crate) fn how(&self) -> String {
        match self.way.is_empty() {
            true => frontend(self.frontend).to_owned(),
            false => format!("{}, {}", frontend(self.frontend), self.way),
        }
    }

    pub(crate) fn name(&self) -> String {
        format!("{} ({})", self.peer, self.how())
    }
}

/// A row with its place.
#[derive(Clone, Copy)]
pub(crate) struct Entry<'a> {
    pub(crate) row: &'a Row,
    pub(crate) series: usize,
    /// Where on the axis of what is varied.
    pub(crate) at: Option<usize>,
}

/// Rows of one workload.
pub(crate) struct Panel<'a> {
    pub(crate) name: String,
    /// In the order of series.
    pub(crate) entries: Vec<Entry<'a>>,
}

impl Panel<'_> {
    /// Whether one series has several places on the axis.
    pub(crate) fn varies(&self) -> bool {
        let places = |e: &Entry<'_>| {
            self.entries.iter().filter(|o| o.series == e.series && o.at.is_some()).count()
        };
        self.entries.iter().any(|e| places(e) > 1)
    }
}

/// All of it.
pub(crate) struct Rows<'a> {
    /// What is varied, and its values in order.
    pub(crate) varied: Option<(String, Vec<String>)>,
    /// polldisk's first, then as they come.
    pub(crate) series: Vec<Series>,
    pub(crate) panels: Vec<Panel<'a>>,
}

/// What a row's variant says.
struct Parts {
    /// All that is neither a label nor the size of the cache.
    way: String,
    cache: Option<String>,
}

/// A variant is a list of settings with commas between, the labels as `name=value` among them.
fn parts(row: &Row) -> Parts {
    let label = |part: &str| {
        part.split_once('=').is_some_and(|(n, v)| row.labels.get(n).is_some_and(|l| l == v))
    };
    let mut cache = None;
    let mut way = Vec::new();
    for part in row.variant.split(", ").filter(|p| !p.is_empty() && !label(p)) {
        // Perhaps with the letter of a configuration before it.
        let bare = part.split_once(": ").map_or(part, |(_, bare)| bare);
        match bare.strip_prefix(CACHE) {
            Some(size) if cache.is_none() => cache = Some(size.to_owned()),
            _ => way.push(part),
        }
    }
    Parts { way: way.join(", "), cache }
}

impl<'a> Rows<'a> {
    pub(crate) fn of(c: &'a Comparison) -> Rows<'a> {
        let all: Vec<(&Row, Parts)> = c.results.iter().map(|r| (r, parts(r))).collect();
        let varied = varied(&all);
        let is_cache = varied.as_ref().is_some_and(|(name, _)| name == CACHE_NAME);
        let at = |row: &Row, parts: &Parts| {
            let (name, values) = varied.as_ref()?;
            let value = match is_cache {
                true => Some(parts.cache.as_deref().unwrap_or(DEFAULT)),
                false => row.labels.get(name).map(String::as_str),
            };
            values.iter().position(|v| Some(v.as_str()) == value)
        };
        let of = |(row, parts): &(&Row, Parts)| Series {
            peer: row.peer.clone(),
            frontend: row.frontend,
            way: parts.way.clone(),
        };
        let mut series = distinct(all.iter().map(of));
        series.sort_by_key(|s| {
            (s.peer != POLLDISK, s.peer == POLLDISK && s.frontend != Frontend::Ring)
        });
        let panel_of = |row: &Row| {
            let mut name = workload(row);
            let other = |(n, _): &(&String, &String)| Some(*n) != varied.as_ref().map(|(v, _)| v);
            for (label, value) in row.labels.iter().filter(other) {
                name.push_str(&format!(", {label} {value}"));
            }
            name
        };
        let names = distinct(all.iter().map(|(row, _)| panel_of(row)));
        let mut panels: Vec<Panel<'_>> =
            names.into_iter().map(|name| Panel { name, entries: Vec::new() }).collect();
        for (row, parts) in &all {
            let (name, own) =
                (panel_of(row), of(&(row, Parts { way: parts.way.clone(), cache: None })));
            let series = series.iter().position(|s| *s == own).unwrap_or(0);
            let entry = Entry { row, series, at: at(row, parts) };
            let panel = panels.iter_mut().find(|p| p.name == name);
            panel.into_iter().for_each(|p| p.entries.push(entry));
        }
        panels.iter_mut().for_each(|p| p.entries.sort_by_key(|e| (e.series, e.at)));
        Rows { varied, series, panels }
    }
}

/// What a profile varies: the cache, or the first label that has several values.
fn varied(all: &[(&Row, Parts)]) -> Option<(String, Vec<String>)> {
    let caches = distinct(all.iter().filter_map(|(_, parts)| parts.cache.clone()));
    if !caches.is_empty() {
        let mut caches = caches;
        let size = |text: &str| text.split(' ').next().and_then(|n| n.parse::<f64>().ok());
        caches.sort_by(|a, b| size(a).partial_cmp(&size(b)).unwrap_or(std::cmp::Ordering::Equal));
        if all.iter().any(|(_, parts)| parts.cache.is_none()) {
            caches.push(DEFAULT.to_owned());
        }
        return Some((CACHE_NAME.to_owned(), caches));
    }
    let names = distinct(all.iter().flat_map(|(row, _)| row.labels.keys().cloned()));
    let values =
        |name: &String| distinct(all.iter().filter_map(|(r, _)| r.labels.get(name).cloned()));
    names
        .into_iter()
        .map(|name| (values(&name), name))
        .find(|(v, _)| v.len() > 1)
        .map(|(v, n)| (n, v))
}

/// The different values of something, in the order in which they come.
fn distinct<T: PartialEq>(values: impl Iterator<Item = T>) -> Vec<T> {
    let mut all = Vec::new();
    for value in values {
        if !all.contains(&value) {
            all.push(value);
        }
    }
    all
}

/// How a frontend is called.
pub(crate) fn frontend(of: Frontend) -> &'static str {
    match of {
        Frontend::Ring => "ring",
        Frontend::Nbd => "NBD",
        Frontend::Kernel => "kernel",
        Frontend::Device => "device",
    }
}

/// Bytes for people.
pub(crate) fn bytes(n: u32) -> String {
    match n {
        n if n >= 1 << 20 && n % (1 << 20) == 0 => format!("{} MiB", n >> 20),
        n if n >= 1 << 10 && n % (1 << 10) == 0 => format!("{} KiB", n >> 10),
        n => format!("{n} B"),
    }
}

/// What was sent, for people.
pub(crate) fn workload(row: &Row) -> String {
    format!("{}, {}, depth {}", row.workload, bytes(row.block_size), row.depth)
}
