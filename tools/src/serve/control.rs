//! What the daemon's control socket answers to.

use std::sync::Arc;

use anyhow::Context;
use serde::Deserialize;
use serde_json::{Value, json};

use super::devices::Devices;
use super::figures::{Figures, Vbd};
use super::images::{Images, Wanted};
use super::repositories::Repositories;
use crate::ctl::rpc::{Failure, INVALID_PARAMS, Service};
use crate::ctl::{Shared, parse};

/// The service.
pub(crate) struct Control {
    pub(crate) images: Arc<Images>,
    pub(crate) repositories: Arc<Repositories>,
    /// `None` where there is no Xen.
    pub(crate) devices: Option<Arc<Devices>>,
}

/// A method of the toolstack's interface.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Method {
    method: String,
    args: Value,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Named {
    name: String,
}

impl Service for Control {
    fn call(&self, method: &str, params: &Value) -> Result<Value, Failure> {
        match method {
            "attach" => {
                let wanted: Wanted = parse(params)?;
                let name = wanted.name().to_owned();
                self.images.attach(wanted).with_context(|| name.clone())?;
                Ok(json!({"name": name}))
            }
            "detach" => {
                let named: Named = parse(params)?;
                self.images.detach(&named.name)?;
                Ok(json!({}))
            }
            "smapiv3" => {
                let asked: Method = parse(params)?;
                let answer = self.repositories.call(&self.images, &asked.method, &asked.args);
                if asked.method == "Volume.resize"
                    && let (Some(sr), Some(key)) =
                        (text(&asked.args, "sr"), text(&asked.args, "key"))
                {
                    self.resized(&format!("{sr}/{key}"));
                }
                Ok(answer)
            }
            "list" => Ok(json!({
                "images": self.images.list(),
                "devices": self.devices(),
            })),
            "stats" => {
                let mut stats = Figures::of(&self.images, self.devices.as_deref()).as_json();
                stats["devices"] = self.devices();
                Ok(stats)
            }
            _ => self.of_image(method, params),
        }
    }
}

impl Control {
    fn devices(&self) -> Value {
        let list = self.devices.iter().flat_map(|devices| devices.list());
        list.map(|vbd: Vbd| vbd.as_json()).collect()
    }

    /// What is done to one image: its name goes with the parameters.
    fn of_image(&self, method: &str, params: &Value) -> Result<Value, Failure> {
        let invalid = |message: &str| Failure { code: INVALID_PARAMS, message: message.to_owned() };
        let mut params = params.clone();
        let name = params.as_object_mut().and_then(|p| p.remove("image"));
        let name = name.as_ref().and_then(Value::as_str);
        let name = name.ok_or_else(|| invalid("which image is meant (ctl --image NAME)?"))?;
        let changes = self.images.changes(name);
        let changes = changes.ok_or_else(|| invalid(&format!("there is no image {name:?}")))?;
        let disk = self.images.disk(name);
        if disk.is_some() && !MAY.contains(&method) {
            let why = "is a disk of a repository, which would not know of that: use the toolstack";
            return Err(invalid(&format!("{name:?} {why}")));
        }
        let result = Shared(changes).call(method, &params)?;
        if let (Some(disk), "limit") = (disk, method) {
            let number = |key| params.get(key).and_then(Value::as_u64).unwrap_or(0);
            disk.set_limits(&self.repositories, number("iops"), number("bandwidth"))?;
        }
        if method == "resize" {
            self.resized(name);
        }
        Ok(result)
    }

    /// The guests of an image are told its size.
    fn resized(&self, image: &str) {
        if let Some(devices) = &self.devices {
            devices.resized(image);
        }
    }
}

/// What may be done to disks of repositories: nothing in their images changes by it.
const MAY: [&str; 5] = ["chain", "jobs", "cancel", "limit", "snapshot-internal-list"];

fn text<'a>(args: &'a Value, name: &str) -> Option<&'a str> {
    args.get(name)?.as_str()
}
