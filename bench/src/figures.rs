//! Figures beside the path: what filling an empty image costs the device, and what opening a huge
//! image costs.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use node::{ModelSpec, NodeSpec, OpenOptions, Parts, ReactorCore};
use qcow::create::{CreateOptions, create};
use qcow::open::Format;
use reactor::Clock;
use serde::Serialize;

use crate::Error;
use crate::full::resident;
use crate::rig::{Rig, close};

/// Device commands while a guest fills an empty image with 4 KiB writes, 32 deep, in order.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Fill {
    /// Whether the device has a volatile write cache.
    pub volatile_cache: bool,
    /// Writes that the guest made.
    pub guest_writes: u64,
    /// Commands that changed the device: data, metadata, filling, Write Zeroes, deallocations.
    pub device_writes: u64,
    /// Flush commands.
    pub device_flushes: u64,
    /// `device_writes / guest_writes`.
    pub writes_per_write: f64,
}

/// Fills an empty image, with the final flush.
///
/// # Errors
/// If it cannot be set up, or an answer was wrong.
pub fn fill(volatile_cache: bool, scratch: &Path) -> Result<Fill, Error> {
    let path = scratch.join("fill.qcow2");
    let spec = ModelSpec { vwc: volatile_cache, ..ModelSpec::new(&path) };
    let blocks = 16 << 10;
    let mut rig = Rig::create(spec, blocks)?;
    let before = rig.model_stats().ok_or_else(|| Error::other("there is no model"))?;
    rig.fill()?;
    let after = rig.model_stats().ok_or_else(|| Error::other("there is no model"))?;
    let done = after.since(&before);
    rig.close()?;
    Ok(Fill {
        volatile_cache,
        guest_writes: blocks,
        device_writes: done.device_writes(),
        device_flushes: done.flushes,
        writes_per_write: done.device_writes() as f64 / blocks as f64,
    })
}

/// What it costs to open an image of 16 TiB whose every L2 table exists (64 KiB clusters).
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Open {
    /// From the node string to an image that takes requests, in milliseconds.
    pub milliseconds: f64,
    /// What the process grew by meanwhile, in bytes.
    pub memory_bytes: u64,
}

/// Opens such an image for writing.
///
/// # Errors
/// If it cannot be made or opened.
pub fn open_16t(scratch: &Path) -> Result<Open, Error> {
    let path = scratch.join("huge.qcow2");
    huge(&path)?;
    let clock = Clock::real();
    let (rss, began) = (resident()?, clock.now());
    let options = OpenOptions { clock: clock.clone(), ..OpenOptions::write(Format::Qcow2) };
    let parts = Parts::new(node::open_chain(&NodeSpec::File(path), &options)?)?;
    let mut core = ReactorCore::new(clock.clone()).map_err(Error::other)?;
    let attached = parts.attach(&mut core, qcow::run::Options::default());
    let (image, rest) = attached.map_err(Error::other)?;
    let took = clock.now() - began;
    let grown = resident()?.saturating_sub(rss);
    close(&mut core, image, rest)?;
    Ok(Open { milliseconds: took as f64 / 1e6, memory_bytes: grown })
}

/// A sparse image with all L2 tables and refcount blocks in place; they hold zeroes but for the
/// last refcount.
fn huge(path: &Path) -> Result<(), Error> {
    const CLUSTER: u64 = 64 << 10;
    const TABLES: u64 = 32768;
    const BLOCKS: u64 = 8192;
    let options = &mut File::options();
    let file = options.create(true).truncate(true).read(true).write(true).open(path);
    let file = file.map_err(Error::other)?;
    let mut storage = node::HostStorage::of(file.try_clone().map_err(Error::other)?, false)
        .map_err(Error::other)?;
    create(&mut storage, "huge", &CreateOptions::new(16 << 40)).map_err(node::Error::from)?;
    drop(storage);
    let mut header = [0; 64];
    file.read_exact_at(&mut header, 0).map_err(Error::other)?;
    let word = |at: usize| u64::from_be_bytes(header[at..at + 8].try_into().unwrap_or([0; 8]));
    let (l1, table) = (word(40), word(48));
    let base = 1 << 30;
    let l1_bytes: Vec<u8> =
        (0..TABLES).flat_map(|i| ((1 << 63) | (base + i * CLUSTER)).to_be_bytes()).collect();
    file.write_all_at(&l1_bytes, l1).map_err(Error::other)?;
    // The first block stays where it is; the table's one cluster holds exactly all others.
    let mut first = [0; 8];
    file.read_exact_at(&mut first, table).map_err(Error::other)?;
    let behind = base + TABLES * CLUSTER;
    let mut blocks: Vec<u8> =
        (0..BLOCKS).flat_map(|i| (behind + i * CLUSTER).to_be_bytes()).collect();
    blocks[..8].copy_from_slice(&first);
    file.write_all_at(&blocks, table).map_err(Error::other)?;
    let last = behind + BLOCKS * CLUSTER;
    file.write_all_at(&1u16.to_be_bytes(), last - 4).map_err(Error::other)?;
    Ok(())
}
