//! Figures as a table for people.

use super::rates::{Kind, Rates, Which};

/// Columns of the image's name.
const NAME: usize = 32;

/// What a terminal shows as it is: names may hold anything, also what moves a cursor. Of a long one
/// the end, in which paths differ.
fn name(text: &str) -> String {
    let plain: Vec<char> =
        text.chars().map(|c| if c.is_control() || c == '\u{fffd}' { '?' } else { c }).collect();
    match plain.len() > NAME {
        true => "…".chars().chain(plain[plain.len() - NAME + 1..].iter().copied()).collect(),
        false => plain.into_iter().collect(),
    }
}

fn user(which: &Which) -> String {
    match (which.domid, which.devid) {
        (Some(domid), Some(devid)) => format!("vbd {domid}/{devid}"),
        _ => name(&which.frontend),
    }
}

/// Three digits and a unit.
fn time(ns: Option<u64>) -> String {
    let Some(ns) = ns else { return "-".to_owned() };
    let (value, unit) = match ns {
        0..1_000_000 => (ns as f64 / 1e3, "µs"),
        1_000_000..1_000_000_000 => (ns as f64 / 1e6, "ms"),
        _ => (ns as f64 / 1e9, "s"),
    };
    let decimals = match value {
        v if v < 10.0 => 2,
        v if v < 100.0 => 1,
        _ => 0,
    };
    format!("{value:.decimals$}{unit}")
}

fn three(kind: &Kind) -> String {
    [kind.p50, kind.p99, kind.p999].map(time).join("/")
}

/// The table, with so many disks at most.
pub(super) fn text(rates: &Rates, most: usize) -> String {
    let mut lines =
        vec![format!("{:>7} {:>7} {:>12} {:>10}", "REACTOR", "BUSY %", "TURNS/S", "SLEEPS/S")];
    for (n, r) in rates.reactors.iter().enumerate() {
        let busy = r.busy * 100.0;
        lines.push(format!("{n:>7} {busy:>7.1} {:>12.0} {:>10.0}", r.turns, r.sleeps));
    }
    lines.push(String::new());
    lines.push(format!(
        "{:<NAME$} {:<13} {:>9} {:>9} {:>8} {:>8} {:>6} {:>6} {:>24} {:>24} {:>6}",
        "IMAGE",
        "USED BY",
        "READ/S",
        "WRITE/S",
        "R MB/S",
        "W MB/S",
        "DEPTH",
        "NOW",
        "READ P50/P99/P99.9",
        "WRITE P50/P99/P99.9",
        "ERRORS",
    ));
    for disk in rates.disks.iter().take(most) {
        let (read, write) = (&disk.read, &disk.write);
        lines.push(format!(
            "{:<NAME$} {:<13} {:>9.0} {:>9.0} {:>8.1} {:>8.1} {:>6.1} {:>6} {:>24} {:>24} {:>6}",
            name(&disk.which.image),
            user(&disk.which),
            read.iops,
            write.iops,
            read.bytes / 1e6,
            write.bytes / 1e6,
            disk.depth,
            disk.in_flight,
            three(read),
            three(write),
            disk.errors,
        ));
    }
    match rates.disks.len().saturating_sub(most) {
        0 => {}
        more => lines.push(format!("and {more} more with fewer requests")),
    }
    lines.push(String::new());
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::super::rates::tests::stats;
    use super::*;

    #[test]
    fn a_row_for_each_and_nothing_that_a_terminal_obeys() {
        let long = "x".repeat(100) + "the-end";
        let names = [("\x1b[2Jevil\n", 0, 0), (long.as_str(), 0, 0)];
        let then = stats(&names, 0);
        let now = stats(&[(names[0].0, 400, 200), (names[1].0, 100, 0)], 1000);
        let rates = Rates::between(&then, &now, 1_000_000_000);
        let text = text(&rates, 9);
        assert!(!text.contains('\x1b') && text.contains("?[2Jevil?"), "{text}");
        assert!(text.contains("the-end ") && !text.contains(&"x".repeat(NAME)), "{text}");
        let row = text.lines().find(|line| line.contains("evil")).unwrap();
        let words: Vec<_> = row.split_whitespace().skip(1).collect();
        let times = "9.22µs/9.22µs/1.05ms";
        assert_eq!(
            words,
            ["vbd", "3/51712", "400", "200", "1.6", "0.8", "0.4", "2", times, "-/-/-", "1"]
        );
        assert_eq!(text.lines().count(), 6);
        assert!(super::text(&rates, 1).ends_with("and 1 more with fewer requests\n"));
    }

    #[test]
    fn times_have_three_digits() {
        let text = [0, 999, 12_345, 999_400, 1_000_000, 45_600_000, 61_000_000_000];
        let text = text.map(|ns| time(Some(ns)));
        assert_eq!(text, ["0.00µs", "1.00µs", "12.3µs", "999µs", "1.00ms", "45.6ms", "61.0s"]);
    }
}
