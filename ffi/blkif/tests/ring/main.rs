//! A backend against frontends, good and bad, turned by hand on one thread; see each file.

mod common;
mod core;
mod data;
mod durable;
mod events;
mod grants;
mod hostile;
mod kept;
mod latency;
mod rules;
