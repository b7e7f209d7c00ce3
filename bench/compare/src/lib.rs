//! `polldisk bench compare`: polldisk and its peers under the same load, and the report of it.
//!
//! - [`results`]: what a comparison finds, as JSON; all else makes or shows it.
//! - [`profiles`]: what is compared, as data: disks, ways to set servers up, jobs.
//! - [`peer`]: peers, each found, set up, started and ended.
//! - [`round`]: makes the comparison: images, servers in turn, rounds, and what comes of them.
//! - [`page`]: the report, from results alone: HTML, JSON, CSV, and charts as SVG.
//! - [`host`]: what the host is, and [`doctor`]: whether it is fit for measuring.
#![forbid(unsafe_code)]

mod charts;
mod csv;
pub mod doctor;
mod flame;
pub mod host;
mod images;
mod load;
mod many;
pub mod page;
pub mod peer;
pub mod profiles;
mod ratio;
pub mod results;
pub mod round;
mod rows;
mod split;
