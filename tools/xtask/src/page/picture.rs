//! What can be told of a picture without eyes.

use std::collections::HashSet;
use std::fs::File;
use std::io::BufReader;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use png::{ColorType, Decoder, Transformations};

/// Bytes of a picture in memory, at most.
const MOST: usize = 256 << 20;

/// A picture.
#[derive(Debug)]
pub(super) struct Seen {
    pub(super) size: (u32, u32),
    /// Different ones.
    pub(super) colours: usize,
    /// Mean of all, from 0 to 255.
    pub(super) brightness: f64,
}

/// Reads a PNG file.
pub(super) fn look(path: &Path) -> Result<Seen> {
    let file = File::open(path).with_context(|| format!("{}", path.display()))?;
    let mut decoder = Decoder::new(BufReader::new(file));
    decoder.set_transformations(Transformations::EXPAND | Transformations::STRIP_16);
    let mut reader = decoder.read_info()?;
    let size = reader.output_buffer_size().filter(|n| *n <= MOST).context("too large")?;
    let mut bytes = vec![0; size];
    let info = reader.next_frame(&mut bytes)?;
    let samples = match info.color_type {
        ColorType::Rgb => 3,
        ColorType::Rgba => 4,
        other => anyhow::bail!("{other:?} instead of colours"),
    };
    let pixels = bytes[..info.buffer_size()].chunks_exact(samples);
    let count = pixels.len();
    ensure!(count > 0, "no pixel");
    let mut colours = HashSet::new();
    let mut sum = 0u64;
    for pixel in pixels {
        colours.insert([pixel[0], pixel[1], pixel[2]]);
        sum += pixel[..3].iter().map(|&v| u64::from(v)).sum::<u64>();
    }
    let brightness = sum as f64 / (count * 3) as f64;
    Ok(Seen { size: (info.width, info.height), colours: colours.len(), brightness })
}
