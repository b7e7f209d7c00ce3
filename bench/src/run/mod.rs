//! `polldisk bench run`: a load generator, and what it measures.
//!
//! A [`Job`] says what is sent; an [`Outcome`] what came of it. The same jobs run over a guest's ring,
//! an NBD server and a block node, so that figures of these may be put beside each other: each is a
//! [`Target`], and [`run`] is the one loop that loads them. What a server takes meanwhile is found out
//! by a [`Meter`].
//!
//! The loop allocates nothing, and makes no system call that its target does not need: on a machine of
//! two processors it is the server's neighbour.

mod choose;
mod direct;
mod engine;
mod job;
mod nbd;
mod outcome;
mod random;
mod record;
mod ring;
mod target;
mod verify;

pub mod meter;

pub use direct::Direct;
pub use engine::{Progress, run};
pub use job::{Distribution, Job, Mix, Shape, Sizes, Verify};
pub use meter::Meter;
pub use nbd::Nbd;
pub use outcome::{Outcome, Percentiles, Server, Steady};
pub use ring::{Ring, RingOptions};
pub use target::{Done, Kind, Limits, Request, Target};
