//! What is demanded of an image after its end: our checker, an independent reader, qemu-img.

use std::process::Command;

use block::Storage;
use qcow::ChainReader;
use qcow::check::{Repair, run};
use sim::{Disk, Model, SECTOR, ident, show};

use crate::images::{Layer, open};
use crate::kept::verify_kept;

/// How an image ended.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Ended {
    Cut,
    /// The process died, and the disks live on.
    Dead,
    /// It rests: all of it is on disk.
    Rest,
    /// Cleanly, and nothing may leak.
    Clean,
    /// Cleanly; it had leaks when it was opened, or requests failed.
    CleanWithLeaks,
}

/// What was found.
pub(crate) struct Verified {
    /// What each sector holds.
    pub(crate) held: Vec<u32>,
    /// Clusters that leak.
    pub(crate) leaks: u64,
    /// Bitmaps that were not saved.
    pub(crate) gone: Vec<String>,
    /// The image and what it stands on.
    pub(crate) layers: Vec<Layer>,
}

/// Checks an image and reads all of it; every sector must hold what it may.
pub(crate) fn verify(
    mut layers: Vec<Layer>,
    model: &Model,
    ended: Ended,
) -> Result<Verified, String> {
    let leaks = check(&mut layers[0].disk, Repair::None)?;
    if ended == Ended::Clean && leaks > 0 {
        return Err(format!("{leaks} clusters leak after a clean close"));
    }
    let mut reader = ChainReader::new(open(&layers, false)?);
    if reader.size() / SECTOR as u64 != model.len() {
        return Err(format!("the disk has {} bytes, not {} sectors", reader.size(), model.len()));
    }
    let (mut held, mut first) = (Vec::new(), 0);
    let mut buffer = vec![0; 256 * SECTOR];
    while first < model.len() {
        let count = (model.len() - first).min(256) as usize;
        let buffer = &mut buffer[..count * SECTOR];
        reader.read_at(first * SECTOR as u64, buffer).map_err(|e| e.to_string())?;
        for (sector, bytes) in (first..).zip(buffer.chunks(SECTOR)) {
            let id = ident(sector, bytes).filter(|&id| model.may_survive(sector, id));
            let Some(id) = id else {
                let (found, told) = (show(sector, bytes), model.explain(sector));
                return Err(format!("sector {sector} {found} at the end; it was told {told}"));
            };
            held.push(id);
        }
        first += count as u64;
    }
    if let Some(data) = layers[0].data.as_mut().filter(|d| d.raw) {
        raw(&mut data.disk, &held)?;
    }
    let names: Vec<_> = reader.layers().iter().map(|l| l.path.clone()).collect();
    layers.retain(|l| names.contains(&Some(l.path().into())));
    for (n, layer) in reader.layers().iter().enumerate() {
        verify_kept(&mut layers[n..], layer.image().map_or(0, |i| i.header.nb_snapshots))?;
    }
    Ok(Verified { held, leaks, gone: Vec::new(), layers })
}

/// A raw data file by itself shows what the image shows.
fn raw(disk: &mut Disk, held: &[u32]) -> Result<(), String> {
    let mut bytes = vec![0; held.len() * SECTOR];
    disk.read_at(0, &mut bytes).map_err(|e| e.to_string())?;
    for ((sector, bytes), &id) in (0..).zip(bytes.chunks(SECTOR)).zip(held) {
        if ident(sector, bytes) != Some(id) {
            let found = show(sector, bytes);
            return Err(format!("sector {sector} of the raw file {found}; the image has {id:#x}"));
        }
    }
    Ok(())
}

/// Our checker: leaks are counted, anything else is an error.
pub(crate) fn check(disk: &mut Disk, repair: Repair) -> Result<u64, String> {
    let mut text = String::new();
    let mut log = |line: &str| {
        if text.len() < 2000 {
            text += &format!("\n{line}");
        }
    };
    let report = run(disk, "sim", repair, &mut log).map_err(|e| e.to_string())?;
    match report.corruptions + report.check_errors {
        0 => Ok(report.leaks),
        n => Err(format!("the image is corrupt in {n} places:{text}")),
    }
}

/// What qemu-img says about an image; `false` if there is no qemu-img.
pub(crate) fn qemu(layer: &mut Layer, ended: Ended) -> Result<bool, String> {
    let mut files = Vec::new();
    for disk in layer.disks() {
        let mut bytes = vec![0; disk.len() as usize];
        disk.clone().read_at(0, &mut bytes).map_err(|e| e.to_string())?;
        let file = tempfile::NamedTempFile::new().map_err(|e| e.to_string())?;
        std::fs::write(file.path(), bytes).map_err(|e| e.to_string())?;
        files.push(file);
    }
    let named = |file: &tempfile::NamedTempFile| {
        format!(r#"{{"driver":"file","filename":"{}"}}"#, file.path().display())
    };
    let data = files.get(1).map_or(String::new(), |f| format!(r#","data-file":{}"#, named(f)));
    let out = Command::new("qemu-img")
        .args(["check", "-q"])
        .arg(format!(
            // What it stands on is in memory, where qemu-img cannot open it.
            r#"json:{{"driver":"qcow2","backing":null,"file":{}{data}}}"#,
            named(&files[0])
        ))
        .output();
    let out = match out {
        Ok(out) => out,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(false),
        Err(e) => return Err(format!("qemu-img: {e}")),
    };
    match (out.status.code(), ended) {
        (Some(0), _)
        | (Some(3), Ended::Cut | Ended::Dead | Ended::Rest | Ended::CleanWithLeaks) => Ok(true),
        (code, _) => {
            let text = String::from_utf8_lossy(&out.stderr).into_owned();
            let text = text + &String::from_utf8_lossy(&out.stdout);
            Err(format!("qemu-img check ends with {code:?}: {text}"))
        }
    }
}
