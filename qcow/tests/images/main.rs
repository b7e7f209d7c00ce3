//! Tests of whole images, with qemu-img and qemu-io as the judges.

mod create;
mod support;
