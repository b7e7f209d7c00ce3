//! The driver against the controller model.

mod bringup;
mod closing;
mod common;
mod faults;
mod format;
mod hostile;
mod io;
mod rings;
mod table;
mod threads;
