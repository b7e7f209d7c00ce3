//! `cargo xtask perf`: what requests cost on their paths in instructions, beside what they did cost:
//! as the table in the repository says ([`TABLE`]), or in another revision, which is built for that.
//!
//! The gates compare with the table, too: see [`judge`].

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use clap::Args as ClapArgs;
use serde_json::{Value, json};

use crate::cmd::{self, say};
use crate::{gates, suite, tools};

/// The table, from the repository's root. One path a line, so that a change of it can be read.
const TABLE: &str = "tools/xtask/perf.json";

/// By so much of what the table says a path may cost more. One that costs less by more than that is no
/// failure, but the table should say so.
const TOLERANCE: f64 = 0.03;

/// Measure the paths, and compare.
#[derive(ClapArgs)]
pub(crate) struct Args {
    /// Compare with this revision, not with the table. It is built in a folder of its own.
    #[arg(long, value_name = "REV")]
    vs: Option<String>,
    /// Write the table anew.
    #[arg(long, conflicts_with = "vs")]
    update: bool,
}

/// What a request costs on a path.
#[derive(Clone, Debug, PartialEq)]
struct Row {
    name: String,
    depth: u64,
    /// Instructions, the data copy left out.
    total: f64,
    layers: BTreeMap<String, f64>,
}

/// A path before and after; one of them may not have it.
struct Pair<'a> {
    before: Option<&'a Row>,
    after: Option<&'a Row>,
}

/// What is to be said about a path.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Verdict {
    Same,
    Worse,
    Better,
    /// It was not measured.
    Gone,
    /// The table does not have it.
    New,
}

/// Runs the command.
pub(crate) fn command(args: &Args) -> Result<bool> {
    tools::need(&["valgrind"])?;
    let after = measured(&suite::build_polldisk()?)?;
    if let Some(revision) = &args.vs {
        let before = of_revision(revision)?;
        println!("{revision} and what is here, instructions of a request:\n");
        print!("{}", side_by_side(&pairs(&before, &after)));
        return Ok(true);
    }
    let place = crate::root().join(TABLE);
    if args.update {
        std::fs::write(&place, table_of(&after, &compiler()?))
            .with_context(|| format!("cannot write {}", place.display()))?;
        println!("{TABLE} is written: {} paths", after.len());
        return Ok(true);
    }
    let (before, _) = table()?;
    print!("{}", side_by_side(&pairs(&before, &after)));
    match compare(&before, &after) {
        Ok(better) => {
            better.iter().for_each(|line| println!("{line}"));
            Ok(true)
        }
        Err(e) => {
            println!("{e:#}");
            Ok(false)
        }
    }
}

/// The gate: what `polldisk bench path --json` has found, against the table.
///
/// # Errors
/// Says which paths cost more than the tolerance allows, or are missing on one side.
pub(crate) fn judge(report: &Value) -> Result<()> {
    let (before, by) = table()?;
    let compiler = compiler()?;
    if by != compiler {
        say(&format!(
            "gates:   the table is of {by}, this is {compiler}: counts may differ by that"
        ));
    }
    for line in compare(&before, &rows(report)?)? {
        say(&format!("gates:   {line}"));
    }
    Ok(())
}

/// Compares with the table. Returns what is to be said of paths that have become better.
fn compare(table: &[Row], now: &[Row]) -> Result<Vec<String>> {
    let (mut wrong, mut better) = (Vec::new(), Vec::new());
    for pair in pairs(table, now) {
        let text = pair.to_string();
        match pair.verdict() {
            Verdict::Same => {}
            Verdict::Better => {
                better.push(format!("{text}: update the table, by `cargo xtask perf --update`"))
            }
            Verdict::Worse => wrong.push(text),
            Verdict::Gone => {
                wrong.push(format!("{text}: the table has it, but it was not measured"))
            }
            Verdict::New => {
                wrong
                    .push(format!("{text}: not in the table; `cargo xtask perf --update` adds it"));
            }
        }
    }
    let most = TOLERANCE * 100.0;
    ensure!(
        wrong.is_empty(),
        "against {TABLE} (at most {most} % more is allowed; if it must be, say why in \
         docs/performance.md and update the table by `cargo xtask perf --update`): {}",
        wrong.join("; ")
    );
    Ok(better)
}

impl Pair<'_> {
    /// How much the second is of the first, less one.
    fn change(&self) -> Option<f64> {
        Some(self.after?.total / self.before?.total - 1.0)
    }

    fn verdict(&self) -> Verdict {
        match (self.before, self.after, self.change()) {
            (None, ..) => Verdict::New,
            (_, None, _) => Verdict::Gone,
            (.., Some(change)) if change > TOLERANCE => Verdict::Worse,
            (.., Some(change)) if change < -TOLERANCE => Verdict::Better,
            (.., Some(change)) if change.abs() <= TOLERANCE => Verdict::Same,
            // No number.
            _ => Verdict::Worse,
        }
    }
}

impl std::fmt::Display for Pair<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Some(row) = self.after.or(self.before) else { return Ok(()) };
        write!(f, "{} at depth {}", row.name, row.depth)?;
        let (Some(before), Some(after), Some(change)) = (self.before, self.after, self.change())
        else {
            return Ok(());
        };
        write!(f, " {:.1}, was {:.1} ({:+.1} %)", after.total, before.total, 100.0 * change)
    }
}

/// All paths of both, in the order of the second, what only the first has behind them.
fn pairs<'a>(before: &'a [Row], after: &'a [Row]) -> Vec<Pair<'a>> {
    let find = |rows: &'a [Row], like: &Row| {
        rows.iter().find(|r| r.name == like.name && r.depth == like.depth)
    };
    let gone = before.iter().filter(|row| find(after, row).is_none());
    let gone = gone.map(|row| Pair { before: Some(row), after: None });
    let both = after.iter().map(|row| Pair { before: find(before, row), after: Some(row) });
    both.chain(gone).collect()
}

/// A table for people: each path, and under it its layers, as far as they have changed.
fn side_by_side(pairs: &[Pair<'_>]) -> String {
    let mut text =
        format!("{:<24} {:>5} {:>9} {:>9} {:>8}\n", "path", "depth", "before", "after", "change");
    let number = |n: Option<f64>| n.map_or("-".to_owned(), |n| format!("{n:.1}"));
    let percent = |before: Option<f64>, after: Option<f64>| match (before, after) {
        (Some(b), Some(a)) if b > 0.0 => format!("{:+.1} %", 100.0 * (a / b - 1.0)),
        _ => "-".to_owned(),
    };
    let mut line = |name: &str, depth: &str, before: Option<f64>, after: Option<f64>| {
        let change = percent(before, after);
        let _ = writeln!(
            text,
            "{name:<24} {depth:>5} {:>9} {:>9} {change:>8}",
            number(before),
            number(after)
        );
    };
    for pair in pairs {
        let Some(row) = pair.after.or(pair.before) else { continue };
        let total = |row: Option<&Row>| row.map(|r| r.total);
        line(&row.name, &row.depth.to_string(), total(pair.before), total(pair.after));
        let names = [pair.before, pair.after].into_iter().flatten().flat_map(|r| r.layers.keys());
        let mut names: Vec<&String> = names.collect();
        names.sort_unstable();
        names.dedup();
        for name in names {
            let of = |row: Option<&Row>| row.map(|r| r.layers.get(name).copied().unwrap_or(0.0));
            let (before, after) = (of(pair.before), of(pair.after));
            if before.zip(after).is_none_or(|(b, a)| (b - a).abs() >= 0.1) {
                line(&format!("  {name}"), "", before, after);
            }
        }
    }
    text
}

/// What a built `polldisk` needs on its paths.
fn measured(polldisk: &Path) -> Result<Vec<Row>> {
    say(&format!("measuring {}", polldisk.display()));
    rows(&gates::json(polldisk, &["bench", "path", "--json"], 0)?)
}

/// The same of a revision.
fn of_revision(revision: &str) -> Result<Vec<Row>> {
    let folder = crate::cache().join("perf");
    let (tree, target) = (folder.join("tree"), folder.join("target"));
    std::fs::create_dir_all(&folder)
        .with_context(|| format!("cannot make {}", folder.display()))?;
    let git = |args: &[&str]| {
        cmd::ok(Command::new("git").arg("-C").arg(crate::root()).args(args))
            .with_context(|| format!("git {}", args.join(" ")))
    };
    let commit = format!("{revision}^{{commit}}");
    let commit = git(&["rev-parse", "--verify", "--end-of-options", &commit])?;
    let at = tree.to_str().context("the path of the repository is no text")?;
    // Of a run that did not come to its end.
    let leave = || git(&["worktree", "remove", "--force", at]);
    if tree.exists() && leave().is_err() {
        std::fs::remove_dir_all(&tree).with_context(|| format!("cannot remove {at}"))?;
        git(&["worktree", "prune"])?;
    }
    git(&["worktree", "add", "--detach", at, commit.trim()])?;
    let built = suite::build_polldisk_of(&tree, &target);
    let rows = built.and_then(|program| measured(&program));
    leave()?;
    rows.with_context(|| format!("revision {revision}"))
}

/// The rows of a report.
fn rows(report: &Value) -> Result<Vec<Row>> {
    let all = report["scenarios"].as_array().context("there are no scenarios")?;
    all.iter().map(|value| row(value, "instructions_per_request")).collect()
}

fn row(value: &Value, total: &str) -> Result<Row> {
    let name = value["name"].as_str().with_context(|| format!("a path without a name: {value}"))?;
    let depth = value["depth"].as_u64().with_context(|| format!("{name}: no depth"))?;
    let layers = value["layers"].as_object().with_context(|| format!("{name}: no layers"))?;
    let layers = layers
        .iter()
        .map(|(layer, n)| Some((layer.clone(), n.as_f64()?)))
        .collect::<Option<_>>()
        .with_context(|| format!("{name}: a layer is no number"))?;
    match value[total].as_f64() {
        Some(total) if total > 0.0 => Ok(Row { name: name.to_owned(), depth, total, layers }),
        _ => bail!("{name} at depth {depth}: {} instructions", value[total]),
    }
}

/// What the table says, and of which compiler.
fn table() -> Result<(Vec<Row>, String)> {
    let text = std::fs::read_to_string(crate::root().join(TABLE));
    read_table(&text.with_context(|| format!("cannot read {TABLE}"))?).context(TABLE)
}

fn read_table(text: &str) -> Result<(Vec<Row>, String)> {
    let table: Value = serde_json::from_str(text)?;
    let compiler = table["compiler"].as_str().context("no compiler")?.to_owned();
    let rows = table["paths"].as_array().context("no paths")?;
    Ok((rows.iter().map(|value| row(value, "total")).collect::<Result<_>>()?, compiler))
}

fn table_of(rows: &[Row], compiler: &str) -> String {
    let tenths = |n: f64| (n * 10.0).round() / 10.0;
    let lines: Vec<String> = rows
        .iter()
        .map(|r| {
            let layers: BTreeMap<_, _> = r.layers.iter().map(|(l, &n)| (l, tenths(n))).collect();
            let (name, layers, total) = (json!(r.name), json!(layers), tenths(r.total));
            let depth = r.depth;
            format!(
                r#"{{"name": {name}, "depth": {depth}, "total": {total:.1}, "layers": {layers}}}"#
            )
        })
        .collect();
    let compiler = json!(compiler);
    format!("{{\"compiler\": {compiler}, \"paths\": [\n{}\n]}}\n", lines.join(",\n"))
}

/// The compiler's name and version.
fn compiler() -> Result<String> {
    Ok(cmd::ok(Command::new("rustc").arg("--version"))?.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(name: &str, depth: u64, total: f64) -> Row {
        let layers = BTreeMap::from([("nvme".to_owned(), total / 2.0)]);
        Row { name: name.to_owned(), depth, total, layers }
    }

    #[test]
    fn three_percent_are_allowed_and_no_more() {
        let table = [row("read", 1, 1000.0), row("read", 32, 300.0)];
        let now = |a, b| [row("read", 1, a), row("read", 32, b)];
        assert_eq!(compare(&table, &now(1029.0, 308.7)).unwrap(), [""; 0]);
        assert_eq!(compare(&table, &now(971.0, 291.3)).unwrap(), [""; 0]);
        for (a, b, which) in [(1031.0, 300.0, "at depth 1 "), (1000.0, 309.3, "at depth 32 ")] {
            let why = compare(&table, &now(a, b)).unwrap_err().to_string();
            assert!(why.contains(which) && why.contains("+3.1 %"), "{why}");
            assert_eq!(why.matches("read").count(), 1, "{why}");
        }
        let said = compare(&table, &now(969.0, 300.0)).unwrap();
        assert_eq!(said.len(), 1);
        assert!(said[0].contains("-3.1 %") && said[0].contains("perf --update"), "{}", said[0]);
        // Neither makes up for the other.
        assert!(compare(&table, &now(500.0, 310.0)).is_err());
        assert!(compare(&table, &now(f64::NAN, 300.0)).is_err());
    }

    #[test]
    fn what_one_side_has_not_is_a_failure() {
        let table = [row("read", 1, 1000.0), row("read", 32, 300.0)];
        let why = compare(&table, &table[..1]).unwrap_err().to_string();
        assert!(why.contains("read at depth 32: the table has it"), "{why}");
        let why = compare(&table[1..], &table).unwrap_err().to_string();
        assert!(why.contains("read at depth 1: not in the table"), "{why}");
        assert!(compare(&table, &[]).is_err() && compare(&[], &table).is_err());
        // The same path at another depth is another one.
        assert!(compare(&table, &[row("read", 1, 1000.0), row("read", 16, 300.0)]).is_err());
    }

    #[test]
    fn the_table_is_read_as_it_was_written() {
        let rows = [row("read", 1, 1000.04), row("read", 32, 300.0)];
        let text = table_of(&rows, "rustc 1.95.0");
        assert_eq!(text.lines().count(), 4, "one line a path: {text}");
        let (read, by) = read_table(&text).unwrap();
        assert_eq!(by, "rustc 1.95.0");
        assert_eq!((read[0].total, &read[1]), (1000.0, &rows[1]));
        for wrong in ["{}", "[]", "{\"compiler\": \"c\", \"paths\": [{\"name\": \"a\"}]}"] {
            assert!(read_table(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_table_in_the_repository_makes_sense() {
        let (rows, _) = table().unwrap();
        for (name, depth) in [("read", 1), ("read", 32), ("write", 1), ("write", 32)] {
            let found = rows.iter().filter(|r| r.name == name && r.depth == depth);
            assert_eq!(found.count(), 1, "{name} at depth {depth}");
        }
        for r in &rows {
            let sum: f64 = r.layers.values().sum();
            assert!((sum - r.total).abs() < 1.0 + r.total / 100.0, "{} at {}", r.name, r.depth);
        }
    }

    #[test]
    fn both_sides_are_shown_by_layer() {
        let (before, after) =
            ([row("read", 32, 500.0), row("old", 1, 5.0)], [row("read", 32, 400.0)]);
        let text = side_by_side(&pairs(&before, &after));
        let lines: Vec<String> =
            text.lines().map(|l| l.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
        assert_eq!(
            lines[1..4],
            ["read 32 500.0 400.0 -20.0 %", "nvme 250.0 200.0 -20.0 %", "old 1 5.0 - -"]
        );
    }
}
