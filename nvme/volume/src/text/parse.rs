//! Reads text. Hostile text: memory is bounded by [`MAX_NODES`], recursion by [`MAX_DEPTH`].

use std::collections::HashSet;

use super::{Body, Node, Value};
use crate::error::{Result, corrupt};

/// Most nodes and values in one text.
pub const MAX_NODES: usize = 1 << 20;
/// How deep sections stand in each other; LVM's are four deep.
const MAX_DEPTH: usize = 8;

/// Whether a character may stand in a name.
pub(super) fn of_name(c: u8) -> bool {
    c.is_ascii_alphanumeric() || b"_-.+/#:".contains(&c)
}

/// Reads a text.
///
/// # Errors
/// If it is not as LVM writes it; the message has the line.
pub fn parse(text: &[u8]) -> Result<Vec<Node>> {
    let mut parser = Parser { text, at: 0, line: 1, nodes: 0 };
    if let Err(error) = std::str::from_utf8(text) {
        return parser.wrong(&format!("no UTF-8 at byte {}", error.valid_up_to()));
    }
    let nodes = parser.nodes(0)?;
    match parser.peek()? {
        None => Ok(nodes),
        Some(_) => parser.wrong("a closing brace too many"),
    }
}

struct Parser<'a> {
    text: &'a [u8],
    at: usize,
    line: usize,
    nodes: usize,
}

impl Parser<'_> {
    fn wrong<T>(&self, what: &str) -> Result<T> {
        corrupt(format!("metadata, line {}: {what}", self.line))
    }

    /// Counts one more thing that takes memory.
    fn count(&mut self) -> Result<()> {
        self.nodes += 1;
        if self.nodes > MAX_NODES { self.wrong("more entries than are read here") } else { Ok(()) }
    }

    /// The next character that is not a space or in a comment.
    fn peek(&mut self) -> Result<Option<u8>> {
        while let Some(&c) = self.text.get(self.at) {
            match c {
                b'\n' => self.line += 1,
                b' ' | b'\t' | b'\r' => {}
                b'#' => {
                    let rest = &self.text[self.at..];
                    self.at += rest.iter().position(|&c| c == b'\n').unwrap_or(rest.len());
                    continue;
                }
                0 => return self.wrong("a zero byte"),
                c => return Ok(Some(c)),
            }
            self.at += 1;
        }
        Ok(None)
    }

    fn eat(&mut self, wanted: u8) -> Result<bool> {
        let there = self.peek()? == Some(wanted);
        self.at += usize::from(there);
        Ok(there)
    }

    fn expect(&mut self, wanted: u8) -> Result<()> {
        match self.eat(wanted)? {
            true => Ok(()),
            false => self.wrong(&format!("`{}` is missing", char::from(wanted))),
        }
    }

    /// Characters from here on as long as `is`.
    fn run(&mut self, is: impl Fn(u8) -> bool) -> String {
        let rest = &self.text[self.at..];
        let len = rest.iter().position(|&c| !is(c)).unwrap_or(rest.len());
        self.at += len;
        // Only characters of ASCII are taken.
        String::from_utf8_lossy(&rest[..len]).into_owned()
    }

    fn nodes(&mut self, depth: usize) -> Result<Vec<Node>> {
        if depth > MAX_DEPTH {
            return self.wrong("sections stand too deep in each other");
        }
        let mut nodes = Vec::new();
        let mut names = HashSet::new();
        while !matches!(self.peek()?, None | Some(b'}')) {
            self.count()?;
            let key = self.run(of_name);
            if key.is_empty() {
                return self.wrong("a name is missing");
            }
            if !names.insert(key.clone()) {
                return self.wrong(&format!("a second `{key}`"));
            }
            let body = if self.eat(b'{')? {
                let inner = self.nodes(depth + 1)?;
                self.expect(b'}')?;
                Body::Section(inner)
            } else {
                self.expect(b'=')?;
                Body::Value(self.value()?)
            };
            nodes.push(Node { key, body });
        }
        Ok(nodes)
    }

    fn value(&mut self) -> Result<Value> {
        if !self.eat(b'[')? {
            return self.single();
        }
        let mut list = Vec::new();
        while !self.eat(b']')? {
            list.push(self.single()?);
            if !self.eat(b',')? {
                self.expect(b']')?;
                break;
            }
        }
        Ok(Value::List(list))
    }

    fn single(&mut self) -> Result<Value> {
        self.count()?;
        match self.peek()? {
            Some(b'"') => self.text().map(Value::Text),
            Some(b'-' | b'0'..=b'9') => self.number(),
            _ => self.wrong("neither a number nor a text"),
        }
    }

    fn number(&mut self) -> Result<Value> {
        let word = self.run(|c| c.is_ascii_digit() || c == b'-' || c == b'.');
        let digits = word.strip_prefix('-').unwrap_or(&word);
        let right = |part: &str| !part.is_empty() && part.bytes().all(|c| c.is_ascii_digit());
        match digits.split_once('.') {
            Some((whole, part)) if right(whole) && right(part) => Ok(Value::Float(word)),
            // A zero in front would mean another number to LVM's tools.
            None if right(digits) && (digits == "0" || !digits.starts_with('0')) => {
                match word.parse() {
                    Ok(number) => Ok(Value::Int(number)),
                    Err(_) => self.wrong("a number that is too large"),
                }
            }
            _ => self.wrong("a number that is not one"),
        }
    }

    fn text(&mut self) -> Result<String> {
        self.at += 1;
        let mut text = Vec::new();
        loop {
            let Some(&c) = self.text.get(self.at) else {
                return self.wrong("a text without an end");
            };
            self.at += 1;
            self.line += usize::from(c == b'\n');
            match c {
                b'"' => break,
                b'\\' => match self.text.get(self.at) {
                    Some(&c @ (b'"' | b'\\')) => {
                        text.push(c);
                        self.at += 1;
                    }
                    _ => return self.wrong("a backslash that stands for nothing"),
                },
                0 => return self.wrong("a zero byte"),
                c => text.push(c),
            }
        }
        match String::from_utf8(text) {
            Ok(text) => Ok(text),
            Err(_) => self.wrong("a text that is not UTF-8"),
        }
    }
}
