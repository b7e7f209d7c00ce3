//! A drive of this host by the kernel's own driver: the kernel has it for as long as it is asked by fio,
//! and is given it and rid of it by this program's `device` commands, with all that these refuse.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use bench::Error;
use nix::sys::stat::{SFlag, stat};
use node::printable;
use serde_json::Value;

use super::process::{done, done_within};

/// How often the kernel's block device is looked for, and how often the drive is asked back, and how long in
/// between. The kernel's driver looks for namespaces in a thread of its own; then udev looks at what it finds,
/// and a drive that is looked at is in use.
const TRIES: u32 = 100;
const STEP: Duration = Duration::from_millis(100);

/// How long the kernel's driver may take for a drive to come up, or to go.
const DRIVER: Duration = Duration::from_secs(120);

/// A drive that the kernel has for a while. It goes to vfio-pci again in any case.
pub(crate) struct KernelDrive<'a> {
    program: &'a Path,
    address: &'a str,
    given_back: bool,
    /// Its first namespace.
    pub(crate) disk: PathBuf,
    /// Bytes of a block of that.
    pub(crate) block_size: u64,
}

impl<'a> KernelDrive<'a> {
    /// Gives the drive at a PCI address to the kernel.
    ///
    /// # Errors
    /// If it cannot be given, the kernel had it already, or it finds no namespace 1. Then it is as it was.
    pub(crate) fn take(program: &'a Path, address: &'a str) -> Result<KernelDrive<'a>, Error> {
        let (disk, block_size) = (PathBuf::new(), 0);
        let mut drive = KernelDrive { program, address, given_back: true, disk, block_size };
        let said = done_within(drive.device(&["unbind", "--json", address]), DRIVER)?;
        if !said.contains("\"changed\": true") {
            let why = format!("the kernel has {address}: polldisk device bind {address}");
            return Err(Error::Other(why));
        }
        drive.given_back = false;
        for _ in 0..TRIES {
            let list = done(drive.device(&["list", "--json"]))?;
            if let Some((name, block_size)) = namespace(&list, address)? {
                let disk = Path::new("/dev").join(name);
                let kind = stat(&disk).map(|s| s.st_mode & SFlag::S_IFMT.bits());
                if kind == Ok(SFlag::S_IFBLK.bits()) {
                    (drive.disk, drive.block_size) = (disk, block_size);
                    return Ok(drive);
                }
            }
            std::thread::sleep(STEP);
        }
        Err(Error::Other(format!("the kernel finds no namespace 1 on {address}")))
    }

    fn device(&self, words: &[&str]) -> Command {
        let mut command = Command::new(self.program);
        // Not ended half-way by a key that is meant for us.
        command.arg("device").args(words).process_group(0);
        command
    }

    /// Takes it from the kernel again.
    ///
    /// # Errors
    /// If it cannot be had.
    pub(crate) fn give_back(mut self) -> Result<(), Error> {
        self.bind()
    }

    fn bind(&mut self) -> Result<(), Error> {
        let once = || done_within(self.device(&["bind", self.address]), DRIVER);
        let mut bound = once();
        for _ in 1..TRIES {
            if bound.is_ok() {
                break;
            }
            std::thread::sleep(STEP);
            bound = once();
        }
        // Or it was in vain.
        self.given_back = true;
        let address = self.address;
        let failed = |e| Error::Other(format!("{address} is still the kernel's: {e}"));
        bound.map(|_| ()).map_err(failed)
    }
}

impl Drop for KernelDrive<'_> {
    fn drop(&mut self) {
        if !self.given_back
            && let Err(e) = self.bind()
        {
            log::error!("{e}");
        }
    }
}

/// What a drive is that the kernel does not have, in words.
pub(crate) fn describe(program: &Path, address: &str) -> Option<String> {
    let mut command = Command::new(program);
    command.args(["device", "identify", "--json", address]);
    let text = done_within(command, DRIVER).ok()?;
    in_words(text.get(text.find('{')?..)?)
}

fn in_words(json: &str) -> Option<String> {
    let drive: Value = serde_json::from_str(json).ok()?;
    let says = |name: &str| Some(printable(drive[name].as_str()?));
    let (model, firmware) = (says("model")?, says("firmware")?);
    let namespaces = drive["namespaces"].as_array()?;
    let one = namespaces.iter().find(|n| n["nsid"] == 1)?;
    let (size, blocks) = (one["size"].as_u64()?, one["lba-size"].as_u64()?);
    let cache = if drive["cache-enabled"].as_bool()? { "a" } else { "no" };
    let gb = size as f64 / 1e9;
    Some(format!(
        "{model}, firmware {firmware}, {gb:.1} GB in blocks of {blocks} bytes, {cache} volatile cache"
    ))
}

/// Name and block size of a drive's namespace 1, in what `device list --json` says, if it has one by now.
fn namespace(list: &str, address: &str) -> Result<Option<(String, u64)>, Error> {
    let bad = |what: &str| Error::Other(format!("device list: {what}: {}", list.trim()));
    // What is said before the JSON are warnings.
    let json = list.find('[').map_or("", |at| &list[at..]);
    let devices: Vec<Value> = serde_json::from_str(json).map_err(|e| bad(&e.to_string()))?;
    let drive = devices.iter().find(|d| d["address"] == address);
    let drive = drive.ok_or_else(|| bad(&format!("{address} is gone")))?;
    let namespaces = drive["namespaces"].as_array().into_iter().flatten();
    Ok(namespaces
        .filter(|n| n["nsid"] == 1 && n["size"].as_u64().is_some_and(|size| size > 0))
        .find_map(|n| Some((n["name"].as_str()?.to_owned(), n["lba-size"].as_u64()?))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_namespace_is_found_when_it_is_there() {
        let list = |namespaces: &str| {
            format!(
                r#"[{{"address":"0000:01:00.0","namespaces":null}},
                {{"address":"0000:02:00.0","namespaces":{namespaces}}}]"#
            )
        };
        let found = |text: &str| namespace(&list(text), "0000:02:00.0").unwrap();
        assert_eq!(found("null"), None);
        assert_eq!(found("[]"), None);
        // Known by name before anything else.
        assert_eq!(found(r#"[{"nsid":null,"name":"n1","size":null,"lba-size":null}]"#), None);
        assert_eq!(found(r#"[{"nsid":1,"name":"n1","size":0,"lba-size":512}]"#), None);
        let two = r#"[{"nsid":2,"name":"n2","size":8,"lba-size":512},
            {"nsid":1,"name":"n1","size":4096,"lba-size":4096}]"#;
        assert_eq!(found(two), Some(("n1".to_owned(), 4096)));
        let e = namespace(&list("[]"), "0000:03:00.0").unwrap_err().to_string();
        assert!(e.contains("0000:03:00.0 is gone"), "{e}");
        assert!(namespace("nothing", "").is_err());
    }

    #[test]
    fn a_drive_in_words() {
        let json = r#"{"model":"Fast 1","firmware":"7\u001b","cache-enabled":false,
            "namespaces":[{"nsid":1,"size":375083606016,"lba-size":512}]}"#;
        let words = in_words(json).unwrap();
        assert!(words.starts_with("Fast 1, firmware 7") && !words.contains('\x1b'), "{words}");
        assert!(words.ends_with("375.1 GB in blocks of 512 bytes, no volatile cache"), "{words}");
        assert_eq!(in_words("{}"), None);
    }

    #[test]
    fn what_cannot_be_given_is_left_alone() {
        let take = |program| KernelDrive::take(Path::new(program), "0000:01:00.0").map(drop);
        let e = take("/bin/false").unwrap_err().to_string();
        assert!(e.contains("false"), "{e}");
        // It succeeds, and nothing has changed: the drive was the kernel's before.
        let e = take("/bin/echo").unwrap_err().to_string();
        assert!(e.contains("the kernel has 0000:01:00.0"), "{e}");
    }
}
