//! What is done to an image between turns, by either program: bitmaps, internal snapshots, conversion.

use anyhow::{Result, ensure};

use crate::case::Case;
use crate::pick::{Data, Shape, Who};

/// Of the snapshot.
const NAME: &str = "before";

impl Case<'_> {
    /// Two bitmaps, of which one records what the turns write. Where the lists are compared it must
    /// not be in use.
    pub(crate) fn add_bitmaps(&mut self) -> Result<()> {
        let top = self.top_name()?;
        for (name, more) in [("records", "--enable"), ("rests", "--disable")] {
            let granularity = (512 << self.rng.below(12)).to_string();
            let who = self.anyone();
            self.image(who, &["bitmap", "--add", more, "-g", &granularity, &top, name])?;
        }
        Ok(())
    }

    /// Bits of one go to the other, then both go.
    pub(crate) fn remove_bitmaps(&mut self) -> Result<()> {
        let top = self.top_name()?;
        let who = self.anyone();
        self.image(who, &["bitmap", "--merge", "records", &top, "rests"])?;
        self.judge()?;
        for name in ["records", "rests"] {
            let who = self.anyone();
            self.image(who, &["bitmap", "--remove", &top, name])?;
        }
        self.judge()
    }

    /// Takes one where the image can have one, and returns what the disk shows in it.
    pub(crate) fn take_snapshot(&mut self, shape: &Shape) -> Result<Option<Vec<u8>>> {
        let top = self.top_name()?;
        // Many compressed clusters may lie in one, so a few bits may not do for two of each.
        let fits = shape.width >= if shape.compression.is_some() { 8 } else { 2 };
        if shape.data == Data::Inside && fits {
            let who = self.anyone();
            self.image(who, &["snapshot", "-c", NAME, &top])?;
            self.judge()?;
            return Ok(Some(self.model.bytes.clone()));
        }
        if shape.data != Data::Inside || shape.width == 1 {
            let refused = self.image(Who::Polldisk, &["snapshot", "-c", NAME, &top]);
            ensure!(refused.is_err(), "taken, though there can be none");
            self.judge()?;
        }
        Ok(None)
    }

    /// The disk becomes what it was, and the snapshot goes.
    pub(crate) fn apply_snapshot(&mut self, then: Vec<u8>) -> Result<()> {
        let top = self.top_name()?;
        let who = self.anyone();
        self.image(who, &["snapshot", "-a", NAME, &top])?;
        self.model.bytes = then;
        self.judge()?;
        let who = self.anyone();
        self.image(who, &["snapshot", "-d", NAME, &top])?;
        self.judge()
    }

    /// Makes an image of any shape of the disk, or of what the snapshot holds of it.
    pub(crate) fn convert(&mut self, snapshot: bool, want: &[u8]) -> Result<()> {
        let shape = Shape::any(&mut self.rng, 0);
        let mut options = shape.options(false);
        if shape.data != Data::Inside {
            options += ",data_file=converted.data";
        }
        let (top, named) = (self.top_name()?, format!("snapshot.name={NAME}"));
        let mut args = vec!["convert", "-f", "qcow2", "-O", "qcow2", "-o", &options];
        if shape.compression.is_some() {
            args.push("-c");
        }
        if snapshot {
            args.extend(["-l", &named]);
        }
        args.extend([top.as_str(), "converted.qcow2"]);
        self.image(Who::Polldisk, &args)?;
        self.judge_one("converted.qcow2", want)
    }
}
