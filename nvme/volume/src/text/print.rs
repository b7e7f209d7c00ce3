//! Writes text, as short as it is on disk: no indentation, one value a line.

use super::{Body, Node, Value};

/// The text of these nodes.
pub fn print(nodes: &[Node]) -> String {
    let mut text = String::new();
    section(&mut text, nodes);
    text
}

fn section(text: &mut String, nodes: &[Node]) {
    for node in nodes {
        text.push_str(&node.key);
        match &node.body {
            Body::Value(one) => {
                text.push_str(" = ");
                value(text, one);
                text.push('\n');
            }
            Body::Section(nodes) => {
                text.push_str(" {\n");
                section(text, nodes);
                text.push_str("}\n");
            }
        }
    }
}

fn value(text: &mut String, of: &Value) {
    match of {
        Value::Int(number) => text.push_str(&number.to_string()),
        Value::Float(number) => text.push_str(number),
        Value::Text(plain) => {
            text.push('"');
            for c in plain.chars() {
                if matches!(c, '"' | '\\') {
                    text.push('\\');
                }
                text.push(c);
            }
            text.push('"');
        }
        Value::List(list) => {
            text.push('[');
            for (i, one) in list.iter().enumerate() {
                if i > 0 {
                    text.push_str(", ");
                }
                value(text, one);
            }
            text.push(']');
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::parse;
    use super::*;

    #[test]
    fn what_is_read_is_written_again() {
        let text = "vg-0 {\nid = \"a-b\"\nseqno = 3\nempty = []\npart = -1.50\n\
                    tags = [\"a\", \"q\\\"\\\\ä\"]\ninner {\nstripes = [\"pv0\", 0]\n}\n}\nversion = 1\n";
        let nodes = parse(text.as_bytes()).unwrap();
        assert_eq!(print(&nodes), text);
        // Spaces, comments, and a comma at a list's end make no difference.
        let loose = "# x\nvg-0{id=\"a-b\"seqno=3 # seqno = 4\nempty=[ ]part=-1.50\n\
                     tags=[\"a\",\n\"q\\\"\\\\ä\",]inner{stripes=[\"pv0\",0]}}\tversion=1";
        assert_eq!(parse(loose.as_bytes()).unwrap(), nodes);
    }

    #[test]
    fn what_is_not_text_of_ours_is_refused() {
        for wrong in [
            "a",
            "a =",
            "a = b",
            "a { ",
            "a = 1 }",
            "a = 1 a = 2",
            "= 1",
            "a = \"x",
            "a = [1",
            "a = [1 2]",
            "a = [[1]]",
            "a = 0x10",
            "a = 010",
            "a = 1.",
            "a = --1",
            "a = \"\\n\"",
            "a = 99999999999999999999",
            "a = 1\0",
            "\"a\" = 1",
            "a b = 1",
            "{ }",
        ] {
            assert!(parse(wrong.as_bytes()).is_err(), "{wrong:?}");
        }
        assert!(parse(b"a = \"\xff\"").is_err());
        let deep = "a {".repeat(1 << 16);
        assert!(parse(deep.as_bytes()).unwrap_err().to_string().contains("too deep"));
        let many = format!("a = [{}]", "1,".repeat(super::super::MAX_NODES));
        assert!(parse(many.as_bytes()).unwrap_err().to_string().contains("more entries"));
    }
}
