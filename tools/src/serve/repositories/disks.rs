//! The methods of disks and snapshots: `Volume.*`.

use serde::Deserialize;
use serde_json::{Value, json};
use sr::{Disk, NewDisk, Node, Text};

use super::fault::Fault;
use super::{Repositories, TYPE, author, parse};
use crate::serve::images::Images;

#[derive(Deserialize)]
struct Create {
    sr: String,
    name: String,
    description: String,
    size: u64,
    sharable: bool,
}

/// Arguments of all other methods.
#[derive(Deserialize)]
struct Args {
    sr: String,
    key: String,
    /// Of a revert.
    snapshot: Option<String>,
    k: Option<String>,
    v: Option<String>,
    new_name: Option<String>,
    new_description: Option<String>,
}

/// What is said of a disk.
pub(super) fn answer(sr: &str, disk: &Disk, node: &Node) -> Value {
    json!({
        "key": disk.key,
        "uuid": disk.key,
        "name": disk.name,
        "description": disk.description,
        "read_write": !disk.read_only,
        "sharable": disk.sharable,
        "virtual_size": node.size,
        "physical_utilisation": node.used,
        "uri": [format!("{TYPE}://{sr}/{}", disk.key)],
        "keys": disk.keys,
        "volume_type": ["Data", null],
        "cbt_enabled": false,
    })
}

fn wanted<'a>(value: &'a Option<String>, name: &str) -> Result<&'a str, Fault> {
    value.as_deref().ok_or_else(|| Fault::other(format!("arguments: `{name}` is missing")))
}

impl Repositories {
    pub(super) fn of_disk(
        &self,
        _images: &Images,
        method: &str,
        args: &Value,
    ) -> Result<Value, Fault> {
        let author = author();
        if method == "create" {
            let args: Create = parse(args)?;
            let attached = self.attached(&args.sr)?;
            let mut repository = attached.repository.lock();
            let Create { sr, name, description, size, sharable } = args;
            let key =
                repository.create_disk(&NewDisk { name, description, size, sharable }, &author)?;
            let (disk, node) = repository.disk(&key)?;
            return Ok(answer(&sr, disk, node));
        }
        let args: Args = parse(args)?;
        let attached = self.attached(&args.sr)?;
        let mut repository = attached.repository.lock();
        let shown = match method {
            "stat" => args.key.clone(),
            "snapshot" => repository.snapshot(&args.key, &author)?,
            "clone" => repository.clone_disk(&args.key, &author)?,
            "destroy" => {
                if let Ok((_, node)) = repository.disk(&args.key) {
                    let id = repository.group().vg().lv(&node.lv).map_err(sr::Error::from)?.id;
                    if attached.devices.is_used(id) {
                        return Err(Fault::in_use(&args.key));
                    }
                }
                match repository.destroy(&args.key, &author) {
                    // The toolstack destroys some twice.
                    Ok(()) | Err(sr::Error::NoDisk(_)) => {}
                    Err(error) => return Err(error.into()),
                }
                repository.discard();
                return Ok(Value::Null);
            }
            "revert" => {
                repository.revert(wanted(&args.snapshot, "snapshot")?, &args.key, &author)?;
                repository.discard();
                return Ok(Value::Null);
            }
            "set" => {
                let (k, v) = (wanted(&args.k, "k")?, wanted(&args.v, "v")?);
                repository.set_key(&args.key, k, Some(v), &author)?;
                return Ok(Value::Null);
            }
            "unset" => {
                repository.set_key(&args.key, wanted(&args.k, "k")?, None, &author)?;
                return Ok(Value::Null);
            }
            "set_name" => {
                let name = wanted(&args.new_name, "new_name")?;
                repository.set_text(&args.key, Text::Name, name, &author)?;
                return Ok(Value::Null);
            }
            "set_description" => {
                let text = wanted(&args.new_description, "new_description")?;
                repository.set_text(&args.key, Text::Description, text, &author)?;
                return Ok(Value::Null);
            }
            _ => return Err(Fault::unimplemented(&format!("Volume.{method}"))),
        };
        let (disk, node) = repository.disk(&shown)?;
        Ok(answer(&args.sr, disk, node))
    }
}
