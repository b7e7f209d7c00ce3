//! The text that metadata is: sections and values, as LVM's tools read and write them. Knows no
//! meaning; [`crate::model`] has that. What is read can be written again without loss, or is refused.

mod parse;
mod print;

pub use parse::{MAX_NODES, parse};
pub use print::print;

use crate::error::{Result, corrupt};

/// A value.
#[derive(Clone, PartialEq, Debug)]
pub enum Value {
    /// A number.
    Int(i64),
    /// A number with a point, as it was written.
    Float(String),
    /// Text.
    Text(String),
    /// Numbers and texts; no lists.
    List(Vec<Value>),
}

/// A named value or section.
#[derive(Clone, PartialEq, Debug)]
pub struct Node {
    /// Its name.
    pub key: String,
    /// What it is.
    pub body: Body,
}

/// What a node is.
#[derive(Clone, PartialEq, Debug)]
pub enum Body {
    /// A value.
    Value(Value),
    /// A section of nodes with different names.
    Section(Vec<Node>),
}

impl Node {
    /// A named value.
    pub fn value(key: &str, value: Value) -> Node {
        Node { key: key.to_owned(), body: Body::Value(value) }
    }

    /// A number. None that is stored is as large as half of what the type holds.
    pub fn int(key: &str, number: u64) -> Node {
        Node::value(key, Value::Int(i64::try_from(number).unwrap_or(i64::MAX)))
    }

    /// A text.
    pub fn text(key: &str, text: &str) -> Node {
        Node::value(key, Value::Text(text.to_owned()))
    }

    /// A list of texts.
    pub fn texts(key: &str, texts: &[String]) -> Node {
        Node::value(key, Value::List(texts.iter().cloned().map(Value::Text).collect()))
    }

    /// A section.
    pub fn section(key: &str, nodes: Vec<Node>) -> Node {
        Node { key: key.to_owned(), body: Body::Section(nodes) }
    }
}

/// The nodes of a section, taken out one by one by those who know them; what is left at the end is
/// what nobody knows.
#[derive(Debug)]
pub(crate) struct Fields {
    /// Which section, for messages.
    pub(crate) of: String,
    nodes: Vec<Node>,
}

impl Fields {
    pub(crate) fn new(of: String, nodes: Vec<Node>) -> Fields {
        Fields { of, nodes }
    }

    fn remove(&mut self, key: &str) -> Option<Body> {
        let at = self.nodes.iter().position(|node| node.key == key)?;
        Some(self.nodes.remove(at).body)
    }

    fn wrong<T>(&self, key: &str, what: &str) -> Result<T> {
        corrupt(format!("metadata: `{key}` of {} is {what}", self.of))
    }

    /// A number that may be missing, from 0 to `max`.
    pub(crate) fn int_or_none(&mut self, key: &str, max: u64) -> Result<Option<u64>> {
        match self.remove(key) {
            None => Ok(None),
            Some(Body::Value(Value::Int(n))) => match u64::try_from(n).ok().filter(|&n| n <= max) {
                Some(n) => Ok(Some(n)),
                None => self.wrong(key, &format!("{n}, not from 0 to {max}")),
            },
            Some(_) => self.wrong(key, "not a number"),
        }
    }

    pub(crate) fn int(&mut self, key: &str, max: u64) -> Result<u64> {
        match self.int_or_none(key, max)? {
            Some(n) => Ok(n),
            None => self.wrong(key, "missing"),
        }
    }

    pub(crate) fn text_or_none(&mut self, key: &str) -> Result<Option<String>> {
        match self.remove(key) {
            None => Ok(None),
            Some(Body::Value(Value::Text(text))) => Ok(Some(text)),
            Some(_) => self.wrong(key, "not a text"),
        }
    }

    pub(crate) fn text(&mut self, key: &str) -> Result<String> {
        match self.text_or_none(key)? {
            Some(text) => Ok(text),
            None => self.wrong(key, "missing"),
        }
    }

    /// A list of texts; one alone may stand without brackets. A missing one is empty.
    pub(crate) fn texts(&mut self, key: &str) -> Result<Vec<String>> {
        let list = match self.remove(key) {
            None => Vec::new(),
            Some(Body::Value(Value::List(list))) => list,
            Some(Body::Value(one)) => vec![one],
            Some(Body::Section(_)) => return self.wrong(key, "a section"),
        };
        let mut texts = Vec::with_capacity(list.len());
        for value in list {
            match value {
                Value::Text(text) => texts.push(text),
                _ => return self.wrong(key, "not a list of texts"),
            }
        }
        Ok(texts)
    }

    pub(crate) fn list(&mut self, key: &str) -> Result<Vec<Value>> {
        match self.remove(key) {
            Some(Body::Value(Value::List(list))) => Ok(list),
            _ => self.wrong(key, "not a list"),
        }
    }

    /// A section that may be missing.
    pub(crate) fn section(&mut self, key: &str) -> Result<Option<Vec<Node>>> {
        match self.remove(key) {
            None => Ok(None),
            Some(Body::Section(nodes)) => Ok(Some(nodes)),
            Some(_) => self.wrong(key, "not a section"),
        }
    }

    /// The sections that are left, in order.
    pub(crate) fn sections(&mut self) -> Vec<(String, Vec<Node>)> {
        let mut sections = Vec::new();
        for node in std::mem::take(&mut self.nodes) {
            match node.body {
                Body::Section(nodes) => sections.push((node.key, nodes)),
                Body::Value(_) => self.nodes.push(node),
            }
        }
        sections
    }

    /// The values that are left. A section that is left is one that nobody knows.
    pub(crate) fn rest(self) -> Result<Vec<Node>> {
        match self.nodes.iter().find(|node| matches!(node.body, Body::Section(_))) {
            Some(node) => crate::error::unsupported(format!("`{}` in {} is", node.key, self.of)),
            None => Ok(self.nodes),
        }
    }
}
