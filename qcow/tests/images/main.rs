//! Tests of whole images, with qemu-img and qemu-io as the judges.

mod check;
mod create;
mod features;
mod open;
mod read;
mod support;
