//! The disks of a run, with the image and what it stands on, and what the guest sees of that.

use block::Storage;
use qcow::Compressor;
use qcow::build::Builder;
use qcow::create::{CreateOptions, create};
use qcow::open::{Chain, ChainOptions, Format, Opened, Role};
use sim::{BELOW, Disk, Rng, SECTOR, Trace, fill};

use crate::kept::Kept;
use crate::plan::Plan;

/// An image file.
#[derive(Clone)]
pub(crate) struct Layer {
    /// Images name each other by this number.
    pub(crate) name: u32,
    pub(crate) format: Format,
    pub(crate) disk: Disk,
    pub(crate) data: Option<Data>,
    /// Its internal snapshots.
    pub(crate) kept: Vec<Kept>,
}

/// An external data file.
#[derive(Clone)]
pub(crate) struct Data {
    pub(crate) disk: Disk,
    /// It is the guest's disk by itself.
    pub(crate) raw: bool,
}

impl Layer {
    /// Its name in another image.
    pub(crate) fn path(&self) -> String {
        format!("/layer{}", self.name)
    }

    /// Its data file's name in it.
    fn data_path(&self) -> String {
        format!("/data{}", self.name)
    }

    /// Its disks: of the image, and of the data file.
    pub(crate) fn disks(&self) -> impl Iterator<Item = &Disk> {
        [Some(&self.disk), self.data.as_ref().map(|d| &d.disk)].into_iter().flatten()
    }

    /// The same with other disks.
    fn map(&self, mut f: impl FnMut(&Disk) -> Disk) -> Layer {
        let disk = f(&self.disk);
        let data = self.data.as_ref().map(|d| Data { disk: f(&d.disk), raw: d.raw });
        Layer { disk, data, kept: self.kept.clone(), ..*self }
    }

    /// The image as a power cut would leave it.
    pub(crate) fn frozen(&self, rng: &mut Rng) -> Layer {
        self.map(|disk| disk.frozen(rng))
    }

    /// The image as a process that dies leaves it.
    pub(crate) fn left(&self, rng: &mut Rng) -> Layer {
        self.map(|disk| disk.left(rng))
    }

    /// The image on disks that are written to and can lose power.
    pub(crate) fn revived(&self, rng: &mut Rng, trace: &Trace) -> Layer {
        let new = |disk: &Disk| {
            Disk::new(disk.config(), disk.clone().take_bytes(), rng.fork(), trace.clone())
        };
        self.map(new)
    }

    /// Changes carried out so far.
    pub(crate) fn writes(&self) -> u64 {
        self.disks().map(Disk::writes).sum()
    }
}

/// The layers, the one that is written to first; and what each sector of the guest's disk holds.
pub(crate) struct Images {
    pub(crate) layers: Vec<Layer>,
    pub(crate) held: Vec<u32>,
}

/// Makes all layers, the lowest one first.
pub(crate) fn make(plan: &Plan, rng: &mut Rng, trace: &Trace) -> Result<Images, String> {
    let (mut layers, mut held): (Vec<Layer>, _) = (Vec::new(), Vec::new());
    for (at, below) in plan.below.iter().enumerate().rev() {
        let id = BELOW + 2 * at as u32;
        let mut disk = Disk::new(below.disk, Vec::new(), rng.fork(), trace.clone());
        let format = if below.qcow {
            let mut o = CreateOptions::new(below.sectors * SECTOR as u64);
            o.cluster_size = 1 << below.cluster_bits;
            o.extended_l2 = below.extended_l2;
            o.backing = layers.first().map(|l| (l.path(), l.format));
            held = build(&mut disk, None, &o, held, (6, 0), id, rng)?;
            Format::Qcow2
        } else {
            // Whatever was below a raw layer is not seen.
            layers.clear();
            held = (0..below.sectors).map(|_| if rng.one_in(4) { 0 } else { id }).collect();
            write(&mut disk, 0, &held)?;
            Format::Raw
        };
        // It is not written to any more.
        let disk = Disk::view(below.disk, disk.take_bytes());
        layers.insert(0, Layer { name: at as u32 + 1, format, disk, data: None, kept: Vec::new() });
    }
    let mut disk = Disk::new(plan.disk, Vec::new(), rng.fork(), trace.clone());
    let mut o = CreateOptions::new(plan.sectors * SECTOR as u64);
    o.cluster_size = 1 << plan.cluster_bits;
    (o.version, o.refcount_bits, o.lazy_refcounts) = (plan.version, plan.refcount_bits, plan.lazy);
    o.compression = plan.compression;
    o.extended_l2 = plan.extended_l2;
    o.backing = layers.first().map(|l| (l.path(), l.format));
    let id = BELOW + 2 * plan.below.len() as u32;
    // Half of it is sure to fit.
    let filled = if plan.disk.size < plan.sectors * 600 { plan.filled / 2 } else { plan.filled };
    let mut top =
        Layer { name: 0, format: Format::Qcow2, disk: disk.clone(), data: None, kept: Vec::new() };
    let mut data = plan.data.map(|d| {
        // Not from the run's own numbers, which those of other plans are as well.
        let aside = Rng::new(d.disk.size ^ 0xda7a);
        (o.data_file, o.data_file_raw) = (Some(top.data_path()), d.raw);
        Disk::new(d.disk, Vec::new(), aside, trace.clone())
    });
    held = build(&mut disk, data.as_mut(), &o, held, (filled, plan.solid), id, rng)?;
    top.data = data.map(|disk| Data { disk, raw: o.data_file_raw });
    layers.insert(0, top);
    Ok(Images { layers, held })
}

fn write(disk: &mut Disk, first: u64, held: &[u32]) -> Result<(), String> {
    let mut bytes = vec![0; held.len() * SECTOR];
    for (i, &id) in held.iter().enumerate() {
        fill(id, first + i as u64, &mut bytes[i * SECTOR..(i + 1) * SECTOR]);
    }
    disk.write_at(first * SECTOR as u64, &bytes).map_err(|e| e.to_string())
}

/// Makes a QCOW2 layer of which so many of 8 clusters are given, and the first ones all. Returns what
/// the guest sees.
fn build(
    disk: &mut Disk,
    data: Option<&mut Disk>,
    o: &CreateOptions,
    below: Vec<u32>,
    (filled, solid): (u64, u64),
    id: u32,
    rng: &mut Rng,
) -> Result<Vec<u32>, String> {
    let sectors = o.size / SECTOR as u64;
    let mut held = below;
    held.resize(sectors as usize, 0);
    let unit = o.cluster_size / SECTOR as u64;
    let mut compressor = Compressor::new(o.compression);
    let packs = data.is_none();
    let builder = match data {
        None => Builder::new(disk, "sim", o),
        Some(data) => Builder::with_data(disk, data, "sim", o),
    };
    let mut builder = builder.map_err(|e| e.to_string())?;
    let (mut packed, mut first) = (Vec::new(), 0);
    while first < sectors {
        let count = unit.min(sectors - first);
        let at = first * SECTOR as u64;
        let range = first as usize..(first + count) as usize;
        let given = first < solid * unit;
        if rng.below(8) < filled || given {
            let what = if given { 3 } else { rng.below(4) };
            let own = if what == 0 { 0 } else { id + 1 };
            held[range].fill(own);
            let mut bytes = vec![0; (unit as usize) * SECTOR];
            fill(own, first, &mut bytes[..count as usize * SECTOR]);
            let done = match what {
                0 => builder.zeroes(at, count * SECTOR as u64),
                1 if packs && compressor.encode(&bytes, &mut packed) => {
                    builder.compressed(at, &packed)
                }
                _ => builder.data(at, &bytes[..count as usize * SECTOR]),
            };
            done.map_err(|e| e.to_string())?;
        } else if o.data_file_raw {
            // In such an image everything is mapped.
            builder.zeroes(at, count * SECTOR as u64).map_err(|e| e.to_string())?;
        }
        first += count;
    }
    builder.finish().map_err(|e| e.to_string())?;
    Ok(held)
}

/// An empty image on this layer, for a disk of so many sectors.
pub(crate) fn overlay(
    plan: &Plan,
    name: u32,
    on: &Layer,
    disk: Disk,
    sectors: u64,
) -> Result<Layer, String> {
    let mut layer = Layer { name, format: Format::Qcow2, disk, data: None, kept: Vec::new() };
    let mut o = CreateOptions::new(sectors * SECTOR as u64);
    o.cluster_size = 1 << plan.cluster_bits;
    (o.version, o.refcount_bits) = (plan.version, plan.refcount_bits);
    o.backing = Some((on.path(), on.format));
    create(&mut layer.disk, "overlay", &o).map_err(|e| e.to_string())?;
    Ok(layer)
}

/// Opens the first of the layers, with those of them that it stands on.
pub(crate) fn open(layers: &[Layer], writable: bool) -> Result<Chain<Disk>, String> {
    let opened = |l: &Layer, disk: &Disk, path: String| Opened {
        storage: disk.clone(),
        path: Some(path.into()),
        name: format!("layer {}", l.name),
        id: None,
    };
    let layer = |l: &Layer| opened(l, &l.disk, l.path());
    let options = ChainOptions { writable, ..Default::default() };
    let chain = Chain::open(layer(&layers[0]), options, &mut |named| {
        let found = match named.role {
            Role::Backing => layers.iter().find(|l| l.path() == named.name).map(layer),
            Role::Data => layers
                .iter()
                .filter_map(|l| l.data.as_ref().map(|d| (l, l.data_path(), d)))
                .find(|(_, path, _)| *path == named.name)
                .map(|(l, path, d)| opened(l, &d.disk, path)),
        };
        Ok(found.expect("images name only what there is"))
    });
    chain.map_err(|e| e.to_string())
}
