//! `polldisk bench report`: the page of results that were kept as JSON.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use ::compare::page;
use anyhow::{Context, bail};
use clap::Args;

/// Make the page, CSV and charts anew from JSON: of one profile or several, of one host or several.
#[derive(Args)]
pub(crate) struct Report {
    /// Results of `bench compare --json`, or folders that `bench compare --out` wrote (their
    /// results.json counts) or that hold such files.
    #[arg(required = true, value_name = "DIR|FILE.json")]
    from: Vec<PathBuf>,
    /// The folder for report.html, results.json, results.csv and charts; it is made if it is not there.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

/// Reads all, then writes.
pub(super) fn report(r: &Report) -> anyhow::Result<u8> {
    let mut comparisons = Vec::new();
    for file in files(&r.from)? {
        comparisons.extend(page::read(&file)?);
    }
    if comparisons.is_empty() {
        bail!("there are no results in {} files: nothing was compared", r.from.len());
    }
    page::write(&r.out, &comparisons)?;
    tell!("polldisk: {} profiles in {}", comparisons.len(), r.out.join("report.html").display());
    Ok(0)
}

/// The files that are meant, each once, in order.
fn files(from: &[PathBuf]) -> anyhow::Result<Vec<PathBuf>> {
    let mut all = Vec::new();
    let mut seen = BTreeSet::new();
    for path in from {
        let found = match path.is_dir() {
            true => of_folder(path)?,
            false => vec![path.clone()],
        };
        all.extend(found.into_iter().filter(|file| seen.insert(file.clone())));
    }
    Ok(all)
}

fn of_folder(folder: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let own = folder.join("results.json");
    if own.is_file() {
        return Ok(vec![own]);
    }
    let list = fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let mut found: Vec<PathBuf> = list
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|e| e == "json") && path.is_file())
        .collect();
    found.sort();
    if found.is_empty() {
        bail!("{}: there is no results.json, nor any other JSON file", folder.display());
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_and_files() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str| {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, "[]").unwrap();
            path
        };
        let (own, other) = (file("a/results.json"), file("a/other.json"));
        let (second, first) = (file("b/2.json"), file("b/1.json"));
        file("b/3.txt");
        let folder = |name: &str| dir.path().join(name);
        let found = files(&[folder("b"), folder("a"), second.clone(), other.clone()]).unwrap();
        assert_eq!(found, [first, second, own, other]);
        fs::create_dir(folder("empty")).unwrap();
        let error = files(&[folder("empty")]).unwrap_err().to_string();
        assert!(error.contains("no results.json"), "{error}");
    }

    #[test]
    fn nothing_is_no_report() {
        let dir = tempfile::tempdir().unwrap();
        let from = dir.path().join("none.json");
        fs::write(&from, "[]").unwrap();
        let out = dir.path().join("out");
        let error = report(&Report { from: vec![from], out: out.clone() }).unwrap_err();
        assert!(error.to_string().contains("there are no results"), "{error}");
        assert!(!out.exists());
    }
}
