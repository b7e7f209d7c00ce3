//! What a comparison's figures say, in one sentence that is made from them alone.

use crate::charts::{Entry, POLLDISK, Panel, Rows, Series, bytes, figure, frontend};
use crate::results::{Comparison, Row};

/// Others that are named.
const NAMED: usize = 4;

/// The answer to a profile's question.
pub(super) fn answer(c: &Comparison) -> String {
    if c.results.is_empty() {
        return "Nothing was measured.".to_owned();
    }
    if !c.results.iter().any(|r| r.peer == POLLDISK) {
        return "There are no figures of polldisk here to compare with.".to_owned();
    }
    let rows = Rows::of(c);
    let said = [varied(&rows), latency(&rows), ratios(&rows)];
    let mut parts: Vec<String> = said.into_iter().flatten().collect();
    if parts.is_empty() {
        parts.push("no peer took part that polldisk could be compared with".to_owned());
    }
    let text = parts.join("; ");
    if text.starts_with(POLLDISK) {
        // Which is written small.
        return text + ".";
    }
    let mut letters = text.chars();
    let first = letters.next().into_iter().flat_map(char::to_uppercase);
    first.chain(letters).chain(['.']).collect()
}

fn listed(mut items: Vec<String>) -> String {
    match items.pop() {
        Some(last) if items.is_empty() => last,
        Some(last) => format!("{} and {last}", items.join(", ")),
        None => String::new(),
    }
}

/// The mean of factors.
fn geometric(factors: &[f64]) -> Option<f64> {
    let logs: f64 = factors.iter().map(|f| f.ln()).sum();
    (!factors.is_empty()).then(|| (logs / factors.len() as f64).exp())
}

fn good(value: f64) -> bool {
    value.is_finite() && value > 0.0
}

/// How many times polldisk's processor time others take, each in the way that suits it best.
fn ratios(rows: &Rows<'_>) -> Option<String> {
    let mut peers: Vec<(&str, String, f64)> = Vec::new();
    let mut most = 0;
    for (i, series) in rows.series.iter().enumerate().filter(|(_, s)| s.peer != POLLDISK) {
        let entries = rows.panels.iter().flat_map(|p| &p.entries).filter(|e| e.series == i);
        let all: Vec<f64> = entries.filter_map(|e| e.row.ratio.filter(|r| good(*r))).collect();
        let Some(mean) = geometric(&all) else { continue };
        most = most.max(all.len());
        match peers.iter_mut().find(|p| p.0 == series.peer) {
            Some(peer) if mean < peer.2 => *peer = (&series.peer, short(series), mean),
            Some(_) => {}
            None => peers.push((&series.peer, short(series), mean)),
        }
    }
    peers.sort_by(|a, b| b.2.total_cmp(&a.2));
    let said: Vec<String> = peers
        .iter()
        .take(NAMED)
        .map(|(_, name, ratio)| format!("{} times as much in {name}", figure(*ratio)))
        .collect();
    let means = if most > 1 { " (geometric means)" } else { "" };
    let said = (!said.is_empty()).then(|| listed(said))?;
    Some(format!("a request costs the server, against polldisk, {said}{means}"))
}

/// Latency at the least depth.
fn latency(rows: &Rows<'_>) -> Option<String> {
    // Of what both polldisk and others were sent.
    let has = |p: &Panel<'_>, own: bool| p.entries.iter().any(|e| (e.row.peer == POLLDISK) == own);
    let panels = || rows.panels.iter().filter(|p| has(p, true) && has(p, false));
    let known = || panels().flat_map(|p| &p.entries).filter(|e| e.row.latency_ns > 0);
    let least = known().min_by_key(|e| e.row.depth)?.row;
    let same = |r: &Row| {
        (r.depth, r.block_size, &r.workload, &r.labels)
            == (least.depth, least.block_size, &least.workload, &least.labels)
    };
    let us = |e: &Entry<'_>| figure(e.row.latency_ns as f64 / 1000.0);
    let mut ours: Vec<&Entry<'_>> = Vec::new();
    for e in known().filter(|e| same(e.row) && e.row.peer == POLLDISK) {
        if !ours.iter().any(|o| o.row.frontend == e.row.frontend) {
            ours.push(e);
        }
    }
    let others = known().filter(|e| same(e.row) && e.row.peer != POLLDISK);
    let best = others.min_by_key(|e| e.row.latency_ns)?;
    let said: Vec<String> =
        ours.iter().map(|e| format!("{} µs ({})", us(e), frontend(e.row.frontend))).collect();
    let said = (!said.is_empty()).then(|| listed(said))?;
    Some(format!(
        "polldisk answers in {said}, the fastest peer, {}, in {} µs ({}, {}, depth {})",
        short(&rows.series[best.series]),
        us(best),
        least.workload,
        bytes(least.block_size),
        least.depth
    ))
}

/// A peer and through what it was asked.
fn short(series: &Series) -> String {
    format!("{} ({})", series.peer, frontend(series.frontend))
}

/// What becomes of the rate over what is varied: how far it falls with less cache, or how it grows from
/// the first value to the last.
fn varied(rows: &Rows<'_>) -> Option<String> {
    let (name, values) = rows.varied.as_ref()?;
    let mut said: Vec<(&str, String, f64)> = Vec::new();
    // With more cache a rate is higher or the same: the lowest counts. Else: first against last.
    let is_cache =
        !rows.panels.iter().flat_map(|p| &p.entries).any(|e| e.row.labels.contains_key(name));
    for (i, series) in rows.series.iter().enumerate() {
        let mut factors = Vec::new();
        for panel in &rows.panels {
            let mine = panel.entries.iter().filter(|e| e.series == i && e.at.is_some());
            let rates: Vec<f64> = mine.map(|e| e.row.iops).filter(|r| good(*r)).collect();
            let (Some(first), Some(last)) = (rates.first(), rates.last()) else { continue };
            let highest = rates.iter().copied().fold(0.0, f64::max);
            let lowest = rates.iter().copied().fold(f64::MAX, f64::min);
            if rates.len() > 1 {
                factors.push(if is_cache { lowest / highest } else { last / first });
            }
        }
        let Some(mean) = geometric(&factors) else { continue };
        // The best way of each peer; of polldisk the first, its ring.
        match said.iter_mut().find(|s| s.0 == series.peer) {
            Some(s) if series.peer != POLLDISK && mean > s.2 => {
                *s = (&series.peer, short(series), mean);
            }
            Some(_) => {}
            None => said.push((&series.peer, short(series), mean)),
        }
    }
    if said.first()?.0 != POLLDISK {
        return None;
    }
    let times = |(_, who, factor): &(&str, String, f64)| match is_cache {
        true => format!("{:.0} % in {who}", factor * 100.0),
        false => format!("{} times as many in {who}", figure(*factor)),
    };
    let all: Vec<String> = said.iter().take(NAMED + 1).map(times).collect();
    let (first, last) = (values.first()?, values.last()?);
    Some(match is_cache {
        true => format!(
            "between the settings of {name}, the lowest IOPS are, of the highest, {}",
            listed(all)
        ),
        false => format!("from {name} {first} to {last}, IOPS become {}", listed(all)),
    })
}
