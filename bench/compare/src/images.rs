//! [`Images`]: the disk of a case in each format, made once from the same pattern.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use bench::Error;
use node::{HostStorage, ModelSpec, NodeSpec};
use qcow::create::{CreateOptions, Preallocation, create};

use crate::peer::{Leaf, done_within};
use crate::profiles::{Content, Disk};

/// How long making an image may take.
const PATIENCE: Duration = Duration::from_secs(1800);

/// Bytes of the parts that layers of a chain have in turn: the size of a cluster.
const PART: u64 = 64 << 10;

/// Bytes of stripes over several devices.
const STRIPE: u64 = 64 << 10;

/// What the pattern begins with.
const SEED: u64 = 0x9e37_79b9_7f4a_7c15;

/// A format of images.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Format {
    /// The disk's bytes.
    Raw,
    /// QCOW2 with clusters of 64 KiB.
    Qcow2,
    /// VHD, dynamic.
    Vhd,
}

impl Format {
    fn name(self) -> &'static str {
        match self {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
            Format::Vhd => "vhd",
        }
    }
}

/// Images in a folder.
pub(crate) struct Images {
    folder: PathBuf,
    /// This program, which makes them.
    program: PathBuf,
    /// What they hold.
    disk: Option<Disk>,
    made: BTreeMap<Format, Vec<PathBuf>>,
    striped: Option<Vec<PathBuf>>,
}

impl Images {
    /// None yet.
    pub(crate) fn new(folder: PathBuf, program: PathBuf) -> Images {
        Images { folder, program, disk: None, made: BTreeMap::new(), striped: None }
    }

    /// Those of a disk, made if they are not there; of another disk than before, in its place.
    ///
    /// # Errors
    /// If they cannot be made.
    pub(crate) fn of(&mut self, disk: &Disk, format: Format) -> Result<Vec<PathBuf>, Error> {
        self.change_to(disk)?;
        if disk.content == Content::Empty {
            // What a server has allocated in it was its own doing.
            self.remove(format)?;
        }
        if let Some(paths) = self.made.get(&format) {
            return Ok(paths.clone());
        }
        let first = self.make(disk, format)?;
        let mut paths = vec![first.clone()];
        for n in 1..disk.count {
            let path = self.path(format, &n.to_string());
            std::fs::copy(&first, &path).map_err(|e| fail(&path, e))?;
            paths.push(path);
        }
        self.made.insert(format, paths.clone());
        Ok(paths)
    }

    /// Its QCOW2 image as polldisk is told of it; one for each of its disks.
    ///
    /// # Errors
    /// If it cannot be made.
    pub(crate) fn nodes(&mut self, disk: &Disk, leaf: Leaf) -> Result<Vec<NodeSpec>, Error> {
        let node = |path: PathBuf| match leaf {
            Leaf::File | Leaf::Device => NodeSpec::File(path),
            Leaf::Model => NodeSpec::Model(ModelSpec::new(path)),
        };
        if disk.devices == 1 {
            return Ok(self.of(disk, Format::Qcow2)?.into_iter().map(node).collect());
        }
        self.change_to(disk)?;
        let devices = match &self.striped {
            Some(devices) => devices.clone(),
            None => {
                let devices = self.stripes(disk)?;
                self.striped = Some(devices.clone());
                devices
            }
        };
        Ok(vec![NodeSpec::Stripe(STRIPE, devices.into_iter().map(node).collect())])
    }

    fn change_to(&mut self, disk: &Disk) -> Result<(), Error> {
        if self.disk != Some(*disk) {
            self.clear()?;
            self.disk = Some(*disk);
        }
        Ok(())
    }

    /// Removes all.
    ///
    /// # Errors
    /// If one cannot be removed.
    pub(crate) fn clear(&mut self) -> Result<(), Error> {
        for format in [Format::Raw, Format::Qcow2, Format::Vhd] {
            self.remove(format)?;
        }
        for path in self.striped.take().into_iter().flatten() {
            std::fs::remove_file(&path).map_err(|e| fail(&path, e))?;
        }
        self.disk = None;
        Ok(())
    }

    fn remove(&mut self, format: Format) -> Result<(), Error> {
        for path in self.made.remove(&format).into_iter().flatten() {
            std::fs::remove_file(&path).map_err(|e| fail(&path, e))?;
        }
        // Layers that others build on are not in the list.
        if let (Some(Disk { content: Content::Chain(n), .. }), Format::Qcow2) = (self.disk, format)
        {
            for layer in 0..n {
                let _ = std::fs::remove_file(self.layer(layer));
            }
        }
        Ok(())
    }

    fn path(&self, format: Format, mark: &str) -> PathBuf {
        self.folder.join(format!("disk{mark}.{}", format.name()))
    }

    fn layer(&self, number: u32) -> PathBuf {
        self.path(Format::Qcow2, &format!("-layer{number}"))
    }

    fn make(&mut self, disk: &Disk, format: Format) -> Result<PathBuf, Error> {
        let path = self.path(format, "");
        match (disk.content, format) {
            (Content::Data | Content::Chain(_), Format::Raw) => {
                let mut parts = Parts::new(&path, disk.size)?;
                parts.write(|_| true)?;
            }
            (Content::Allocated | Content::Empty, Format::Raw) => {
                let made = File::create(&path).and_then(|f| f.set_len(disk.size));
                made.map_err(|e| fail(&path, e))?;
            }
            (Content::Data, Format::Qcow2 | Format::Vhd) => {
                let raw = self.raw(disk)?;
                self.image(&["convert", "-q", "-f", "raw", "-O", format.name()], &[&raw, &path])?;
            }
            (Content::Chain(n), Format::Qcow2) => return self.chain(disk.size, n.max(1)),
            (Content::Allocated | Content::Empty, Format::Qcow2) => {
                let all = disk.content == Content::Allocated;
                let preallocation = if all { Preallocation::Metadata } else { Preallocation::Off };
                let options = CreateOptions { preallocation, ..CreateOptions::new(disk.size) };
                let mut open = File::options();
                let open = open.create(true).truncate(true).read(true).write(true);
                let file = open.open(&path).map_err(|e| fail(&path, e))?;
                let mut storage = HostStorage::of(file, false).map_err(|e| fail(&path, e))?;
                create(&mut storage, "disk", &options).map_err(node::Error::from)?;
            }
            (Content::Empty, Format::Vhd) => {
                let size = disk.size.to_string();
                self.image(&["create", "-q", "-f", "vhd"], &[&path, Path::new(&size)])?;
            }
            (Content::Allocated | Content::Chain(_), Format::Vhd) => {
                return Err(Error::other("no VHD image is made of such a disk"));
            }
        }
        Ok(path)
    }

    fn raw(&mut self, disk: &Disk) -> Result<PathBuf, Error> {
        let one = Disk { count: 1, ..*disk };
        if let Some(paths) = self.made.get(&Format::Raw) {
            return paths.first().cloned().ok_or_else(|| Error::other("no raw image"));
        }
        let path = self.make(&one, Format::Raw)?;
        if disk.count == 1 {
            self.made.insert(Format::Raw, vec![path.clone()]);
        }
        Ok(path)
    }

    /// A chain; of the parts, each layer has those whose turn it is.
    fn chain(&mut self, size: u64, layers: u32) -> Result<PathBuf, Error> {
        let raw = self.path(Format::Raw, "-growing");
        let mut parts = Parts::new(&raw, size)?;
        let mut under: Option<PathBuf> = None;
        for layer in 0..layers {
            parts.write(|part| part % u64::from(layers) == u64::from(layer))?;
            let path = self.layer(layer);
            let mut words = vec!["convert", "-q", "-f", "raw", "-O", "qcow2"];
            let name = under.as_ref().map(|u| u.display().to_string());
            if let Some(name) = &name {
                words.extend(["-F", "qcow2", "-B", name]);
            }
            self.image(&words, &[&raw, &path])?;
            under = Some(path);
        }
        std::fs::remove_file(&raw).map_err(|e| fail(&raw, e))?;
        let top = under.ok_or_else(|| Error::other("a chain of no images"))?;
        let path = self.path(Format::Qcow2, "");
        std::fs::rename(&top, &path).map_err(|e| fail(&path, e))?;
        Ok(path)
    }

    /// The image in stripes over devices, each with its share of it.
    fn stripes(&mut self, disk: &Disk) -> Result<Vec<PathBuf>, Error> {
        let one = Disk { devices: 1, ..*disk };
        let raw = self.make(&one, Format::Raw)?;
        // The image is larger than its disk by its metadata.
        let share = (disk.size / u64::from(disk.devices)).next_multiple_of(STRIPE) + (8 << 20);
        let mut devices = Vec::new();
        for n in 0..disk.devices {
            let path = self.folder.join(format!("device{n}"));
            let made = File::create(&path).and_then(|f| f.set_len(share));
            made.map_err(|e| fail(&path, e))?;
            devices.push(path);
        }
        let nodes = devices.iter().cloned().map(NodeSpec::File).collect();
        let node = NodeSpec::Stripe(STRIPE, nodes).to_string();
        let words = ["convert", "-q", "-f", "raw", "-O", "qcow2"];
        self.image(&words, &[&raw, Path::new(&node)])?;
        std::fs::remove_file(&raw).map_err(|e| fail(&raw, e))?;
        Ok(devices)
    }

    /// Runs `polldisk image …`.
    fn image(&self, words: &[&str], nodes: &[&Path]) -> Result<(), Error> {
        let mut command = Command::new(&self.program);
        command.arg("image").args(words).args(nodes);
        done_within(command, PATIENCE).map(|_| ())
    }
}

fn fail(path: &Path, e: impl std::fmt::Display) -> Error {
    Error::other(format!("{}: {e}", path.display()))
}

/// A raw file that is filled part by part; what a part holds depends on where it is alone.
struct Parts {
    file: File,
    path: PathBuf,
    size: u64,
}

impl Parts {
    fn new(path: &Path, size: u64) -> Result<Parts, Error> {
        let file = File::create(path).map_err(|e| fail(path, e))?;
        file.set_len(size).map_err(|e| fail(path, e))?;
        Ok(Parts { file, path: path.to_owned(), size })
    }

    fn write(&mut self, whose: impl Fn(u64) -> bool) -> Result<(), Error> {
        use std::io::{Seek, SeekFrom};
        let mut out = BufWriter::with_capacity(1 << 20, &self.file);
        let mut words = vec![0u8; PART as usize];
        let mut at = 0;
        for part in 0..self.size.div_ceil(PART) {
            let len = PART.min(self.size - part * PART);
            if !whose(part) {
                continue;
            }
            pattern(part, &mut words);
            let put =
                if at == part * PART { Ok(0) } else { out.seek(SeekFrom::Start(part * PART)) };
            let written = put.and_then(|_| out.write_all(&words[..len as usize]));
            written.map_err(|e| fail(&self.path, e))?;
            at = part * PART + len;
        }
        out.flush().map_err(|e| fail(&self.path, e))
    }
}

/// Bytes that do not compress, and are the same each time.
fn pattern(part: u64, into: &mut [u8]) {
    let mut x = SEED ^ part.wrapping_mul(0xd134_2543_de82_ef95) | 1;
    for word in into.as_chunks_mut::<8>().0 {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        *word = x.to_le_bytes();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_written_once_and_all_of_them_are_the_whole() {
        let dir = tempfile::tempdir().unwrap();
        let (whole, turns) = (dir.path().join("a"), dir.path().join("b"));
        let size = 5 * PART + 512;
        Parts::new(&whole, size).unwrap().write(|_| true).unwrap();
        let mut parts = Parts::new(&turns, size).unwrap();
        for turn in 0..3 {
            parts.write(|p| p % 3 == turn).unwrap();
        }
        let (a, b) = (std::fs::read(whole).unwrap(), std::fs::read(turns).unwrap());
        assert_eq!(a.len() as u64, size);
        assert!(a == b);
        assert_ne!(a[..PART as usize], a[PART as usize..2 * PART as usize]);
        assert!(a.as_chunks::<4096>().0.iter().all(|page| page.iter().any(|&b| b != 0)));
    }

    #[test]
    fn images_without_data_are_made_without_this_program() {
        let dir = tempfile::tempdir().unwrap();
        let mut images = Images::new(dir.path().to_owned(), "/nonexistent".into());
        let disk = Disk { size: 1 << 30, content: Content::Allocated, devices: 1, count: 2 };
        let paths = images.of(&disk, Format::Qcow2).unwrap();
        assert_eq!(paths.len(), 2);
        assert_eq!(images.of(&disk, Format::Qcow2).unwrap(), paths);
        let len = |p: &PathBuf| std::fs::metadata(p).unwrap().len();
        assert!(len(&paths[0]) > 1 << 30 && len(&paths[1]) == len(&paths[0]));
        let empty = Disk { content: Content::Empty, count: 1, ..disk };
        let path = images.of(&empty, Format::Qcow2).unwrap().remove(0);
        assert!(len(&path) < 1 << 20);
        assert!(!paths[1].exists(), "images of the disk before are gone");
        std::fs::write(&path, "changed").unwrap();
        images.of(&empty, Format::Qcow2).unwrap();
        assert!(len(&path) > 1000, "an empty disk is empty for each server");
        images.clear().unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
