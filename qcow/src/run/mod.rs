//! The datapath of an image: what runs on a reactor for each request.
//!
//! A request whose clusters are mapped in one run goes straight down ([`Image::submit`] →
//! leaf → [`Layer::complete`]). Everything else becomes the job of the slot's task ([`serve`]): an
//! `async fn` that loads pages of the map ([`resolve`]), allocates ([`alloc`]), fills ([`write`]),
//! zeroes and discards ([`zero`]), records that in bitmaps ([`marks`]) and for whoever
//! copies the disk meanwhile ([`watch`]), and writes metadata back in ordered batches ([`flush`]); host
//! clusters that nothing refers to any more come back by [`reclaim`]. What finds none may wait: [`space`].
//!
//! One reactor, the home reactor, owns an image; its tasks share [`shared::Shared`] by `Rc` and never
//! hold a borrow across an `.await`. Any number of other reactors serve the image too, each with a
//! [`Satellite`]: they look up in the [`crate::map::Map`], which alone is shared, and send the rest
//! home ([`link`]). When a host cluster may be used again is agreed by [`epochs`].

mod alloc;
mod close;
mod corrupt;
mod epochs;
mod flights;
mod flush;
mod hits;
mod image;
mod io;
mod journal;
mod link;
mod marks;
mod meta;
mod pause;
mod place;
mod plain;
mod read;
mod reclaim;
mod refblocks;
mod resolve;
mod satellite;
mod serve;
mod shared;
mod space;
mod stack;
mod stream;
mod tables;
mod watch;
mod workers;
mod write;
mod zero;

use crate::atomics;

pub use image::{Counters, Image, Options};
pub use journal::{Change, Changes, Journal};
pub use satellite::{Reseat, Satellite, Seat, Wakes};
pub use space::Space;
pub use stack::Stack;
pub use stream::Progress;
pub use watch::Taken;
pub use workers::Workers;
