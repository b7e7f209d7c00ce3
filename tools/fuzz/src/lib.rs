//! What the fuzz targets do with their input; one function each. Called by libFuzzer, over and over
//! on one thread. A panic, a hang, and more memory than [`limit_memory`] allows are findings.

#![forbid(unsafe_code)]

mod files;
mod group;
mod guest;
mod memory;
mod mutate;
mod ring;

pub use files::{bitmaps, compressed, header, refcounts, snapshots, tables, vhd};
pub use group::group;
pub use guest::image;
pub use ring::ring;

/// Bytes of address space that a target may have, libFuzzer's own tables included.
const ADDRESS_SPACE: u64 = 1 << 30;

/// Makes an allocation that no small image justifies fail, and so end the process.
pub fn limit_memory() {
    use nix::sys::resource::{Resource, setrlimit};
    setrlimit(Resource::RLIMIT_AS, ADDRESS_SPACE, ADDRESS_SPACE).expect("a limit can be lowered");
}
