//! An NBD server on a unix socket or an address of a network: fixed newstyle negotiation, TLS,
//! structured replies, block status.
//!
//! Serves one image that a reactor owns. Each connection has a service thread of its own, which may
//! block in system calls, and does its I/O through a [`reactor::Portal`]. Where the reactor serves no
//! guest and would sleep between requests, the connection lodges on the reactor's thread instead
//! (`lodging`), until it needs something that blocks. The bytes of a request go from the socket into
//! DMA memory and from there to the device (or back) without another copy where they are large.
//!
//! - [`Server`] listens, seats connections and ends them; [`Export`] is what it serves.
//! - [`Client`] writes to another server, at a [`Remote`] address.
//! - [`Extents`] answers block-status queries; [`AllData`] is the answer of who does not know. [`Bitmaps`] are what
//!   else clients may ask for so.
//! - [`Counters`] is what was done, of one connection or of all, [`Latencies`] how long it took.
//!
//! Over a network it speaks TLS ([`TlsServer`]): a second thread seals and opens a connection's bytes.
//!
//! Protocol: the NBD project's `doc/proto.md`. Not spoken: oldstyle, extended headers.
//!
//! A connection that breaks a rule of the protocol is cut; it never costs another connection more
//! than the processor time of its thread. Memory of a connection is bounded by [`Server`]'s seats,
//! which keep their DMA memory for the next connection: a reactor's devices know it already.

mod buffers;
mod claims;
mod client;
mod conn;
mod contexts;
mod export;
mod gate;
mod handshake;
mod input;
mod listen;
mod lodging;
mod output;
mod pieces;
mod proto;
mod rmw;
mod seats;
mod server;
mod sockio;
mod stats;
mod tls;
mod work;

pub use client::{Client, ClientError, Network, Remote};
pub use contexts::{Bitmap, Bitmaps};
pub use export::{AllData, Attach, Export, Extent, Extents};
pub use listen::{Error, SocketFile, listen_on};
pub use server::{ConnectionInfo, Security, Server};
pub use stats::{Counters, Latencies};
pub use tls::{TlsClient, TlsError, TlsServer};
