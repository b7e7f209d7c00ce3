//! `polldisk bench compare`: polldisk and its peers under the same load, and the report of it.
//!
//! - [`results`]: what a comparison finds, as JSON; all else makes or shows it.
#![forbid(unsafe_code)]

pub mod results;
