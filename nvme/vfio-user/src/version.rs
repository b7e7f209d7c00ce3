//! Version negotiation: the numbers, and the capabilities as JSON (section "VFIO_USER_VERSION").

use serde_json::{Map, Value, json};

use crate::Error;
use crate::wire::MAX_DATA;

/// Most bytes of a VERSION message that are read; what others send is a tenth of it.
const MAX: usize = 4096;

const MAJOR: u16 = 0;

/// Descriptors that are taken with one message.
pub(crate) const MAX_FDS: usize = 8;

/// Memory windows that a server takes from its client.
pub(crate) const MAX_MAPS: usize = 256;

/// What one side says of itself.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Offer {
    pub(crate) minor: u16,
    /// Most bytes of a data transfer.
    pub(crate) max_data: usize,
    /// Most descriptors in a message.
    pub(crate) max_fds: usize,
    /// Names of all capabilities that were given.
    names: Vec<String>,
}

/// What we can do, of which `wanted` is named.
fn encode(minor: u16, wanted: impl Fn(&str) -> bool) -> Vec<u8> {
    let ours = [
        ("max_msg_fds", json!(MAX_FDS)),
        ("max_data_xfer_size", json!(MAX_DATA)),
        ("max_dma_maps", json!(MAX_MAPS)),
        ("pgsizes", json!(4096)),
    ];
    let named = ours.into_iter().filter(|(name, _)| wanted(name));
    let capabilities: Map<String, Value> = named.map(|(n, v)| (n.to_owned(), v)).collect();
    let mut out = Vec::from(MAJOR.to_le_bytes());
    out.extend(minor.to_le_bytes());
    out.extend(json!({ "capabilities": capabilities }).to_string().into_bytes());
    out.push(0);
    out
}

/// What a client proposes.
pub(crate) fn propose() -> Vec<u8> {
    // How many windows a server takes is not the client's to say.
    encode(0, |name| name != "max_dma_maps")
}

/// What a server answers: of what it can do, what the client named.
pub(crate) fn answer(theirs: &Offer) -> Vec<u8> {
    encode(0, |name| theirs.names.iter().any(|n| n == name))
}

/// Reads what the other side sent. What is not named has the specification's default.
pub(crate) fn decode(body: &[u8]) -> Result<Offer, Error> {
    let Some((numbers, text)) = body.split_first_chunk::<4>() else {
        return Error::protocol("a VERSION message without a version");
    };
    let [major, minor] = [[numbers[0], numbers[1]], [numbers[2], numbers[3]]];
    let (major, minor) = (u16::from_le_bytes(major), u16::from_le_bytes(minor));
    if major != MAJOR {
        return Error::protocol(format!("version {major}.{minor}; {MAJOR}.x is spoken here"));
    }
    let mut offer = Offer { minor, max_data: MAX_DATA, max_fds: 1, names: Vec::new() };
    if text.len() > MAX {
        return Error::protocol(format!("{} bytes of version data", text.len()));
    }
    let text = text.strip_suffix(&[0]).unwrap_or(text);
    if text.is_empty() {
        return Ok(offer);
    }
    let value: Value = match serde_json::from_slice(text) {
        Ok(value) => value,
        Err(e) => return Error::protocol(format!("version data: {e}")),
    };
    let Some(capabilities) = value.get("capabilities") else { return Ok(offer) };
    let Some(capabilities) = capabilities.as_object() else {
        return Error::protocol("\"capabilities\" is no object");
    };
    let number = |name: &str, default: usize, least: u64| match capabilities.get(name) {
        None => Ok(default),
        Some(v) => match v.as_u64().filter(|&n| n >= least) {
            Some(n) => Ok(usize::try_from(n).unwrap_or(usize::MAX)),
            None => Error::protocol(format!("{name} {v}")),
        },
    };
    // Registers of 8 bytes must fit.
    offer.max_data = number("max_data_xfer_size", MAX_DATA, 8)?.min(MAX_DATA);
    offer.max_fds = number("max_msg_fds", 1, 0)?;
    offer.names = capabilities.keys().cloned().collect();
    Ok(offer)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(text: &str) -> Vec<u8> {
        let mut m = vec![0, 0, 1, 0];
        m.extend(text.bytes());
        m.push(0);
        m
    }

    #[test]
    fn both_sides_agree() {
        let theirs = decode(&propose()).unwrap();
        assert_eq!((theirs.minor, theirs.max_data, theirs.max_fds), (0, MAX_DATA, MAX_FDS));
        let back = decode(&answer(&theirs)).unwrap();
        assert_eq!(back, theirs);
    }

    #[test]
    fn an_answer_names_only_what_was_proposed() {
        let text = r#"{"capabilities":{"max_msg_fds":3,"migration":{"pgsize":4096},"twin_socket":{"supported":true}}}"#;
        let theirs = decode(&message(text)).unwrap();
        assert_eq!((theirs.minor, theirs.max_fds), (1, 3));
        let ours = answer(&theirs);
        let json: Value = serde_json::from_slice(&ours[4..ours.len() - 1]).unwrap();
        assert_eq!(json, json!({ "capabilities": { "max_msg_fds": MAX_FDS } }));
        assert_eq!(ours.last(), Some(&0));
    }

    #[test]
    fn defaults() {
        for text in ["", "{}", r#"{"capabilities":{}}"#] {
            let offer = decode(&message(text)).unwrap();
            assert_eq!((offer.max_data, offer.max_fds), (1 << 20, 1));
        }
        assert!(decode(&[0, 0, 0, 0]).is_ok(), "no version data at all");
    }

    #[test]
    fn nonsense_is_refused() {
        let deep = "[".repeat(3000);
        let long = format!("{{\"x\":\"{}\"}}", "y".repeat(MAX));
        for bad in [
            "x",
            "{",
            r#"{"capabilities":1}"#,
            r#"{"capabilities":{"max_data_xfer_size":0}}"#,
            r#"{"capabilities":{"max_data_xfer_size":-1}}"#,
            r#"{"capabilities":{"max_msg_fds":"8"}}"#,
            deep.as_str(),
            long.as_str(),
        ] {
            assert!(matches!(decode(&message(bad)), Err(Error::Protocol(_))), "{bad}");
        }
        assert!(decode(&[0, 0, 0]).is_err());
        assert!(decode(&[1, 0, 0, 0]).is_err(), "another major version");
        assert!(decode(&[0, 0, 0, 0, 0xff, 0xfe, 0]).is_err(), "no UTF-8");
    }
}
