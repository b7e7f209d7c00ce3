//! [`Repositories`]: the storage repositories of the daemon, and what the toolstack's plugins ask of them:
//! the methods of the interface SMAPIv3 by their names, with its arguments and answers (xapi-project/xen-api,
//! ocaml/xapi-storage). On the threads of the control socket; one repository by one of them at a time.

mod attached;
mod changed;
mod coalesce;
mod data;
mod datapath;
mod disks;
mod fault;
mod growth;
mod place;
mod whole;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;

use node::{NodeSpec, OpenOptions, Source, open_source};
use qcow::open::Format;
use reactor::sync::Mutex;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use volume::HostIds;

use super::images::Images;
use super::mirrors::{Mirrors, Reach};
use crate::nbd::DRAIN;
use crate::volume::author;
use attached::Attached;
pub(super) use coalesce::Coalescer;
use fault::Fault;
pub(super) use growth::Growth;
pub(super) use place::Place;

/// What a repository's devices are called in its configuration (xapi's device-config).
const DEVICE: &str = "device";
const STRIPES: &str = "stripes";

/// The type of repositories, and the scheme of their disks' addresses.
pub(crate) const TYPE: &str = "fast";

/// All that are attached, by their UUID, which is also the handle that the toolstack gets.
pub(crate) struct Repositories {
    /// Where the daemon's files are, that do not outlive the host.
    run: PathBuf,
    all: Mutex<BTreeMap<String, Arc<Attached>>>,
    /// The domains that have a disk activated, by the name of its image. Locked while images are opened
    /// and closed for that.
    active: Mutex<BTreeMap<String, BTreeSet<String>>>,
    /// The images whose volumes grow, by their names.
    watched: Mutex<BTreeMap<String, Arc<growth::Watched>>>,
    /// Where rrdd finds figures: addresses of files in memory.
    datasources: Vec<String>,
    mirrors: Mirrors,
    /// Servers for connections that are handed over, by the names of their images.
    imports: Mutex<BTreeMap<String, ::nbd::Server>>,
    /// What bitmaps for NBD clients take.
    bitmaps: Arc<changed::Budget>,
}

type Configuration = BTreeMap<String, String>;

/// Arguments that every method has beside its own: what they say of the call itself is not used.
fn parse<T: DeserializeOwned>(args: &Value) -> Result<T, Fault> {
    T::deserialize(args).map_err(|e| Fault::other(format!("arguments: {e}")))
}

/// The names by which this host has groups.
fn host() -> Result<HostIds, Fault> {
    HostIds::of_this_host().map_err(|e| Fault::from(sr::Error::from(e)))
}

/// The devices of a repository, as its configuration names them.
fn nodes(device: &str) -> Result<Vec<NodeSpec>, Fault> {
    let nodes = device.split(',').map(str::trim).filter(|node| !node.is_empty());
    let nodes: Result<Vec<NodeSpec>, node::Error> = nodes.map(NodeSpec::parse).collect();
    let nodes = nodes.map_err(|e| Fault::other(e.to_string()))?;
    match nodes.is_empty() {
        true => Err(Fault::other(format!("device-config has no `{DEVICE}`: a node, or several"))),
        false => Ok(nodes),
    }
}

/// Opens devices by themselves: locked to write to them, or as they are to look at them.
fn open(nodes: &[NodeSpec], writable: bool) -> Result<Vec<Source>, Fault> {
    let options = match writable {
        true => OpenOptions::write(Format::Raw),
        false => OpenOptions { force_share: true, ..OpenOptions::read(Format::Raw) },
    };
    let sources: Result<_, node::Error> = nodes.iter().map(|n| open_source(n, &options)).collect();
    sources.map_err(|e| Fault::other(e.to_string()))
}

/// Ends the use of devices in order.
fn close(sources: Vec<Source>) -> Result<(), Fault> {
    sources.into_iter().try_for_each(Source::close).map_err(|e| Fault::other(e.to_string()))
}

impl Repositories {
    /// None, of a daemon whose files are in this folder. `rrd` is the name of a file with figures for rrdd, if
    /// there is one: the toolstack has rrdd read it once a repository is attached.
    pub(crate) fn new(run: PathBuf, rrd: Option<&str>) -> Repositories {
        let datasources = rrd.map(|uid| format!("xeno+shm:///{uid}")).into_iter().collect();
        let (all, active, watched) = Default::default();
        let (mirrors, imports, bitmaps) = Default::default();
        Repositories { run, all, active, watched, datasources, mirrors, imports, bitmaps }
    }

    /// The same, whose disks may be mirrored so far.
    pub(crate) fn reaching(self, reach: Reach) -> Repositories {
        Repositories { mirrors: Mirrors::new(reach), ..self }
    }

    /// An image is about to be closed: nothing may use it any more.
    pub(crate) fn before_close(&self, image: &str) {
        self.mirrors.stop(image);
        self.end_import(image);
    }

    /// Cuts off whose connections were handed over.
    fn end_import(&self, image: &str) {
        let import = self.imports.lock().remove(image);
        import.map(|server| server.shutdown(DRAIN));
    }

    /// Carries out a method: `{"result": …}`, or `{"error": {"code", "params"}}` as the toolstack wants it.
    pub(crate) fn call(&self, images: &Images, method: &str, args: &Value) -> Value {
        let result = match method.split_once('.') {
            Some(("SR", method)) => self.of_repository(method, args),
            Some(("Volume", method)) => self.of_disk(images, method, args),
            Some(("Data", method)) => self.data(images, method, args),
            Some(("Datapath", method)) => self.datapath(images, method, args),
            _ => Err(Fault::unimplemented(method)),
        };
        match result {
            Ok(result) => json!({ "result": result }),
            Err(fault) => {
                log::info!("{method}: {fault}");
                json!({ "error": fault.as_json() })
            }
        }
    }

    /// Lets go of all, which the next daemon takes up.
    pub(crate) fn close_all(&self) {
        for sr in self.names() {
            let closed = self.take_out(&sr);
            let closed = closed.and_then(|attached| attached.map_or(Ok(()), Attached::close));
            if let Err(fault) = closed {
                log::warn!("repository {sr}: {fault}");
                self.all.lock().remove(&sr);
            }
        }
    }
}
