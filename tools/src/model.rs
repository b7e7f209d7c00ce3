//! `polldisk model`: our NVMe controller model as another process's device, until a signal says to
//! stop.

use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context;
use clap::Args;
use node::{NodeSpec, OpenOptions, ServedModel};
use qcow::open::Format;

/// Serve an NVMe controller model on a vfio-user socket until SIGTERM or SIGINT.
#[derive(Args)]
pub(crate) struct Model {
    /// Where to listen; a stale socket is replaced, a live one refused. One client at a time.
    #[arg(long, value_name = "SOCKET")]
    vfio_user: PathBuf,
    /// What is in the file, qcow2 or raw: says how large the drive must be for it to grow.
    #[arg(short, long, default_value = "qcow2", value_parser = crate::args::format)]
    format: Format,
    /// A drive that refuses writes.
    #[arg(short, long)]
    read_only: bool,
    /// Namespaces 1, 2 and so on: model:PATH or mem:SIZE.
    #[arg(required = true, value_name = "NODE")]
    nodes: Vec<String>,
}

/// Serves; returns when told to stop and everything is on disk.
pub(crate) fn run(model: &Model) -> anyhow::Result<u8> {
    let signals = crate::signals::Signals::take()?;
    let nodes = model.nodes.iter().map(|n| NodeSpec::parse(n)).collect::<Result<Vec<_>, _>>()?;
    let options = OpenOptions { writable: !model.read_only, ..OpenOptions::read(model.format) };
    let served = ServedModel::open(&nodes, &options)?;
    let told = signals.told();
    let (listener, file) = nbd::listen_on(&model.vfio_user)?;
    let stop = Arc::new(AtomicBool::new(false));
    let stopping = stop.clone();
    let waiting = std::thread::Builder::new().name("stop".to_owned()).spawn(move || {
        if let Ok(signal) = told.recv() {
            log::info!("{signal}: stopping");
        }
        stopping.store(true, Ordering::Release);
    });
    waiting.context("cannot start a thread")?;
    let ready = || -> std::io::Result<()> {
        let mut out = std::io::stdout();
        writeln!(out, "listening on {}", model.vfio_user.display())?;
        out.flush()
    };
    let result = ready().map_err(anyhow::Error::from);
    let result = result.and_then(|()| Ok(served.serve(listener, &stop)?));
    file.remove();
    result.map(|()| 0)
}
