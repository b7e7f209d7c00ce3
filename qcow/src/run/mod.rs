//! The datapath of an image: what runs on a reactor for each request.
//!
//! A request whose clusters are mapped in one run goes straight down ([`Image::submit`] →
//! leaf → [`Layer::complete`]). Everything else becomes the job of the slot's task ([`serve`]): an
//! `async fn` that loads pages of the map ([`resolve`]), allocates ([`alloc`]), fills ([`write`]),
//! zeroes and discards ([`zero`]), and writes metadata back in ordered batches ([`flush`]); host
//! clusters that nothing refers to any more come back by [`reclaim`].
//!
//! One reactor owns an image; its tasks share [`shared::Shared`] by `Rc` and never hold a borrow
//! across an `.await`. The [`crate::map::Map`] alone is shared with other reactors.

mod alloc;
mod close;
mod flush;
mod image;
mod io;
mod meta;
mod read;
mod reclaim;
mod refblocks;
mod resolve;
mod serve;
mod shared;
mod stack;
mod tables;
mod write;
mod zero;

pub use image::{Counters, Image, Options};
pub use stack::Stack;
