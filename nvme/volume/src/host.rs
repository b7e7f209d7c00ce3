//! [`HostIds`]: the names by which the LVM of this host tells its own groups from those of others.
//! Found in the host's files, so that no tool of LVM need be there. For whoever opens or makes a
//! group, on a control thread.

use std::collections::HashMap;
use std::io::Read;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result, refused};
use crate::model::Vg;

/// Most bytes that are read of a configuration.
const MAX_FILE: u64 = 4 << 20;
/// Longest system ID.
const MAX_ID: usize = 128;

/// The system IDs of a host (lvmsystemid(7)).
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct HostIds {
    /// The one that LVM's tools on this host go by; `None`: they have none, which is how they come.
    pub lvm: Option<String>,
    /// Further ones that they accept (`local/extra_system_ids`).
    pub extra: Vec<String>,
    /// `/etc/machine-id`, which is what a group is given where LVM's tools go by nothing.
    pub machine: Option<String>,
    /// LVM's tools have an ID of a kind that cannot be computed here; this is the kind.
    pub unknown: Option<String>,
}

impl HostIds {
    /// Those of the host that this program runs on. Environment `LVM_SYSTEM_DIR` stands for
    /// `/etc/lvm`, as it does for LVM's tools.
    ///
    /// # Errors
    /// If a file is there and cannot be read.
    pub fn of_this_host() -> Result<HostIds> {
        let folder = std::env::var_os("LVM_SYSTEM_DIR").map_or("/etc/lvm".into(), PathBuf::from);
        HostIds::read(Path::new("/"), &folder)
    }

    /// Those of the host whose files are below `root`, and whose configuration of LVM is in a folder.
    ///
    /// # Errors
    /// If a file is there and cannot be read.
    pub fn read(root: &Path, folder: &Path) -> Result<HostIds> {
        let mut settings = HashMap::new();
        for name in ["lvm.conf", "lvmlocal.conf"] {
            if let Some(text) = file(&folder.join(name))? {
                read_settings(&text, &mut settings);
            }
        }
        let value = |key: &str| settings.get(key).and_then(|v: &Vec<String>| v.first()).cloned();
        let machine = file(&root.join("etc/machine-id"))?.and_then(|text| {
            let text = text.trim();
            let right = text.len() == 32 && text.bytes().all(|c| c.is_ascii_hexdigit());
            right.then(|| text.to_owned())
        });
        let mut ids = HostIds {
            extra: settings.get("local/extra_system_ids").cloned().unwrap_or_default(),
            machine,
            ..HostIds::default()
        };
        let source = value("global/system_id_source").unwrap_or_default();
        let said = match source.as_str() {
            "lvmlocal" => value("local/system_id"),
            "machineid" => ids.machine.clone(),
            "uname" => file(&root.join("proc/sys/kernel/hostname"))?,
            "file" => match value("global/system_id_file") {
                Some(path) => file(Path::new(&path))?.and_then(|text| {
                    let mut lines = text.lines().map(str::trim);
                    lines.find(|l| !l.is_empty() && !l.starts_with('#')).map(str::to_owned)
                }),
                None => None,
            },
            "" | "none" => None,
            kind => {
                ids.unknown = Some(kind.to_owned());
                None
            }
        };
        ids.lvm = said.and_then(|text| as_lvm_takes_it(&text));
        Ok(ids)
    }

    /// The ID that a new group is given.
    pub fn own(&self) -> Option<&str> {
        match self.unknown {
            None => self.lvm.as_deref().or(self.machine.as_deref()),
            Some(_) => None,
        }
    }

    /// The ID by which this host may use a group: the group's, if it is one of ours; else
    /// [`HostIds::own`].
    pub fn matching(&self, vg: &Vg) -> Option<&str> {
        let all = self.lvm.iter().chain(&self.extra).chain(&self.machine);
        all.map(String::as_str).find(|id| vg.system_id.as_deref() == Some(id)).or(self.own())
    }
}

/// Whether a group may be given this system ID.
///
/// # Errors
/// If not; the message says what is possible.
pub fn check_system_id(id: &str) -> Result<()> {
    match as_lvm_takes_it(id).is_some_and(|taken| taken == id) {
        true => Ok(()),
        false => refused(format!(
            "`{id}` is no system ID: letters, digits and . _ - + are possible, {MAX_ID} at most; it \
             begins with a letter or digit, and not with `localhost`"
        )),
    }
}

/// Leaves out what LVM's tools leave out.
fn as_lvm_takes_it(text: &str) -> Option<String> {
    let of_id = |c: &char| c.is_ascii_alphanumeric() || "._-+".contains(*c);
    let begin = text.trim_start_matches(|c: char| !c.is_ascii_alphanumeric());
    let id: String = begin.trim_end().chars().filter(of_id).take(MAX_ID).collect();
    (!id.is_empty() && !id.starts_with("localhost")).then_some(id)
}

fn file(path: &Path) -> Result<Option<String>> {
    let failed = |error| Error::Refused(format!("{}: {error}", path.display()));
    let file = match std::fs::File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(error)),
    };
    let mut bytes = Vec::new();
    file.take(MAX_FILE).read_to_end(&mut bytes).map_err(failed)?;
    Ok(Some(String::from_utf8_lossy(&bytes).into_owned()))
}

/// A part of a configuration.
enum Token {
    Mark(char),
    Word(String),
    Text(String),
}

/// Takes note of all settings, by their full names. An administrator's file: what is not understood
/// is passed over, since all but a few settings are of no use here.
fn read_settings(text: &str, settings: &mut HashMap<String, Vec<String>>) {
    let mut sections: Vec<String> = Vec::new();
    let mut word: Option<String> = None;
    let mut key: Option<String> = None;
    let mut in_list = false;
    for token in tokens(text) {
        match token {
            Token::Mark('{') => sections.extend(word.take()),
            Token::Mark('}') => {
                sections.pop();
                key = None;
            }
            Token::Mark('=') => {
                let name = word.take().unwrap_or_default();
                let path = sections.iter().map(String::as_str).chain([name.as_str()]);
                let path = path.collect::<Vec<_>>().join("/");
                settings.insert(path.clone(), Vec::new());
                key = Some(path);
            }
            Token::Mark('[') => in_list = true,
            Token::Mark(']') => (in_list, key) = (false, None),
            Token::Mark(_) => {}
            Token::Word(value) | Token::Text(value) => match key.take() {
                Some(path) => {
                    settings.entry(path.clone()).or_default().push(value);
                    key = in_list.then_some(path);
                }
                None => word = Some(value),
            },
        }
    }
}

fn tokens(text: &str) -> Vec<Token> {
    let mut chars = text.chars().peekable();
    let mut tokens = Vec::new();
    while let Some(c) = chars.next() {
        match c {
            '#' => while chars.next_if(|&c| c != '\n').is_some() {},
            '"' | '\'' => {
                let mut value = String::new();
                while let Some(next) = chars.next().filter(|&next| next != c) {
                    let escaped = c == '"' && next == '\\';
                    value.extend(if escaped { chars.next() } else { Some(next) });
                }
                tokens.push(Token::Text(value));
            }
            '{' | '}' | '=' | '[' | ']' | ',' => tokens.push(Token::Mark(c)),
            c if c.is_whitespace() => {}
            c => {
                let mut value = String::from(c);
                let of_word = |&c: &char| !c.is_whitespace() && !"{}=[],\"'#".contains(c);
                while let Some(c) = chars.next_if(of_word) {
                    value.push(c);
                }
                tokens.push(Token::Word(value));
            }
        }
    }
    tokens
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The IDs of a host with this configuration.
    fn ids(conf: &str, local: &str) -> HostIds {
        let root = tempfile::tempdir().unwrap();
        for (name, text) in [
            ("etc/machine-id", "0123456789abcdef0123456789abcdef\n"),
            ("proc/sys/kernel/hostname", "my-host.lan\n"),
            ("etc/lvm/lvm.conf", conf),
            ("etc/lvm/lvmlocal.conf", local),
            ("id", "# the ID\n\nfrom-file\nmore\n"),
        ] {
            let path = root.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text.replace("ROOT", root.path().to_str().unwrap())).unwrap();
        }
        HostIds::read(root.path(), &root.path().join("etc/lvm")).unwrap()
    }

    #[test]
    fn the_id_is_the_one_that_the_tools_go_by() {
        let machine = "0123456789abcdef0123456789abcdef";
        for (conf, local, lvm, own) in [
            ("", "", None, Some(machine)),
            ("global { system_id_source = \"none\" }", "", None, Some(machine)),
            ("# global { system_id_source = \"uname\" }", "", None, Some(machine)),
            ("global { system_id_source = \"uname\" }", "", Some("my-host.lan"), None),
            ("global/system_id_source=\"uname\"", "", Some("my-host.lan"), None),
            ("global { system_id_source = machineid }", "", Some(machine), None),
            (
                "global{system_id_source=\"lvmlocal\"}",
                "local { system_id = \"a b\" }",
                Some("ab"),
                None,
            ),
            ("global{system_id_source=\"lvmlocal\"}", "", None, Some(machine)),
            (
                "devices { filter = [ \"a|/dev/x}|\", 'r|.*|' ] }\nglobal {\n units = \"h\" # }\n\
                 system_id_source = \"file\"\nsystem_id_file = \"ROOT/id\"\n}",
                "",
                Some("from-file"),
                None,
            ),
            (
                "global { system_id_source = \"lvmlocal\" } local { system_id = \"-localhost2\" }",
                "",
                None,
                Some(machine),
            ),
        ] {
            let ids = ids(conf, local);
            assert_eq!(ids.lvm.as_deref(), lvm, "{conf} {local}");
            assert_eq!(ids.own(), lvm.or(own), "{conf} {local}");
        }
        let ids = ids(
            "global { system_id_source = \"appmachineid\" }",
            "local { extra_system_ids = [ \"a\", \"b\" ] }",
        );
        assert_eq!((ids.own(), ids.extra.len()), (None, 2));
        assert_eq!(ids.unknown.as_deref(), Some("appmachineid"));
    }

    #[test]
    fn what_is_no_system_id_is_refused() {
        for id in ["a", "0.b_c-d+e", &"x".repeat(128)] {
            check_system_id(id).unwrap();
        }
        for id in ["", "-a", "a b", "a/b", "localhost", "ä", &"x".repeat(129)] {
            assert!(check_system_id(id).is_err(), "{id}");
        }
    }
}
