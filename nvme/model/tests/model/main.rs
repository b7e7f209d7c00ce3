//! The model driven by hand, register by register, as a host would.

mod admin;
mod bringup;
mod cache;
mod data;
mod events;
mod faults;
mod format;
mod host;
mod hostile;
mod order;
mod served;
mod thread;
