//! `polldisk serve`: the daemon. It serves the disks of Xen guests, and images that are attached by
//! `polldisk ctl`.

mod config;
mod confine;
mod control;
mod device;
mod devices;
mod figures;
mod images;
mod keep;
mod metrics;
mod mirrors;
mod repositories;
mod rrd;
#[cfg(test)]
mod tests;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context;
use clap::Args;
use node::{Guests, Reactors};
use reactor::Clock;
use xen::store::Store;

use crate::ctl::Server;
use config::Config;
use confine::Mode;
use control::Control;
use devices::Devices;
use figures::Figures;
use images::Images;
use keep::Keep;
use metrics::Listener;
pub(crate) use repositories::TYPE as REPOSITORY_TYPE;
use repositories::{Coalescer, Growth, Repositories};
use rrd::Rrd;

/// Serve the disks of Xen guests, and images that are attached: see polldisk ctl attach.
#[derive(Args)]
pub(crate) struct Serve {
    /// The configuration; without it everything has its default.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Only check the configuration.
    #[arg(long)]
    check: bool,
}

/// Serves until SIGTERM or SIGINT. Guests' rings are then left as they are, drained, for the next
/// daemon to take up.
pub(crate) fn run(serve: &Serve, noiommu: bool) -> anyhow::Result<u8> {
    let config = match &serve.config {
        Some(path) => Config::read(path)?,
        None => Config::default(),
    };
    if serve.check {
        crate::image::print::line("the configuration is fine")?;
        return Ok(0);
    }
    confine::drop_capabilities(noiommu)?;
    let signals = crate::signals::Signals::take()?;
    let reactors = Reactors::start(&config.starts()?, Clock::real())?;
    let options = qcow::run::Options { l2_cache: config.l2_cache()?, ..Default::default() };
    let allow = config.allow_backing.clone();
    let keep = Arc::new(Keep::new(config.state.clone())?);
    // Guests are served whether or not anybody is told figures.
    let rrd = or_said(config.rrd()?.map(rrd::Target::open));
    let uid = rrd.as_ref().and_then(rrd::Target::uid);
    let reach = config.mirror()?;
    let network = reach.is_network();
    let repositories = Repositories::new(config.state.clone(), uid).reaching(reach);
    let repositories = Arc::new(repositories);
    let images =
        Arc::new(Images::new(reactors.clone(), options, allow, keep, repositories.clone()));
    let stop = signals.told();
    let mode = Mode { policy: config.policy()?, xen: config.xen, noiommu, network };
    // No socket of a network can be made later, unless disks are mirrored over one.
    let listener = or_said(config.metrics()?.map(|address| Listener::bind(&address)));
    let limited = confine::limit_system_calls(mode, &reactors);
    let end = Arc::new(AtomicBool::new(false));
    let coalescer =
        Coalescer::new(repositories.clone(), images.clone(), config.coalesce_rate()?, end.clone());
    let coalescer = std::thread::Builder::new()
        .name("coalesce".to_owned())
        .spawn(|| coalescer.run())
        .context("cannot start a thread")?;
    let clock = reactors.clock().clone();
    let growth = limited.and_then(|()| Growth::start(repositories.clone(), clock));
    let served = growth.and_then(|growth| {
        let served = start(&config, &images, &repositories).map(|(server, devices)| {
            let told = Told::start(listener, rrd, &images, &devices);
            tell_manager("READY=1");
            log::info!("ready");
            let signal = stop.recv().context("cannot wait for signals");
            tell_manager("STOPPING=1");
            log::info!("stopping: {signal:?}");
            server.shutdown();
            told.shutdown();
            if let Some(devices) = devices {
                devices.stop();
            }
        });
        // What guests have sent may have needed space to the end.
        growth.stop();
        served
    });
    end.store(true, Ordering::Relaxed);
    if coalescer.join().is_err() {
        log::error!("the coalescer panicked");
    }
    let closed = images.close_all();
    repositories.close_all();
    drop(images);
    reactors.stop();
    served.and(closed)?;
    Ok(0)
}

fn start(
    config: &Config,
    images: &Arc<Images>,
    repositories: &Arc<Repositories>,
) -> anyhow::Result<(Server, Option<Arc<Devices>>)> {
    let devices = match config.xen {
        false => None,
        true => {
            let guests = Guests::open(images.reactors(), config.notify()?)?;
            let connect = Box::new(Store::connect);
            let started = Devices::start(connect, &config.backend, images.clone(), guests)?;
            Some(Arc::new(started))
        }
    };
    let control = Control {
        images: images.clone(),
        repositories: repositories.clone(),
        devices: devices.clone(),
    };
    let listen = || {
        if let Some(dir) = config.control.parent() {
            std::fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
        }
        Server::bind(&config.control, Box::new(control))
    };
    match (listen(), devices) {
        (Ok(server), devices) => Ok((server, devices)),
        (Err(e), devices) => {
            devices.inspect(|d| d.stop());
            Err(e)
        }
    }
}

/// Those whom figures are told to without being asked on the control socket.
struct Told {
    metrics: Option<metrics::Server>,
    rrd: Option<Rrd>,
}

impl Told {
    fn start(
        listener: Option<Listener>,
        rrd: Option<rrd::Target>,
        images: &Arc<Images>,
        devices: &Option<Arc<Devices>>,
    ) -> Told {
        let clock = || images.reactors().clock().clone();
        let source = || -> figures::Source {
            let (images, devices) = (images.clone(), devices.clone());
            Box::new(move || Figures::of(&images, devices.as_deref()))
        };
        let metrics = listener.map(|l| metrics::Server::start(l, clock(), source()));
        let rrd = rrd.map(|target| Rrd::start(target, clock(), source()));
        Told { metrics: or_said(metrics), rrd: or_said(rrd) }
    }

    fn shutdown(self) {
        if let Some(metrics) = self.metrics {
            metrics.shutdown();
        }
        if let Some(rrd) = self.rrd {
            rrd.shutdown();
        }
    }
}

/// What has started; else why not is said.
fn or_said<T>(started: Option<anyhow::Result<T>>) -> Option<T> {
    started.and_then(|started| started.inspect_err(|e| log::error!("{e:#}")).ok())
}

/// Tells systemd, if that started us: sd_notify(3).
fn tell_manager(what: &str) {
    use std::os::linux::net::SocketAddrExt as _;
    use std::os::unix::ffi::OsStrExt as _;
    use std::os::unix::net::{SocketAddr, UnixDatagram};
    let Some(name) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let address = match name.as_bytes().strip_prefix(b"@") {
        Some(abstract_name) => SocketAddr::from_abstract_name(abstract_name),
        None => SocketAddr::from_pathname(&name),
    };
    let sent = address.and_then(|to| UnixDatagram::unbound()?.send_to_addr(what.as_bytes(), &to));
    if let Err(e) = sent {
        log::warn!("the service manager is not told: {e}");
    }
}
