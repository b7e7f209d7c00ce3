//! One image of the matrix: its chain is made and written by turns, then everybody is asked about it.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::SystemTime;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::guest;
use crate::model::{Model, Noise, Op, SECTOR, draw};
use crate::pick::{Data, Node, Rng, Shape, Who};
use crate::second;

const POLLDISK: &str = env!("CARGO_BIN_EXE_polldisk");

/// What not every image has.
#[derive(Default, Clone, Copy)]
pub(crate) struct Done {
    /// Imago can read the whole chain, and did.
    pub(crate) second: bool,
    /// It had an internal snapshot for some turns, which was applied in the end.
    pub(crate) snapshot: bool,
    /// It had bitmaps that recorded.
    pub(crate) bitmaps: bool,
}

/// A folder in which all programs run, so that they are given the same names.
pub(crate) struct Case<'a> {
    pub(crate) dir: &'a Path,
    pub(crate) rng: Rng,
    noise: Noise,
    pub(crate) model: Model,
    /// Images from the base on: name and format.
    chain: Vec<(String, &'static str)>,
    /// Whether any of them has a data file.
    data_files: bool,
    done: Done,
}

/// Goes through one image.
pub(crate) fn run(dir: &Path, shape: &Shape, seed: u64) -> Result<Done> {
    let mut rng = Rng(seed);
    let noise = Noise::new(&mut rng);
    for (i, bytes) in noise.0.iter().enumerate() {
        std::fs::write(dir.join(format!("noise{i}")), bytes)?;
    }
    let (model, chain) = (Model::new(), Vec::new());
    // Else a long chain would hardly ever be one for imago.
    let second = second::can_read(shape) && (shape.depth == 0 || rng.one_in(2));
    let done = Done { second, ..Done::default() };
    let mut case = Case { dir, rng, noise, model, chain, data_files: false, done };
    for n in 0..shape.depth {
        case.layer(n).with_context(|| format!("layer {n}"))?;
    }
    let below = case.lower_files()?;
    case.top(shape)?;
    ensure!(case.lower_files()? == below, "a file below the top was changed");
    Ok(case.done)
}

/// About 24 clusters (12 of 2 MiB), or what a few layers can have in common.
fn disk_size(rng: &mut Rng, shape: &Shape) -> u64 {
    let clusters = if shape.cluster == 512 { 700 } else { 24 };
    let size = (clusters * shape.cluster).clamp(1 << 20, 24 << 20);
    size - rng.below(size / 4 / SECTOR) * SECTOR
}

impl Case<'_> {
    /// A program in the folder; its standard output.
    fn ok(&self, program: &str, args: &[&str]) -> Result<String> {
        let out = Command::new(program).args(args).current_dir(self.dir).output()?;
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        if !out.status.success() {
            bail!(
                "{program} {args:?}: {}\n{text}{}",
                out.status,
                String::from_utf8_lossy(&out.stderr)
            );
        }
        Ok(text)
    }

    /// A command that both programs have.
    pub(crate) fn image(&self, who: Who, args: &[&str]) -> Result<String> {
        match who {
            Who::Qemu => self.ok("qemu-img", args),
            Who::Polldisk => self.ok(POLLDISK, &[&["image"][..], args].concat()),
        }
    }

    /// Either program.
    pub(crate) fn anyone(&mut self) -> Who {
        if self.rng.one_in(2) { Who::Qemu } else { Who::Polldisk }
    }

    fn json(&self, program: &str, args: &[&str]) -> Result<Value> {
        Ok(serde_json::from_str(&self.ok(program, args)?)?)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    pub(crate) fn top_name(&self) -> Result<String> {
        Ok(self.chain.last().context("no image")?.0.clone())
    }

    /// Length and time of change of all files but the top image.
    fn lower_files(&self) -> Result<Vec<(String, u64, SystemTime)>> {
        let mut files = Vec::new();
        for entry in std::fs::read_dir(self.dir)? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with("below") {
                let metadata = entry.metadata()?;
                files.push((name, metadata.len(), metadata.modified()?));
            }
        }
        files.sort();
        Ok(files)
    }

    /// One more layer that is going to be below: of any shape, by anyone, a few writes.
    fn layer(&mut self, n: usize) -> Result<()> {
        if n == 0 && self.rng.one_in(3) {
            let size = (2 << 20) + self.rng.below(4096) * SECTOR;
            self.model.overlay(size);
            let bytes = self.noise.bytes(0, 0, size);
            std::fs::write(self.path("below0.raw"), &bytes)?;
            self.model.bytes = bytes;
            self.chain.push(("below0.raw".to_owned(), "raw"));
            return Ok(());
        }
        let mut shape = Shape::any(&mut self.rng, n.min(1));
        while self.done.second && !second::can_read(&shape) {
            shape = Shape::any(&mut self.rng, n.min(1));
        }
        self.make(&format!("below{n}"), &shape)?;
        self.write(shape.maker, &shape, shape.compression.is_some(), 6)
    }

    /// The image in question.
    fn top(&mut self, shape: &Shape) -> Result<()> {
        self.make("top", shape)?;
        if shape.version == 3 && self.rng.one_in(2) {
            self.add_bitmaps().context("bitmaps")?;
            self.done.bitmaps = true;
        }
        let mut snapshot = None;
        // Only QEMU writes compressed clusters, and only where nothing is.
        let compressed = shape.compression.is_some();
        let mut who = if compressed { Who::Qemu } else { shape.maker };
        for turn in 0..4 {
            let count = if shape.cluster > 1 << 20 { 15 } else { 30 };
            self.write(who, shape, compressed && turn == 0, count)
                .with_context(|| format!("turn {turn} of {who:?}"))?;
            self.judge().with_context(|| format!("after turn {turn} of {who:?}"))?;
            who = if who == Who::Qemu { Who::Polldisk } else { Who::Qemu };
            if turn == 1 && self.rng.one_in(2) {
                snapshot = self.take_snapshot(shape).context("a snapshot")?;
            }
        }
        self.ask(snapshot.as_deref())?;
        if self.done.bitmaps {
            self.remove_bitmaps().context("bitmaps")?;
        }
        if let Some(then) = snapshot {
            self.done.snapshot = true;
            self.apply_snapshot(then).context("the snapshot")?;
        }
        self.infos()
    }

    /// Everybody is asked about the image.
    fn ask(&mut self, snapshot: Option<&[u8]>) -> Result<()> {
        self.maps()?;
        self.infos()?;
        self.ok(POLLDISK, &["image", "compare", "-f", "raw", "expected.raw", &self.top_name()?])?;
        if self.done.second {
            let top = self.path(&self.top_name()?);
            second::compare(&top, &self.model.bytes).context("imago")?;
        }
        self.convert(false, &self.model.bytes.clone()).context("convert")?;
        if let Some(then) = snapshot {
            self.convert(true, then).context("convert of a snapshot")?;
        }
        Ok(())
    }

    /// Makes an overlay on what there is.
    fn make(&mut self, name: &str, shape: &Shape) -> Result<()> {
        let size = disk_size(&mut self.rng, shape);
        let lazy = self.rng.one_in(4);
        let mut options = shape.options(lazy);
        let image = format!("{name}.qcow2");
        if shape.data != Data::Inside {
            options += &format!(",data_file={name}.data");
            self.data_files = true;
        }
        let size_text = size.to_string();
        let mut args = vec!["create", "-q", "-f", "qcow2", "-o", &options];
        if let Some((backing, format)) = self.chain.last() {
            args.extend(["-b", backing, "-F", format]);
        }
        args.extend([image.as_str(), &size_text]);
        self.image(shape.maker, &args)?;
        self.model.overlay(size);
        self.chain.push((image, "qcow2"));
        Ok(())
    }

    /// Writes to the top, and reads it.
    fn write(&mut self, who: Who, shape: &Shape, compressed: bool, count: u64) -> Result<()> {
        let size = self.model.size();
        let compressed = compressed && who == Who::Qemu;
        let ops = draw(&mut self.rng, shape.cluster, size, compressed, count);
        let top = self.top_name()?;
        match who {
            Who::Polldisk => {
                let path = self.path(&top);
                guest::run(&path, shape.node, &ops, &self.noise, &mut self.model)
            }
            Who::Qemu => {
                let commands: Vec<String> = ops.iter().map(command).collect();
                let mut args = vec!["-f", "qcow2", "-d", "unmap"];
                commands.iter().for_each(|c| args.extend(["-c", c]));
                args.push(&top);
                let text = self.ok("qemu-io", &args)?;
                ensure!(!text.contains("failed"), "{commands:?}: {text}");
                ops.iter().for_each(|op| self.model.apply(op, &self.noise));
                // What discarded sectors became is asked of polldisk; `judge` asks QEMU.
                guest::run(&self.path(&top), Node::File, &[], &self.noise, &mut self.model)
                    .context("read by polldisk")
            }
        }
    }

    /// The image in question is sound, and holds what was written.
    pub(crate) fn judge(&self) -> Result<()> {
        self.judge_one(&self.top_name()?, &self.model.bytes)
    }

    /// The same of any image.
    pub(crate) fn judge_one(&self, name: &str, want: &[u8]) -> Result<()> {
        let check = ["check", "--output=json", "-f", "qcow2", name];
        let theirs = self.json("qemu-img", &check)?;
        let ours = self.json(POLLDISK, &["image", "check", "--json", "-f", "qcow2", name])?;
        for field in ["total-clusters", "image-end-offset"] {
            ensure!(ours[field] == theirs[field], "{field}: {ours} against {theirs}");
        }
        let counts = [&ours, &theirs].map(|of| of["allocated-clusters"].as_u64().unwrap_or(0));
        // In a data file a cluster of zeroes may have the place 0, which QEMU takes for none.
        let unseen = u64::from(self.path(name).with_extension("data").exists());
        ensure!(
            (counts[1]..=counts[1] + unseen).contains(&counts[0]),
            "allocated-clusters: {ours} against {theirs}"
        );
        std::fs::write(self.path("expected.raw"), want)?;
        let compare = ["compare", "-f", "raw", "-F", "qcow2", "expected.raw", name];
        self.ok("qemu-img", &compare)?;
        Ok(())
    }

    /// Both see the same extents.
    fn maps(&self) -> Result<()> {
        let top = self.top_name()?;
        let theirs = self.json("qemu-img", &["map", "--output=json", "-f", "qcow2", &top])?;
        let ours = self.json(POLLDISK, &["image", "map", "--json", "-f", "qcow2", &top])?;
        let files = self.data_files;
        let (ours, theirs) = (extents(ours, files)?, extents(theirs, files)?);
        if let Some((a, b)) = ours.iter().zip(&theirs).find(|(a, b)| a != b) {
            bail!("map: {a} against {b}");
        }
        ensure!(ours.len() == theirs.len(), "map: {} extents, not {}", ours.len(), theirs.len());
        Ok(())
    }

    /// Both say the same of all images of the chain.
    fn infos(&self) -> Result<()> {
        let top = self.top_name()?;
        let theirs = ["info", "--output=json", "--backing-chain", "-f", "qcow2", &top];
        let mut theirs = self.json("qemu-img", &theirs)?;
        let ours = ["image", "info", "--json", "--backing-chain", "-f", "qcow2", &top];
        let mut ours = self.json(POLLDISK, &ours)?;
        [&mut ours, &mut theirs].into_iter().for_each(last_parts);
        let lists = ours.as_array().zip(theirs.as_array()).context("info: no lists")?;
        if let Some((a, b)) = lists.0.iter().zip(lists.1).find(|(a, b)| a != b) {
            bail!("info: {a}\nagainst {b}");
        }
        ensure!(lists.0.len() == self.chain.len() && lists.1.len() == self.chain.len());
        Ok(())
    }
}

/// As qemu-io says it.
fn command(op: &Op) -> String {
    match *op {
        Op::Write { at, len, noise } => format!("write -s noise{noise} {at} {len}"),
        Op::Compressed { at, len, noise } => format!("write -c -s noise{noise} {at} {len}"),
        Op::Zero { at, len, unmap: false } => format!("write -z {at} {len}"),
        Op::Zero { at, len, unmap: true } => format!("write -z -u {at} {len}"),
        Op::Discard { at, len } => format!("discard {at} {len}"),
        Op::Read { at, len } => format!("read {at} {len}"),
        Op::Flush => "flush".to_owned(),
    }
}

/// Extents of a map, without places that nobody needs: QEMU says where something would go that is in
/// no layer, if the rest of its cluster has data; it cannot tell, in a data file, that a cluster of
/// zeroes has the place 0; and where much is mapped that was never written to it asks the file system
/// for holes in what is data.
fn extents(map: Value, data_files: bool) -> Result<Vec<Value>> {
    let Value::Array(list) = map else { bail!("map: no list") };
    let mut out: Vec<Value> = Vec::new();
    for mut e in list {
        if e["data"] == true && e.get("offset").is_some() {
            e["zero"] = false.into();
            let end = |l: &Value| Some(l["offset"].as_u64()? + l["length"].as_u64()?);
            let goes_on = |l: &&mut Value| {
                l["data"] == true && l["depth"] == e["depth"] && end(l) == e["offset"].as_u64()
            };
            if let Some(last) = out.last_mut().filter(goes_on) {
                let len = last["length"].as_u64().zip(e["length"].as_u64());
                last["length"] = len.map(|(a, b)| a + b).into();
                continue;
            }
        } else if e["present"] == false || data_files {
            e.as_object_mut().context("map: no object")?.remove("offset");
            let fields = ["present", "data", "zero", "depth", "compressed"];
            let same = |l: &&mut Value| {
                l.get("offset").is_none() && fields.iter().all(|&field| l[field] == e[field])
            };
            if let Some(last) = out.last_mut().filter(same) {
                let len = last["length"].as_u64().zip(e["length"].as_u64());
                last["length"] = len.map(|(a, b)| a + b).into();
                continue;
            }
        }
        out.push(e);
    }
    Ok(out)
}

/// Each program has its own way to write the same path.
fn last_parts(value: &mut Value) {
    match value {
        Value::Object(map) => {
            for (key, value) in map.iter_mut() {
                match value {
                    Value::String(s) if key.ends_with("filename") => {
                        *s = s.rsplit('/').next().unwrap_or_default().to_owned();
                    }
                    _ => last_parts(value),
                }
            }
        }
        Value::Array(list) => list.iter_mut().for_each(last_parts),
        _ => {}
    }
}
