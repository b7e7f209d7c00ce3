//! `cargo xtask page`: the report of `polldisk bench compare` in a real browser. Results that are kept in
//! the repository become a page; headless Chromium lays it out in light and dark, on a screen and on a
//! phone, and prints it. What is measured: nothing sticks out or is cut off, all charts are drawn, letters
//! can be read, dark is dark. The pictures stay in the cache folder, to be looked at.

mod picture;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::cmd::{self, say};
use crate::suite::{self, Tally};
use crate::tools::{self, Missing};

/// The old headless mode as a program of its own: a third of the whole browser, and its windows may be as
/// narrow as a phone.
const BROWSER: &str = "chromium-headless-shell";

/// A page takes a second; a browser that hangs is killed.
const LIMIT: Duration = Duration::from_secs(60);

/// Measures the page from within.
const PROBE: &str = include_str!("probe.js");

/// The page that has it.
const WITH_PROBE: &str = "probe.html";

/// A way to look at the page.
struct View {
    name: &'static str,
    size: (u32, u32),
    dark: bool,
}

const VIEWS: [View; 4] = [
    View { name: "screen-light", size: (1280, 1600), dark: false },
    View { name: "screen-dark", size: (1280, 1600), dark: true },
    View { name: "phone-light", size: (390, 1600), dark: false },
    View { name: "phone-dark", size: (390, 1600), dark: true },
];

/// What the command can be told.
#[derive(clap::Args, Default)]
pub(crate) struct Args {
    /// Look at this report (report.html) instead of one of the results that are kept.
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
}

/// Runs the command; false when something is wrong with the page.
pub(crate) fn command(args: &Args) -> Result<bool> {
    let tally = run(args)?;
    println!("{tally}");
    Ok(tally.good())
}

/// All views; without a browser it is skipped.
pub(crate) fn run(args: &Args) -> Result<Tally> {
    let mut tally = Tally::default();
    if let Err(error) = tools::need(&[BROWSER]) {
        if !error.is::<Missing>() {
            return Err(error);
        }
        println!("skipped: page: {error}");
        tally.skipped += 1;
        return Ok(tally);
    }
    let folder = crate::cache().join("page");
    if folder.exists() {
        fs::remove_dir_all(&folder)?;
    }
    let out = folder.join("report");
    fs::create_dir_all(&out)?;
    let report = out.join("report.html");
    match &args.report {
        Some(given) => {
            fs::copy(given, &report).with_context(|| format!("{}", given.display()))?;
        }
        None => make(&out)?,
    }
    insert_probe(&report)?;
    let mut check = |name: &str, done: Result<String>| match done {
        Ok(note) => {
            say(&format!("page: {name}: ok; {note}"));
            tally.passed += 1;
        }
        Err(error) => {
            say(&format!("page: {name}: FAILED: {error:#}"));
            tally.failed += 1;
        }
    };
    for view in &VIEWS {
        check(view.name, look(&folder, &report, view));
    }
    check("print", print(&folder, &report));
    say(&format!("page: pictures are in {}", folder.display()));
    Ok(tally)
}

/// Makes the report of the results that are kept.
fn make(out: &Path) -> Result<()> {
    let kept = crate::root().join("bench/compare/testdata");
    let polldisk = suite::build_polldisk()?;
    cmd::ok(Command::new(polldisk).args(["bench", "report"]).arg(kept).arg("--out").arg(out))?;
    Ok(())
}

/// Puts a page beside the report that is the same with the probe in it.
fn insert_probe(report: &Path) -> Result<()> {
    let html = fs::read_to_string(report)?;
    let (before, after) = html.rsplit_once("</body>").context("the report has no end")?;
    let probe =
        format!("{before}<script>addEventListener('load',()=>{{{PROBE}}})</script></body>{after}");
    fs::write(report.with_file_name(WITH_PROBE), probe)?;
    Ok(())
}

/// The browser, in a profile of its own that is new.
fn browser(folder: &Path) -> Command {
    let mut command = Command::new(BROWSER);
    // Its sandbox cannot be had in most containers, and the page is ours.
    command.args(["--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]);
    command.arg(format!("--user-data-dir={}", folder.join("browser").display()));
    command
}

fn url(path: &Path) -> String {
    format!("file://{}", path.display())
}

fn look(folder: &Path, report: &Path, view: &View) -> Result<String> {
    let (width, height) = view.size;
    let with = |what: String, page: &Path| {
        let mut command = browser(folder);
        // 0 is dark, 1 is light.
        command.arg(format!("--blink-settings=preferredColorScheme={}", u8::from(!view.dark)));
        command.arg(format!("--window-size={width},{height}"));
        command.arg(what).arg(url(page));
        cmd::ok_within(&mut command, LIMIT)
    };
    let dom = with("--dump-dom".to_owned(), &report.with_file_name(WITH_PROBE))?;
    let found = measured(&dom)?;
    judge(&found, view)?;
    let kept = fs::read_to_string(report)?.contains("<figcaption>");
    ensure!(found["images"] != 0 || !kept, "flame graphs are missing");
    let picture = folder.join(format!("{}.png", view.name));
    with(format!("--screenshot={}", picture.display()), report)?;
    let seen = picture::look(&picture)?;
    ensure!(seen.size == view.size, "the picture is {:?}, not {:?}", seen.size, view.size);
    ensure!(seen.colours > 50, "the picture has {} colours: it is blank", seen.colours);
    match view.dark {
        true => ensure!(seen.brightness < 90.0, "dark is not dark: {:.0} of 255", seen.brightness),
        false => ensure!(seen.brightness > 200.0, "light is dark: {:.0} of 255", seen.brightness),
    }
    Ok(format!(
        "{} charts, {} high, brightness {:.0}",
        found["charts"], found["height"], seen.brightness
    ))
}

/// What the probe has written.
fn measured(dom: &str) -> Result<Value> {
    let (_, rest) = dom.split_once("data-probe=\"").context("the probe did not run")?;
    let (text, _) = rest.split_once('"').context("the probe's result has no end")?;
    let text = text.replace("&quot;", "\"").replace("&lt;", "<").replace("&gt;", ">");
    Ok(serde_json::from_str(&text.replace("&amp;", "&"))?)
}

fn judge(found: &Value, view: &View) -> Result<()> {
    let number = |name: &str| found[name].as_u64().with_context(|| format!("no {name}"));
    ensure!(number("wide")? == u64::from(view.size.0), "the window is {} wide", found["wide"]);
    ensure!(found["dark"] == view.dark, "the browser is not in the mode that is meant");
    if number("scroll_width")? > u64::from(view.size.0) {
        bail!("the page is {} wide: {}", found["scroll_width"], found["over"]);
    }
    let charts = number("charts")?;
    ensure!(charts > 0, "no chart");
    ensure!(number("drawn")? == charts, "{} of {charts} charts are drawn", found["drawn"]);
    for nothing in ["over", "cut", "small", "dead_links", "doubled_ids"] {
        let list = found[nothing].as_array().with_context(|| format!("no {nothing}"))?;
        ensure!(list.is_empty(), "{nothing}: {}", found[nothing]);
    }
    for zero in ["broken_images", "unnamed"] {
        ensure!(number(zero)? == 0, "{zero}: {}", found[zero]);
    }
    Ok(())
}

/// Prints it, by a reader who likes it dark.
fn print(folder: &Path, report: &Path) -> Result<String> {
    let pdf = folder.join("print.pdf");
    let mut command = browser(folder);
    command.args(["--blink-settings=preferredColorScheme=0", "--no-pdf-header-footer"]);
    command.arg(format!("--print-to-pdf={}", pdf.display())).arg(url(report));
    cmd::ok_within(&mut command, LIMIT)?;
    let bytes = fs::read(&pdf).with_context(|| format!("{}", pdf.display()))?;
    ensure!(bytes.starts_with(b"%PDF"), "that is no PDF");
    let text = String::from_utf8_lossy(&bytes);
    let pages = text.matches("/Type /Page\n").count() + text.matches("/Type /Page/").count();
    ensure!((2..=60).contains(&pages), "{pages} pages");
    Ok(format!("{pages} pages, {} KiB", bytes.len() >> 10))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn good() -> Value {
        json!({"wide": 390, "scroll_width": 390, "height": 9000, "dark": true, "charts": 20, "drawn": 20,
               "over": [], "cut": [], "small": [], "dead_links": [], "doubled_ids": [], "images": 1,
               "broken_images": 0, "unnamed": 0})
    }

    #[test]
    fn each_fault_is_found() {
        let view = &VIEWS[3];
        judge(&good(), view).unwrap();
        for (name, value) in [
            ("wide", json!(500)),
            ("scroll_width", json!(391)),
            ("dark", json!(false)),
            ("charts", json!(0)),
            ("drawn", json!(19)),
            ("over", json!(["TABLE"])),
            ("cut", json!(["qemu"])),
            ("small", json!(["5.0 x"])),
            ("dead_links", json!(["A"])),
            ("doubled_ids", json!(["t"])),
            ("broken_images", json!(1)),
            ("unnamed", json!(1)),
            ("unnamed", json!(null)),
        ] {
            let mut bad = good();
            bad[name] = value;
            assert!(judge(&bad, view).is_err(), "{name}");
        }
    }

    #[test]
    fn results_of_the_probe_are_read() {
        let dom = "<html data-probe=\"{&quot;a&quot;:&quot;&amp;lt; &lt;&quot;}\" lang=\"en\">";
        assert_eq!(measured(dom).unwrap(), json!({"a": "&lt; <"}));
        assert!(measured("<html>").is_err());
    }
}
