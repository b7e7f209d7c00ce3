//! The methods of `Data.*`: mirrors of disks that guests write to ([`crate::serve::mirrors`]).

use serde::Deserialize;
use serde_json::{Value, json};

use super::datapath::of_uri;
use super::fault::Fault;
use super::{Repositories, parse};
use crate::serve::images::Images;

/// How long an answer to `stat` waits while nothing has happened: the toolstack asks without a pause.
const STAT: std::time::Duration = std::time::Duration::from_millis(100);

#[derive(Deserialize)]
struct Mirror {
    uri: String,
    domain: String,
    remote: String,
}

/// `["MirrorV1", KEY]`.
#[derive(Deserialize)]
struct Operation {
    operation: (String, String),
}

fn operation(key: &str) -> Value {
    json!(["MirrorV1", key])
}

impl Repositories {
    pub(super) fn data(&self, images: &Images, method: &str, args: &Value) -> Result<Value, Fault> {
        match method {
            "mirror" => return self.mirror(images, &parse(args)?),
            "ls" => {
                let keys = self.mirrors.keys();
                return Ok(keys.iter().map(|key| operation(key)).collect());
            }
            "stat" | "cancel" | "destroy" => {}
            _ => return Err(Fault::unimplemented(&format!("Data.{method}"))),
        }
        let Operation { operation: (kind, key) } = parse(args)?;
        if !kind.eq_ignore_ascii_case("MirrorV1") {
            return Err(Fault::unimplemented(&format!("Data.{method} of {kind}")));
        }
        let ended = match method {
            "stat" => {
                let mut state = self.mirrors.stat(&key, &images.keep)?;
                if !state.complete && state.failed.is_none() {
                    std::thread::sleep(STAT);
                    state = self.mirrors.stat(&key, &images.keep)?;
                }
                return Ok(json!({
                    "failed": state.failed.is_some(),
                    "complete": state.complete && state.failed.is_none(),
                    "progress": state.progress,
                }));
            }
            "cancel" => self.mirrors.cancel(&key, &images.keep)?,
            _ => self.mirrors.destroy(&key, &images.keep)?,
        };
        // A disk that nobody had was opened for it alone.
        if let Some((image, domain)) = ended
            && let Some((sr, key)) = image.split_once('/')
        {
            self.deactivate(images, sr, key, &domain)?;
        }
        Ok(Value::Null)
    }

    fn mirror(&self, images: &Images, args: &Mirror) -> Result<Value, Fault> {
        let (sr, key) = of_uri(&args.uri)?;
        let place = self.place(sr, key)?;
        let name = place.name();
        let clock = images.reactors().clock();
        // First, as it takes its time.
        let remote = self.mirrors.connect(&args.remote, clock)?;
        // Who reads it for the toolstack may come by another name than who has it.
        let others: Vec<String> = {
            let active = self.active.lock();
            let domains = active.get(&name).into_iter().flatten();
            domains.filter(|d| !self.mirrors.is_alone(&name, d)).cloned().collect()
        };
        let domain = match others.as_slice() {
            [only] => only,
            _ => &args.domain,
        };
        let has = self.active.lock().get(&name).is_some_and(|d| d.contains(domain));
        if !has && !others.is_empty() {
            let whose = others.join(", ");
            let why =
                format!("{name} is active for {whose}, not for {domain}: whose end is its end?");
            return Err(Fault::other(why));
        }
        if !has {
            self.activate(images, &place, domain)?;
        }
        // Nobody closes the image meanwhile.
        let active = self.active.lock();
        let started = match images.image(&name) {
            Some(image) => self.mirrors.start(&image, domain, !has, remote, clock, &images.keep),
            None => Err(anyhow::anyhow!("{name} was closed meanwhile")),
        };
        drop(active);
        if started.is_err() && !has {
            self.deactivate(images, sr, key, domain)?;
        }
        Ok(operation(&started?))
    }
}
