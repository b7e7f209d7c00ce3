//! [`Fields`]: named texts as tags of LVM2, which hold few kinds of characters and 1,024 of them at most.
//!
//! A field is the tag `pd:NAME=VALUE`; what does not fit goes on in `pd:NAME:1=…`, `pd:NAME:2=…` and so on.
//! In names and values every byte but letters, digits and `_+.-/!&` is written as `#` and two hexadecimal
//! digits. Tags that do not begin with `pd:` are somebody else's and stay.

use std::collections::BTreeMap;

use crate::error::{Result, corrupt, refused};

/// What all of our tags begin with.
const OURS: &str = "pd:";
/// Characters of a tag at most: those of LVM2, less some.
const TAG: usize = 1000;
/// Of an escaped name at most, so that a value has room beside it.
const NAME: usize = 400;
/// Bytes of all fields of one volume at most: a group has one text for all of them.
const ALL: usize = 64 << 10;

/// Named texts.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Fields(BTreeMap<String, String>);

impl Fields {
    /// A field.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }

    /// Sets a field. It may be empty.
    pub fn set(&mut self, name: &str, value: impl Into<String>) {
        self.0.insert(name.to_owned(), value.into());
    }

    /// Takes a field away.
    pub fn unset(&mut self, name: &str) {
        self.0.remove(name);
    }

    /// Fields whose names begin so, with the rest of their names.
    pub fn beginning<'a>(&'a self, with: &'a str) -> impl Iterator<Item = (&'a str, &'a str)> {
        self.0.iter().filter_map(move |(name, value)| Some((name.strip_prefix(with)?, &**value)))
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The fields that stand in tags.
    ///
    /// # Errors
    /// If one of ours is none, or a part is missing.
    pub fn read(tags: &[String]) -> Result<Fields> {
        let mut parts: BTreeMap<(String, usize), String> = BTreeMap::new();
        for tag in tags {
            let Some(rest) = tag.strip_prefix(OURS) else { continue };
            let place = rest.split_once('=').and_then(|(place, value)| {
                let (name, number) = match place.split_once(':') {
                    Some((name, number)) => (name, number.parse().ok().filter(|n| *n > 0)?),
                    None => (place, 0),
                };
                Some(((unescape(name)?, number), value.to_owned()))
            });
            let Some((place, value)) = place else { return corrupt(format!("the tag {tag}")) };
            if parts.insert(place, value).is_some() {
                return corrupt(format!("the tag {tag} is there twice"));
            }
        }
        let mut whole: BTreeMap<String, (usize, String)> = BTreeMap::new();
        for ((name, number), part) in parts {
            let (next, value) = whole.entry(name.clone()).or_default();
            if *next != number {
                return corrupt(format!("a part of the tag pd:{name} is missing"));
            }
            *next += 1;
            value.push_str(&part);
        }
        let mut fields = BTreeMap::new();
        for (name, (_, value)) in whole {
            let Some(value) = unescape(&value) else {
                return corrupt(format!("the tag pd:{name} is damaged"));
            };
            fields.insert(name, value);
        }
        Ok(Fields(fields))
    }

    /// Puts the fields into tags, in the place of those that were ours.
    ///
    /// # Errors
    /// If a name, or all of it, is too long; the tags are as they were then.
    pub fn write(&self, tags: &mut Vec<String>) -> Result<()> {
        let mut ours = Vec::new();
        let mut bytes = 0;
        for (name, value) in &self.0 {
            bytes += name.len() + value.len();
            if bytes > ALL {
                return refused(format!("names and values of more than {ALL} bytes"));
            }
            let escaped = escape(name);
            if escaped.is_empty() || escaped.len() > NAME {
                return refused(format!("the name {name:?} is empty or too long"));
            }
            let value = escape(value);
            let room = TAG - NAME - OURS.len() - 8;
            let mut rest = value.as_str();
            for number in 0.. {
                let (part, more) = rest.split_at(room.min(rest.len()));
                ours.push(match number {
                    0 => format!("{OURS}{escaped}={part}"),
                    _ => format!("{OURS}{escaped}:{number}={part}"),
                });
                rest = more;
                if rest.is_empty() {
                    break;
                }
            }
        }
        tags.retain(|tag| !tag.starts_with(OURS));
        tags.append(&mut ours);
        Ok(())
    }
}

fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"_+.-/!&".contains(&byte) {
            escaped.push(char::from(byte));
        } else {
            escaped.push_str(&format!("#{byte:02x}"));
        }
    }
    escaped
}

/// `None` if it is nothing that [`escape`] makes.
fn unescape(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'#' {
            bytes.push(byte);
            continue;
        }
        let digit = |byte: u8| char::from(byte).to_digit(16);
        let (high, low) = (digit(rest.next()?)?, digit(rest.next()?)?);
        bytes.push((high * 16 + low) as u8);
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_text_comes_back() {
        let mut fields = Fields::default();
        fields.set("plain", "some-thing_1.0/x");
        fields.set("empty", "");
        fields.set("k.a key = of: all\nkinds#", "Grüße \u{1f4be} \0 \"{}\"%");
        fields.set("long", "ä".repeat(3000));
        let mut tags = vec!["theirs".to_owned(), "pd:old=1".to_owned()];
        fields.write(&mut tags).unwrap();
        assert!(tags.contains(&"theirs".to_owned()) && !tags.contains(&"pd:old=1".to_owned()));
        assert!(tags.contains(&"pd:plain=some-thing_1.0/x".to_owned()));
        assert!(tags.contains(&"pd:empty=".to_owned()));
        assert!(tags.len() > 20, "the long one is in parts");
        tags.iter().for_each(|tag| volume::check_tag(tag).unwrap());
        tags.reverse();
        assert_eq!(Fields::read(&tags).unwrap(), fields);
        assert_eq!(fields.beginning("k.").count(), 1);
    }

    #[test]
    fn what_is_too_much_is_refused_and_nothing_is_changed() {
        let mut tags = vec!["pd:old=1".to_owned()];
        for (name, len) in [("", 1), ("x", ALL), (&*"n".repeat(NAME + 1), 1)] {
            let mut fields = Fields::default();
            fields.set(name, "v".repeat(len));
            assert!(fields.write(&mut tags).is_err());
            assert_eq!(tags, ["pd:old=1"]);
        }
    }

    #[test]
    fn damaged_tags_are_told_of() {
        for tags in [
            &["pd:x"][..],
            &["pd:x=#4"],
            &["pd:x=#ff"],
            &["pd:x:1=late"],
            &["pd:x=1", "pd:x:2=3"],
            &["pd:x=1", "pd:#78=2"],
            &["pd:x:0=1"],
            &["pd:x:y=1"],
        ] {
            let tags: Vec<String> = tags.iter().map(|tag| (*tag).to_owned()).collect();
            assert!(Fields::read(&tags).is_err(), "{tags:?}");
        }
    }
}
