//! `polldisk bench run`: a load generator, and what it measures.
//!
//! A [`Job`] says what is sent; an [`Outcome`] what came of it. The same jobs run over a guest's ring,
//! an NBD server and a block node, so that figures of these may be put beside each other.

mod job;
mod outcome;

pub use job::{Distribution, Job, Mix, Shape, Sizes, Verify};
pub use outcome::{Outcome, Percentiles, Server, Steady};
