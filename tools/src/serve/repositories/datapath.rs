//! The methods of the datapath: `Datapath.*`. A disk's image is open while a domain has it activated, or a
//! device of a guest uses it. All of them may be called again, and in the wrong order.

use std::collections::btree_map::Entry;

use serde::Deserialize;
use serde_json::{Value, json};

use super::fault::Fault;
use super::place::{DiskPlace, is_key};
use super::{Repositories, TYPE, parse};
use crate::serve::images::{Images, Wanted};

#[derive(Deserialize)]
struct Args {
    uri: String,
    domain: Option<String>,
}

impl Repositories {
    pub(super) fn datapath(
        &self,
        images: &Images,
        method: &str,
        args: &Value,
    ) -> Result<Value, Fault> {
        let args: Args = parse(args)?;
        let domain = || {
            let domain = args.domain.as_deref();
            domain.ok_or_else(|| Fault::other("arguments: `domain` is missing".to_owned()))
        };
        let (sr, key) = of_uri(&args.uri)?;
        match method {
            "attach" => {
                domain()?;
                let place = self.place(sr, key)?;
                self.implementations(&place)
            }
            "activate" | "activate_readonly" => {
                let place = self.place(sr, key)?;
                self.activate(images, &place, domain()?)
            }
            "import_activate" => {
                let place = self.place(sr, key)?;
                self.import(images, &place, domain()?)
            }
            "deactivate" => self.deactivate(images, sr, key, domain()?),
            // Nothing is held for it.
            "detach" => Ok(Value::Null),
            _ => Err(Fault::unimplemented(&format!("Datapath.{method}"))),
        }
    }

    /// A disk that there is.
    pub(super) fn place(&self, sr: &str, key: &str) -> Result<DiskPlace, Fault> {
        let attached = self.attached(sr)?;
        if attached.repository.lock().disk(key)?.1.record.is_some() {
            return Err(Fault::other(format!("the data of {key} was destroyed")));
        }
        let device = attached.device.clone();
        Ok(DiskPlace { sr: sr.to_owned(), key: key.to_owned(), device })
    }

    /// The repository that a disk is in, which is attached if it is not: a guest's device may be there
    /// before the toolstack asks for anything.
    pub(super) fn of_place(
        &self,
        place: &DiskPlace,
    ) -> anyhow::Result<std::sync::Arc<super::Attached>> {
        let sr = self.attach_by(&place.device)?;
        if sr != place.sr {
            anyhow::bail!("{}: repository {sr} is there, not {}", place.device, place.sr);
        }
        Ok(self.attached(&sr)?)
    }

    /// How the image of a disk is opened. Whoever opens it, it is the same.
    pub(super) fn wanted(&self, place: &DiskPlace) -> Result<Wanted, Fault> {
        let attached = self.attached(&place.sr)?;
        let repository = attached.repository.lock();
        let (disk, _) = repository.disk(&place.key)?;
        let nbd = self.run.join("nbd").join(&place.key);
        Ok(Wanted::disk(&place.to_string(), place.name(), disk.read_only, nbd, &place.key))
    }

    fn implementations(&self, place: &DiskPlace) -> Result<Value, Fault> {
        let wanted = self.wanted(place)?;
        let socket = self.run.join("nbd").join(&place.key);
        let socket = socket.display().to_string();
        let text = serde_json::to_string(&wanted).map_err(|e| Fault::other(e.to_string()))?;
        let mut implementations = vec![json!(["XenDisk", {
            // One word: nobody else's.
            "params": format!("polldisk:{}", place.name()),
            "extra": {"polldisk": text},
            "backend_type": "qdisk",
        }])];
        // The toolstack's form has no place for a colon in it.
        if !socket.contains(':') {
            let uri = format!("nbd:unix:{socket}:exportname={}", place.key);
            implementations.push(json!(["Nbd", { "uri": uri }]));
        }
        Ok(json!({ "implementations": implementations }))
    }

    /// Activates a disk, for clients whose connections are handed over on a socket; returns its path.
    fn import(&self, images: &Images, place: &DiskPlace, domain: &str) -> Result<Value, Fault> {
        self.activate(images, place, domain)?;
        let name = place.name();
        let folder = self.run.join("import");
        let path = folder.join(&place.key);
        // Nobody closes the image meanwhile.
        let _active = self.active.lock();
        let mut imports = self.imports.lock();
        if let Entry::Vacant(free) = imports.entry(name) {
            let name = free.key();
            let image = images.image(name);
            let image =
                image.ok_or_else(|| Fault::other(format!("{name} was closed meanwhile")))?;
            std::fs::create_dir_all(&folder)
                .map_err(|e| Fault::other(format!("{}: {e}", folder.display())))?;
            let export = ::nbd::Export {
                name: place.key.clone(),
                size: Some(image.changes.size()),
                ..crate::nbd::export(name.clone(), &image.door, &image.info())?
            };
            let server = ::nbd::Server::bind_passing(&path, export).map_err(anyhow::Error::from)?;
            free.insert(server);
        }
        Ok(json!(path.display().to_string()))
    }

    pub(super) fn activate(
        &self,
        images: &Images,
        place: &DiskPlace,
        domain: &str,
    ) -> Result<Value, Fault> {
        let wanted = self.wanted(place)?;
        let mut active = self.active.lock();
        let sockets = self.run.join("nbd");
        std::fs::create_dir_all(&sockets)
            .map_err(|e| Fault::other(format!("{}: {e}", sockets.display())))?;
        let has = active.get(&place.name()).is_some_and(|domains| domains.contains(domain));
        // What was opened for a mirror is the toolstack's as well from now on.
        self.mirrors.take_alone(&place.name(), Some(domain));
        if !has {
            images.hold(wanted)?;
            active.entry(place.name()).or_default().insert(domain.to_owned());
        }
        Ok(Value::Null)
    }

    pub(super) fn deactivate(
        &self,
        images: &Images,
        sr: &str,
        key: &str,
        domain: &str,
    ) -> Result<Value, Fault> {
        let name = format!("{sr}/{key}");
        // Nobody has it after this but for mirrors.
        let last = {
            let active = self.active.lock();
            let mut domains = active.get(&name).into_iter().flatten();
            domains.all(|d| d == domain || self.mirrors.is_alone(&name, d))
        };
        if last && self.mirrors.is_trusted(&name) {
            images.cut_off(&name)?;
            self.end_import(&name);
        }
        // What a copy elsewhere lacks goes there before anybody may go on with that.
        self.mirrors.finish(&name, domain, last, &images.keep)?;
        let mut active = self.active.lock();
        let alone = self.mirrors.take_alone(&name, (!last).then_some(domain));
        if let Some(domains) = active.get_mut(&name) {
            domains.remove(domain);
            domains.retain(|d| !alone.contains(d));
            if !domains.is_empty() {
                return Ok(Value::Null);
            }
            active.remove(&name);
        }
        images.let_go(&name)?;
        Ok(Value::Null)
    }
}

/// Repository and key of a disk's address.
pub(super) fn of_uri(uri: &str) -> Result<(&str, &str), Fault> {
    let parts = uri.strip_prefix(TYPE).and_then(|rest| rest.strip_prefix("://"));
    let parts = parts.and_then(|rest| rest.split_once('/'));
    let parts = parts.filter(|(sr, key)| is_key(sr) && is_key(key));
    parts.ok_or_else(|| Fault::other(format!("{uri:?} is no {TYPE}://REPOSITORY/DISK")))
}
