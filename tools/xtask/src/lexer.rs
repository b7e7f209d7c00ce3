//! Tells code, comments and strings of a Rust source apart, line by line, just well enough for the
//! house checks. Pure; called by `tidy`.

/// One line: its code with strings emptied, and the text of its comments.
#[derive(Default, Debug, PartialEq, Eq)]
pub(crate) struct Line {
    pub(crate) code: String,
    pub(crate) comment: String,
}

enum State {
    Code,
    LineComment,
    /// Depth, because block comments nest.
    BlockComment(u32),
    /// A string with escapes.
    Text,
    /// A raw string that ends with a quote and so many `#`.
    Raw(usize),
}

/// Splits a source text.
pub(crate) fn split(source: &str) -> Vec<Line> {
    let chars: Vec<char> = source.chars().collect();
    let mut lines = vec![Line::default()];
    let mut state = State::Code;
    let mut at = 0;
    while let Some(&here) = chars.get(at) {
        let next = chars.get(at + 1).copied().unwrap_or('\0');
        if here == '\n' {
            if matches!(state, State::LineComment) {
                state = State::Code;
            }
            lines.push(Line::default());
            at += 1;
            continue;
        }
        let last = lines.len() - 1;
        let line = &mut lines[last];
        let mut step = 1;
        match state {
            State::Code => match (here, next) {
                ('/', '/') => state = State::LineComment,
                ('/', '*') => (state, step) = (State::BlockComment(1), 2),
                ('"', _) => {
                    line.code.push('"');
                    state = State::Text;
                }
                ('r', '"' | '#') if starts_literal(&line.code) => {
                    let hashes = chars[at + 1..].iter().take_while(|char| **char == '#').count();
                    if chars.get(at + 1 + hashes) == Some(&'"') {
                        line.code.push('"');
                        (state, step) = (State::Raw(hashes), hashes + 2);
                    } else {
                        line.code.push(here);
                    }
                }
                ('\'', _) => {
                    step = char_literal(&chars[at..]);
                    line.code.push('\'');
                }
                _ => line.code.push(here),
            },
            State::LineComment => line.comment.push(here),
            State::BlockComment(depth) => match (here, next) {
                ('*', '/') if depth == 1 => (state, step) = (State::Code, 2),
                ('*', '/') => (state, step) = (State::BlockComment(depth - 1), 2),
                ('/', '*') => (state, step) = (State::BlockComment(depth + 1), 2),
                _ => line.comment.push(here),
            },
            State::Text => match here {
                // A backslash at the end of a line must not swallow the line break.
                '\\' if next != '\n' => step = 2,
                '"' => state = State::Code,
                _ => {}
            },
            State::Raw(hashes) => {
                let closes = here == '"'
                    && chars[at + 1..].iter().take(hashes).filter(|char| **char == '#').count()
                        == hashes;
                if closes {
                    (state, step) = (State::Code, hashes + 1);
                }
            }
        }
        at += step;
    }
    lines
}

/// Whether an `r` after `code` can start a raw string: it is not the end of a longer name.
fn starts_literal(code: &str) -> bool {
    let before = code.strip_suffix(['b', 'c']).unwrap_or(code);
    !before.ends_with(|char: char| char.is_alphanumeric() || char == '_')
}

/// Length of the character literal at the start of `chars`; 1 for a lifetime's quote.
fn char_literal(chars: &[char]) -> usize {
    match chars {
        ['\'', '\\', _, rest @ ..] => {
            rest.iter().take_while(|char| **char != '\'' && **char != '\n').count() + 4
        }
        ['\'', _, '\'', ..] => 3,
        _ => 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn code(source: &str) -> Vec<String> {
        split(source).into_iter().map(|line| line.code).collect()
    }

    #[test]
    fn strings_and_comments_are_no_code() {
        assert_eq!(code("a(\"unsafe \\\" {\"); // unsafe"), ["a(\"); "]);
        assert_eq!(code("x /* a /* b */ unsafe */ y"), ["x  y"]);
        assert_eq!(code("r#\"unsafe \" \"# + br\"x\" + for r in y"), ["\" + b\" + for r in y"]);
        assert_eq!(code("\"one \\\n two\"; z"), ["\"", "; z"]);
        assert_eq!(code("tr#x"), ["tr#x"]);
        assert_eq!(
            split("f() // note\n").first().map(|line| line.comment.as_str()),
            Some("/ note")
        );
    }

    #[test]
    fn character_literals_and_lifetimes() {
        assert_eq!(code("'\"' + '\\'' + '\\u{22}' + &'a str"), ["' + ' + ' + &'a str"]);
        assert_eq!(code("b'\\\\' x"), ["b' x"]);
        assert_eq!(code("match c { '/' => \"//\", _ => 'x' }"), ["match c { ' => \", _ => ' }"]);
    }
}
