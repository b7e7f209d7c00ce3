//! Changing images that nobody uses: every result is judged by qemu-img, and at any power cut the
//! image is the old one or the new one.

mod bitmaps;
mod chains;
mod hostile;
mod rig;
mod sizes;
mod snapshots;
