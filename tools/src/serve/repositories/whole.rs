//! The methods of a repository as a whole: `SR.*`.

use std::sync::Arc;

use node::Source;
use serde::Deserialize;
use serde_json::{Value, json};
use sr::{NewRepository, Repository, Stat};

use crate::volume::{claim, contents};

use super::disks::answer;
use super::fault::Fault;
use super::{
    Attached, Configuration, DEVICE, Repositories, STRIPES, author, close, host, nodes, open, parse,
};

#[derive(Deserialize)]
struct Create {
    uuid: String,
    configuration: Configuration,
    name: String,
    description: String,
}

#[derive(Deserialize)]
struct Configured {
    configuration: Configuration,
}

#[derive(Deserialize)]
struct Named {
    sr: String,
}

#[derive(Deserialize)]
struct NewName {
    sr: String,
    new_name: String,
}

#[derive(Deserialize)]
struct NewDescription {
    sr: String,
    new_description: String,
}

fn device(configuration: &Configuration) -> String {
    configuration.get(DEVICE).cloned().unwrap_or_default()
}

fn stat(stat: &Stat, datasources: &[String]) -> Value {
    json!({
        "sr": stat.id,
        "uuid": stat.id,
        "name": stat.name,
        "description": stat.description,
        "free_space": stat.free,
        "total_space": stat.total,
        "datasources": datasources,
        "clustered": false,
        "health": ["Healthy", ""],
    })
}

impl Repositories {
    pub(super) fn of_repository(&self, method: &str, args: &Value) -> Result<Value, Fault> {
        match method {
            "create" => create(&parse(args)?),
            "probe" => self.probe(&parse(args)?),
            "attach" => self.attach(&parse(args)?),
            "detach" => self.detach(&parse::<Named>(args)?.sr),
            "destroy" => self.destroy(&parse::<Named>(args)?.sr),
            "stat" => {
                let attached = self.attached(&parse::<Named>(args)?.sr)?;
                let found = attached.repository.lock().stat();
                Ok(stat(&found, &self.datasources))
            }
            "ls" => {
                let attached = self.attached(&parse::<Named>(args)?.sr)?;
                let repository = attached.repository.lock();
                let id = repository.stat().id;
                Ok(repository.list().map(|(disk, node)| answer(&id, disk, node)).collect())
            }
            "set_name" => {
                let new: NewName = parse(args)?;
                self.set(&new.sr, Some(&new.new_name), None)
            }
            "set_description" => {
                let new: NewDescription = parse(args)?;
                self.set(&new.sr, None, Some(&new.new_description))
            }
            _ => Err(Fault::unimplemented(&format!("SR.{method}"))),
        }
    }

    fn set(&self, sr: &str, name: Option<&str>, description: Option<&str>) -> Result<Value, Fault> {
        self.attached(sr)?.repository.lock().set_texts(name, description, &author())?;
        Ok(Value::Null)
    }

    fn attach(&self, args: &Configured) -> Result<Value, Fault> {
        Ok(json!(self.attach_by(&device(&args.configuration))?))
    }

    /// Of what is not attached as well: it must never fail for that.
    fn detach(&self, sr: &str) -> Result<Value, Fault> {
        let attached = self.take_out(sr)?;
        self.forget(sr)?;
        if let Some(attached) = attached {
            attached.close()?;
        }
        Ok(Value::Null)
    }

    fn destroy(&self, sr: &str) -> Result<Value, Fault> {
        self.attached(sr)?;
        let attached = self.take_out(sr)?;
        let attached = attached.ok_or_else(|| Fault::of("Sr_not_attached", sr))?;
        if attached.repository.lock().has_volumes() {
            self.put_back(sr, Arc::new(attached));
            return Err(Fault::other(format!("repository {sr} has volumes: destroy them first")));
        }
        self.forget(sr)?;
        let Attached { repository, devices, .. } = attached;
        drop(repository.into_inner().remove()?);
        devices.close()?;
        Ok(Value::Null)
    }

    /// What is on the devices of a configuration, without changing anything.
    fn probe(&self, args: &Configured) -> Result<Value, Fault> {
        let device = device(&args.configuration);
        let attached = self.all.lock().values().find(|a| a.device == device).cloned();
        let found = match attached {
            Some(attached) => Some(attached.repository.lock().stat()),
            None => look(open(&nodes(&device)?, false)?)?,
        };
        let Some(found) = found else { return Ok(json!([])) };
        let mut configuration = args.configuration.clone();
        configuration.insert("sr_uuid".to_owned(), found.id.clone());
        Ok(json!([{
            "configuration": configuration,
            "complete": true,
            "sr": stat(&found, &self.datasources),
            "extra_info": {},
        }]))
    }
}

/// The repository that all of the devices are, if they are one.
fn look(mut sources: Vec<Source>) -> Result<Option<Stat>, Fault> {
    for source in &mut sources {
        if sr::probe(source)?.is_none() {
            close(sources)?;
            return Ok(None);
        }
    }
    let repository = Repository::look(sources)?;
    let found = repository.stat();
    close(repository.into_devices())?;
    Ok(Some(found))
}

fn create(args: &Create) -> Result<Value, Fault> {
    let stripes = args.configuration.get(STRIPES).map_or("1", String::as_str);
    let stripes = stripes.parse();
    let Ok(stripes) = stripes else {
        return Err(Fault::other(format!("{STRIPES}: the number of devices that share a volume")));
    };
    let host = host()?;
    let Some(system_id) = host.own() else {
        return Err(Fault::other(
            "this host has no system ID, by which others would know that the repository is not theirs: \
             systemd-machine-id-setup makes one (lvmsystemid(7))"
                .to_owned(),
        ));
    };
    let new = NewRepository {
        id: args.uuid.clone(),
        name: args.name.clone(),
        description: args.description.clone(),
        stripes,
        system_id: Some(system_id.to_owned()),
    };
    let device = device(&args.configuration);
    let nodes = nodes(&device)?;
    let failed = |e: anyhow::Error| Fault::other(crate::output::explain(&e));
    // The kernel must not use them either, by a file system or device-mapper.
    let _claims = claim(&nodes).map_err(failed)?;
    let mut sources = open(&nodes, true)?;
    let mut held = Vec::new();
    for (node, source) in nodes.iter().zip(&mut sources) {
        held.extend(contents(&node.to_string(), source).map_err(failed)?);
    }
    if !held.is_empty() {
        let what = held.join("; ");
        return Err(Fault::other(format!(
            "{what}. Nothing was changed; if what is there may be lost, empty the device (wipefs -a)"
        )));
    }
    let repository = Repository::create(sources, &new, &author())?;
    close(repository.into_devices())?;
    Ok(json!(args.configuration))
}
