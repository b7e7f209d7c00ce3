//! [`Fault`]: an error as the toolstack wants it: a code that it knows, and texts.

use std::fmt;

use serde_json::{Value, json};

use crate::serve::images::is_in_use;

const NO_DISK: &str = "Volume_does_not_exist";

/// Why a method failed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Fault {
    code: String,
    params: Vec<String>,
}

impl Fault {
    /// One of the interface's own, which have one text each.
    pub(super) fn of(code: &str, what: &str) -> Fault {
        Fault { code: code.to_owned(), params: vec![what.to_owned()] }
    }

    pub(super) fn in_use(key: &str) -> Fault {
        let why = format!("{key} is in use: deactivate it first");
        Fault::numbered(24, "VDIInUse", why)
    }

    /// What a daemon that died has left of a disk is not in its image, and would be missed later.
    pub(super) fn not_put_in(key: &str) -> Fault {
        Fault::other(format!(
            "changes of {key} that a daemon that died has left cannot be put into its image (see the log): \
             activate it once, then again"
        ))
    }

    pub(super) fn cannot_resize(why: String) -> Fault {
        Fault::numbered(110, "VDISize", why)
    }

    /// Whether it is that there is no such disk.
    pub(super) fn is_no_disk(&self) -> bool {
        self.code == NO_DISK
    }

    pub(super) fn unimplemented(method: &str) -> Fault {
        Fault::of("Unimplemented", method)
    }

    /// An error of the backend without a number of its own.
    pub(super) fn other(why: String) -> Fault {
        Fault { code: "SR_BACKEND_FAILURE".to_owned(), params: vec!["polldisk".to_owned(), why] }
    }

    /// One with a number, as storage managers have used them for long.
    fn numbered(number: u32, name: &str, why: String) -> Fault {
        let code = format!("SR_BACKEND_FAILURE_{number}");
        Fault { code, params: vec![name.to_owned(), why] }
    }

    pub(super) fn as_json(&self) -> Value {
        json!({
            "code": self.code,
            "params": self.params,
            "backtrace": {"error": self.to_string(), "files": [], "lines": []},
        })
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.code, self.params.join(": "))
    }
}

impl std::error::Error for Fault {}

impl From<anyhow::Error> for Fault {
    fn from(error: anyhow::Error) -> Fault {
        let why = crate::output::explain(&error);
        match error.downcast::<Fault>() {
            Ok(fault) => fault,
            Err(error) if is_in_use(&error) => Fault::numbered(24, "VDIInUse", why),
            Err(_) => Fault::other(why),
        }
    }
}

impl From<node::Error> for Fault {
    fn from(error: node::Error) -> Fault {
        let why = error.to_string();
        match error {
            node::Error::InUse { .. } => Fault::numbered(24, "VDIInUse", why),
            _ => Fault::other(why),
        }
    }
}

impl From<sr::Error> for Fault {
    fn from(error: sr::Error) -> Fault {
        let why = error.to_string();
        match error {
            sr::Error::NoDisk(key) => Fault::of(NO_DISK, &key),
            sr::Error::NoChanges { .. } => Fault::numbered(460, "CBTChangedBlocksError", why),
            sr::Error::NoRepository(_) => Fault::of("SR_does_not_exist", &why),
            sr::Error::Group(volume::Error::NoSpace { .. }) => {
                Fault::numbered(44, "SRNoSpace", why)
            }
            _ => Fault::other(why),
        }
    }
}
