//! `polldisk nbd`: serve one image over NBD until a signal says to stop.

use std::io::Write;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::mpsc::Receiver;
use std::time::Duration;

use ::nbd::{Security, TlsServer};
use anyhow::Context;
use block::DeviceInfo;
use clap::Args;
use nix::sys::signal::Signal;
use node::{Disk, DiskOptions, Door, ExtentSource, NodeSpec, OpenOptions, Parts};
use qcow::open::Format;
use reactor::{Clock, Policy, Start};

use crate::args::AnyFormat;
use crate::ctl::{self, Changes};
use crate::output::usage;

/// How long clients may take to finish what they asked for.
pub(crate) const DRAIN: Duration = Duration::from_secs(10);

/// The port that NBD has by itself.
const NBD_PORT: u16 = 10809;

/// Serve one image over NBD, on a unix socket or an address of a network, until SIGTERM or SIGINT.
#[derive(Args)]
pub(crate) struct Nbd {
    /// Where to listen; a stale socket is replaced, a live one refused.
    #[arg(long, value_name = "PATH", required_unless_present = "listen")]
    socket: Option<PathBuf>,
    /// Listen on an address of a network instead, with TLS unless it is the loopback's; the port is
    /// 10809 if none is given.
    #[arg(long, value_name = "ADDRESS[:PORT]", conflicts_with = "socket", value_parser = address)]
    listen: Option<SocketAddr>,
    /// Speak TLS, and serve nobody without: a folder with ca-cert.pem, server-cert.pem and
    /// server-key.pem, as QEMU and nbdkit have them. Clients need certificates of the same authority.
    #[arg(long, value_name = "DIR", requires = "listen", conflicts_with = "socket")]
    tls_certificates: Option<PathBuf>,
    /// Let clients in that show no certificate.
    #[arg(long, requires = "tls_certificates")]
    tls_any_client: bool,
    /// Listen without TLS on other addresses than the loopback's too.
    #[arg(long, requires = "listen", conflicts_with_all = ["socket", "tls_certificates"])]
    plain_text: bool,
    /// The image's format: qcow2, raw or vhd; vhd only with --read-only.
    #[arg(short, long, default_value = "qcow2", value_parser = crate::args::any_format)]
    format: AnyFormat,
    /// Format of backing files whose image states none.
    #[arg(long, value_name = "FORMAT", value_parser = crate::args::format)]
    backing_format: Option<Format>,
    /// Only open backing files in this folder (may be given several times).
    #[arg(long, value_name = "DIR")]
    allow_backing: Vec<PathBuf>,
    /// Refuse writes; others may read the image at the same time.
    #[arg(short, long)]
    read_only: bool,
    /// Serve an internal snapshot, by its ID or its name, for reading only.
    #[arg(long, value_name = "SNAPSHOT")]
    snapshot: Option<String>,
    /// Write bits of persistent bitmaps to disk before the data that they stand for, so that a crash
    /// does not cost them.
    #[arg(long)]
    durable_bitmaps: bool,
    /// Name of the export; clients that ask for another are refused.
    #[arg(long, default_value = "")]
    export: String,
    /// Listen here for `polldisk ctl`, which changes the image while it is served.
    #[arg(long, value_name = "PATH", conflicts_with_all = ["read_only", "snapshot"])]
    control: Option<PathBuf>,
    #[command(flatten)]
    reactor: crate::args::Reactor,
    /// The image.
    node: String,
}

/// Serves; returns when told to stop and everything is on disk.
pub(crate) fn run(nbd: &Nbd) -> anyhow::Result<u8> {
    let signals = crate::signals::Signals::take()?;
    let spec = NodeSpec::parse(&nbd.node)?;
    let clock = Clock::real();
    let read_only = nbd.read_only || nbd.snapshot.is_some();
    let mut allow = Vec::new();
    for dir in &nbd.allow_backing {
        let found = dir.canonicalize();
        allow.push(found.with_context(|| format!("--allow-backing {}", dir.display()))?);
    }
    let options = OpenOptions {
        writable: !read_only,
        backing_format: nbd.backing_format,
        allow_backing: allow,
        clock: clock.clone(),
        ..OpenOptions::read(nbd.format.chained().unwrap_or(Format::Raw))
    };
    let parts = match nbd.format {
        AnyFormat::Vhd => vhd_parts(nbd, &spec, &options)?,
        AnyFormat::Qcow2 | AnyFormat::Raw => {
            let mut chain = node::open_chain(&spec, &options)?;
            if let Some(snapshot) = &nbd.snapshot {
                chain.show_snapshot(qcow::edit::SnapshotKey::IdOrName(snapshot))?;
            }
            Parts::new(chain)?
        }
    };
    // Until here a signal ends the process, as long as opening and repairing may take.
    let stop = signals.told();
    let policy = nbd.reactor.policy.unwrap_or(Policy::Adaptive);
    let cores = nbd.reactor.each_core()?;
    let reactors = cores.into_iter().map(|cpu| Start { cpu, policy }).collect();
    let image = qcow::run::Options {
        l2_cache: nbd.reactor.l2_cache,
        durable_bitmaps: nbd.durable_bitmaps,
        ..Default::default()
    };
    let disk = Disk::start(parts, DiskOptions { reactors, image }, clock.clone())?;
    let (served, disk) = match &nbd.control {
        None => (serve(nbd, &spec, &disk.door(), disk.info(), None, &stop), disk),
        Some(path) => {
            let (door, info) = (disk.door(), disk.info().clone());
            let changes = Changes::new(disk, clock, options.allow_backing);
            let control = ctl::Server::bind(path, Box::new(ctl::Shared(changes.clone())));
            let served = control.and_then(|control| {
                let served = serve(nbd, &spec, &door, &info, Some(changes.size()), &stop);
                control.shutdown();
                served
            });
            (served, changes.end())
        }
    };
    let closed = disk.close();
    served?;
    closed?;
    Ok(0)
}

/// VHD images are for moving away from: they are read, not written.
fn vhd_parts(nbd: &Nbd, spec: &NodeSpec, options: &OpenOptions) -> anyhow::Result<Parts> {
    if nbd.snapshot.is_some() {
        return usage("--snapshot: vhd images have no internal snapshots");
    }
    if !nbd.read_only {
        return usage(
            "--format vhd: vhd images are not written to; serve it with --read-only, or convert it \
             to qcow2 first (polldisk image convert -f vhd -O qcow2)",
        );
    }
    Ok(Parts::of_vhd(node::open_vhd(spec, options)?)?)
}

/// An address, with NBD's port if it has none.
fn address(text: &str) -> Result<SocketAddr, String> {
    let alone = || text.trim_matches(['[', ']']).parse().map(|ip| SocketAddr::new(ip, NBD_PORT));
    let address = text.parse().or_else(|_| alone());
    address.map_err(|_| "an address like 10.0.0.1:10809 is needed (names are not looked up)".into())
}

/// Who may come over a network. Certificates are read before anything is served.
fn security(nbd: &Nbd) -> anyhow::Result<Security> {
    match &nbd.tls_certificates {
        Some(folder) => Ok(Security::Tls(TlsServer::load(folder, !nbd.tls_any_client)?)),
        None if nbd.plain_text => Ok(Security::Plain),
        None => Ok(Security::Loopback),
    }
}

fn serve(
    nbd: &Nbd,
    spec: &NodeSpec,
    door: &Door,
    info: &DeviceInfo,
    size: Option<Arc<AtomicU64>>,
    stop: &Receiver<Signal>,
) -> anyhow::Result<()> {
    let export = ::nbd::Export {
        name: nbd.export.clone(),
        read_only: nbd.read_only || nbd.snapshot.is_some(),
        size,
        ..export(spec.to_string(), door, info)?
    };
    let server = match (nbd.listen, &nbd.socket) {
        (Some(address), _) => ::nbd::Server::listen(address, security(nbd)?, export)?,
        (None, Some(socket)) => ::nbd::Server::bind(socket, export)?,
        (None, None) => return usage("--socket or --listen says where to listen"),
    };
    let mut out = std::io::stdout();
    match (server.address(), &nbd.socket) {
        (None, Some(socket)) => writeln!(out, "listening on {}", socket.display())?,
        (address, _) => writeln!(out, "listening on {}", address.context("no address")?)?,
    }
    out.flush()?;
    let signal = stop.recv().context("cannot wait for signals")?;
    log::info!("{signal}: stopping");
    let left = server.shutdown(DRAIN);
    if left > 0 {
        log::warn!("{left} clients still had requests in flight after {DRAIN:?}");
    }
    Ok(())
}

/// The default export of a running image, writable if the image is.
pub(crate) fn export(
    description: String,
    door: &Door,
    info: &DeviceInfo,
) -> anyhow::Result<::nbd::Export> {
    let (extents, door) = (ExtentSource::new(door.clone())?, door.clone());
    Ok(::nbd::Export {
        name: String::new(),
        description,
        read_only: false,
        info: info.clone(),
        size: None,
        bitmaps: None,
        attach: Box::new(move |depth, regions| {
            door.open(depth, regions).map_err(|e| e.to_string())
        }),
        extents: Box::new(Extents(extents)),
    })
}

struct Extents(ExtentSource);

impl ::nbd::Extents for Extents {
    fn status(
        &self,
        offset: u64,
        len: u64,
        limit: usize,
    ) -> Result<Vec<::nbd::Extent>, block::Status> {
        let list = self.0.status(offset, len, limit)?;
        let one = |e: node::Extent| ::nbd::Extent { len: e.len, hole: e.hole, zero: e.zero };
        Ok(list.into_iter().map(one).collect())
    }
}
