//! Jinja text → tokens, with the white space rules that `transformers` sets: `trim_blocks`, `lstrip_blocks`, one trailing
//! newline dropped.

use super::failure::{Refusal, refuse};
use super::python::{is_space, trim_end};

/// One token and the line it begins on.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Token {
    pub line: u32,
    pub kind: Kind,
}

#[derive(Clone, Debug, PartialEq)]
pub(super) enum Kind {
    /// Text outside of all tags.
    Data(String),
    /// `{{`
    PrintBegin,
    /// `}}`
    PrintEnd,
    /// `{%`
    BlockBegin,
    /// `%}`
    BlockEnd,
    Name(String),
    Text(String),
    Int(i128),
    Float(f64),
    Op(&'static str),
    End,
}

/// Two-letter operators come first, so that the longest one wins.
const OPERATORS: [&str; 26] = [
    "//", "**", "==", "!=", ">=", "<=", "+", "-", "/", "*", "%", "~", "[", "]", "(", ")", "{", "}", ">", "<", "=", ".",
    ":", "|", ",", ";",
];

/// Cuts `source` into tokens, the last one [`Kind::End`].
///
/// # Errors
/// What Jinja would not read, and names or escapes outside of ASCII that Python treats in its own way.
pub(super) fn tokenize(source: &str) -> Result<Vec<Token>, Refusal> {
    let mut text = source.replace("\r\n", "\n").replace('\r', "\n");
    if text.ends_with('\n') {
        text.pop();
    }
    let mut lexer = Lexer { text: &text, at: 0, line: 1, counted: 0, at_line_start: true, tokens: Vec::new() };
    while lexer.at < text.len() {
        lexer.outside()?;
    }
    lexer.push(Kind::End);
    Ok(lexer.tokens)
}

struct Lexer<'s> {
    text: &'s str,
    at: usize,
    /// The line of byte `counted`; moves with it.
    line: u32,
    counted: usize,
    /// Does the last match end with a newline? Then `lstrip_blocks` sees the start of a line.
    at_line_start: bool,
    tokens: Vec<Token>,
}

impl<'s> Lexer<'s> {
    fn rest(&self) -> &'s str {
        &self.text[self.at..]
    }

    fn line_at(&mut self, offset: usize) -> u32 {
        self.line += self.text[self.counted..offset].bytes().filter(|&byte| byte == b'\n').count() as u32;
        self.counted = offset;
        self.line
    }

    fn push(&mut self, kind: Kind) {
        let line = self.line_at(self.at);
        self.tokens.push(Token { line, kind });
    }

    fn refuse<T>(&mut self, reason: impl Into<String>) -> Result<T, Refusal> {
        let line = self.line_at(self.at);
        refuse(line, reason)
    }

    /// Moves over `length` bytes that belong to a tag.
    fn take(&mut self, length: usize) {
        self.at += length;
        self.at_line_start = self.text[..self.at].ends_with('\n');
    }

    /// Text up to the next tag, and the tag.
    fn outside(&mut self) -> Result<(), Refusal> {
        let rest = self.rest();
        let bytes = rest.as_bytes();
        let tag =
            memchr::memchr_iter(b'{', bytes).find(|&start| matches!(bytes.get(start + 1), Some(b'{' | b'%' | b'#')));
        let Some(start) = tag else {
            self.push(Kind::Data(rest.to_owned()));
            self.at = self.text.len();
            return Ok(());
        };
        let letter = bytes[start + 1];
        let sign = bytes.get(start + 2).copied().filter(|sign| matches!(sign, b'-' | b'+'));
        self.data(start, letter != b'{', sign);
        self.at += start;
        if letter == b'%'
            && let Some(length) = raw_begin(self.rest())
        {
            self.take(length);
            return self.raw();
        }
        let begin = 2 + usize::from(sign.is_some());
        match letter {
            b'{' => {
                self.push(Kind::PrintBegin);
                self.take(begin);
                self.inside(false)
            }
            b'%' => {
                self.push(Kind::BlockBegin);
                self.take(begin);
                self.inside(true)
            }
            _ => {
                self.take(begin);
                self.comment()
            }
        }
    }

    /// Emits the `length` bytes in front of a tag, stripped as the tag asks; does not move.
    fn data(&mut self, length: usize, is_block: bool, sign: Option<u8>) {
        let mut data = &self.rest()[..length];
        if sign == Some(b'-') {
            data = trim_end(data);
        } else if sign.is_none() && is_block {
            let line_start = data.rfind('\n').map_or(0, |newline| newline + 1);
            if (line_start > 0 || self.at_line_start) && data[line_start..].chars().all(is_space) {
                data = &data[..line_start];
            }
        }
        if !data.is_empty() {
            let data = data.to_owned();
            self.push(Kind::Data(data));
        }
    }

    fn skip_space(&mut self) {
        let rest = self.rest();
        self.at += rest.len() - rest.trim_start_matches(is_space).len();
    }

    fn comment(&mut self) -> Result<(), Refusal> {
        let Some(end) = self.rest().find("#}") else {
            return self.refuse("a comment is not closed by '#}'");
        };
        let sign = self.rest()[..end].bytes().last();
        self.take(end + 2);
        self.after_block(sign);
        Ok(())
    }

    /// White space after the end of a block or comment whose last letter before the end was `sign`.
    fn after_block(&mut self, sign: Option<u8>) {
        if sign == Some(b'-') {
            self.skip_space();
        } else if sign != Some(b'+') && self.rest().starts_with('\n') {
            self.at += 1;
        }
        self.take(0);
    }

    fn raw(&mut self) -> Result<(), Refusal> {
        let rest = self.rest();
        let end = memchr::memmem::find_iter(rest.as_bytes(), b"{%")
            .find_map(|start| raw_end(&rest[start..]).map(|(length, sign, last)| (start, length, sign, last)));
        let Some((start, length, sign, last)) = end else {
            return self.refuse("{% raw %} is not closed by {% endraw %}");
        };
        self.data(start, true, sign);
        self.take(start + length);
        self.after_block(last);
        Ok(())
    }

    /// The tokens of one tag, up to and with its end.
    fn inside(&mut self, is_block: bool) -> Result<(), Refusal> {
        let end = if is_block { "%}" } else { "}}" };
        let mut open: Vec<&'static str> = Vec::new();
        loop {
            self.skip_space();
            let rest = self.rest();
            if rest.is_empty() {
                return self.refuse(format!("a tag is not closed by '{end}'"));
            }
            if open.is_empty() {
                let sign = rest.bytes().next().filter(|sign| *sign == b'-' || (*sign == b'+' && is_block));
                let skip = usize::from(sign.is_some());
                if rest[skip..].starts_with(end) {
                    self.push(if is_block { Kind::BlockEnd } else { Kind::PrintEnd });
                    self.take(skip + 2);
                    match sign {
                        None if !is_block => {}
                        sign => self.after_block(sign),
                    }
                    return Ok(());
                }
            }
            let (length, kind) = self.token()?;
            match kind {
                Kind::Op("{") => open.push("}"),
                Kind::Op("(") => open.push(")"),
                Kind::Op("[") => open.push("]"),
                Kind::Op(close @ ("}" | ")" | "]")) => match open.pop() {
                    Some(expected) if expected == close => {}
                    Some(expected) => return self.refuse(format!("expected '{expected}', found '{close}'")),
                    None => return self.refuse(format!("unexpected '{close}'")),
                },
                _ => {}
            }
            self.push(kind);
            self.take(length);
        }
    }

    fn token(&mut self) -> Result<(usize, Kind), Refusal> {
        let rest = self.rest();
        let first = rest.as_bytes()[0];
        match first {
            b'0'..=b'9' => self.number(),
            b'a'..=b'z' | b'A'..=b'Z' | b'_' => {
                let length = rest.bytes().take_while(|byte| byte.is_ascii_alphanumeric() || *byte == b'_').count();
                if rest[length..].chars().next().is_some_and(char::is_alphanumeric) {
                    return self.refuse("a name with letters outside of ASCII is not supported");
                }
                Ok((length, Kind::Name(rest[..length].to_owned())))
            }
            b'\'' | b'"' => self.string(first as char),
            _ => match OPERATORS.into_iter().find(|operator| rest.starts_with(operator)) {
                Some(operator) => Ok((operator.len(), Kind::Op(operator))),
                None => {
                    let found = rest.chars().next().unwrap_or_default();
                    self.refuse(format!("unexpected character {found:?}"))
                }
            },
        }
    }

    fn number(&mut self) -> Result<(usize, Kind), Refusal> {
        let rest = self.rest().as_bytes();
        let digits = |mut at: usize| {
            while rest.get(at).is_some_and(u8::is_ascii_digit)
                || (rest.get(at) == Some(&b'_') && rest.get(at + 1).is_some_and(u8::is_ascii_digit))
            {
                at += 1;
            }
            at
        };
        let whole = digits(0);
        let mut end = whole;
        let after_dot = self.text[..self.at].ends_with('.');
        if !after_dot && rest.get(end) == Some(&b'.') && rest.get(end + 1).is_some_and(u8::is_ascii_digit) {
            end = digits(end + 1);
        }
        if !after_dot && matches!(rest.get(end), Some(b'e' | b'E')) {
            let sign = usize::from(matches!(rest.get(end + 1), Some(b'+' | b'-')));
            if rest.get(end + 1 + sign).is_some_and(u8::is_ascii_digit) {
                end = digits(end + 1 + sign);
            }
        }
        let text = self.rest()[..end].replace('_', "");
        if end > whole {
            return Ok((end, Kind::Float(text.parse().expect("digits, a dot and an exponent are a number"))));
        }
        let plain = text.len() == 1 || !text.starts_with('0') || text.bytes().all(|digit| digit == b'0');
        if !plain || rest.get(end).is_some_and(|next| next.is_ascii_alphanumeric() || *next == b'_') {
            return self.refuse(format!("the number '{text}' is not written in plain decimal digits"));
        }
        match text.parse() {
            Ok(number) => Ok((end, Kind::Int(number))),
            Err(_) => self.refuse(format!("the number {text} is too large")),
        }
    }

    fn string(&mut self, quote: char) -> Result<(usize, Kind), Refusal> {
        let rest = self.rest();
        let mut value = String::new();
        let mut characters = rest.char_indices().skip(1);
        while let Some((offset, character)) = characters.next() {
            if character == quote {
                return Ok((offset + 1, Kind::Text(value)));
            }
            if character != '\\' {
                value.push(character);
                continue;
            }
            let Some((_, letter)) = characters.next() else { break };
            let mut hex = |digits: usize| {
                let code: String = characters.by_ref().take(digits).map(|(_, digit)| digit).collect();
                (code.len() == digits).then(|| u32::from_str_radix(&code, 16).ok()).flatten().and_then(char::from_u32)
            };
            let escaped = match letter {
                '\n' => continue,
                '\\' | '\'' | '"' => Some(letter),
                'a' => Some('\u{7}'),
                'b' => Some('\u{8}'),
                'f' => Some('\u{c}'),
                'n' => Some('\n'),
                'r' => Some('\r'),
                't' => Some('\t'),
                'v' => Some('\u{b}'),
                'x' => hex(2),
                'u' => hex(4),
                'U' => hex(8),
                'N' | '0'..='7' => None,
                _ if !letter.is_ascii() => None,
                _ => {
                    value.push('\\');
                    Some(letter)
                }
            };
            match escaped {
                Some(escaped) => value.push(escaped),
                None => return self.refuse(format!("the escape '\\{letter}' in a string is not supported")),
            }
        }
        self.refuse(format!("a string is not closed by {quote}"))
    }
}

/// Length of `{% raw %}` at the start of `text`, the white space that `-%}` eats included.
fn raw_begin(text: &str) -> Option<usize> {
    let (length, _, last) = tag_named(text, "raw")?;
    match last {
        Some(b'+') => None,
        Some(b'-') => Some(text.len() - text[length..].trim_start_matches(is_space).len()),
        _ => Some(length),
    }
}

/// Length of `{% endraw %}` at the start of `text`, its opening sign and its closing sign.
fn raw_end(text: &str) -> Option<(usize, Option<u8>, Option<u8>)> {
    tag_named(text, "endraw")
}

fn tag_named(text: &str, name: &str) -> Option<(usize, Option<u8>, Option<u8>)> {
    let inner = text.strip_prefix("{%")?;
    let sign = inner.bytes().next().filter(|sign| matches!(sign, b'-' | b'+'));
    let inner = inner[usize::from(sign.is_some())..].trim_start_matches(is_space);
    let inner = inner.strip_prefix(name)?.trim_start_matches(is_space);
    let last = inner.bytes().next().filter(|sign| matches!(sign, b'-' | b'+'));
    let inner = inner[usize::from(last.is_some())..].strip_prefix("%}")?;
    Some((text.len() - inner.len(), sign, last))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(source: &str) -> String {
        let tokens = tokenize(source).unwrap();
        let show = |token: Token| match token.kind {
            Kind::Data(text) => format!("{text:?}"),
            Kind::Text(text) => format!("'{text}'"),
            Kind::Name(name) => name,
            Kind::Int(number) => number.to_string(),
            Kind::Float(number) => format!("{number:?}"),
            Kind::Op(operator) => operator.to_owned(),
            Kind::PrintBegin => "{{".into(),
            Kind::PrintEnd => "}}".into(),
            Kind::BlockBegin => "{%".into(),
            Kind::BlockEnd => "%}".into(),
            Kind::End => String::new(),
        };
        tokens.into_iter().map(show).collect::<Vec<_>>().join(" ")
    }

    // Signs, trim_blocks and lstrip_blocks move white space exactly as Jinja does.
    #[test]
    fn white_space_control() {
        assert_eq!("\"a\\n\" {% x %} \"b\" ", shown("a\n  {% x %}\nb\n"));
        assert_eq!("\"a \" {% x %} \" b\" ", shown("a {% x %} b"));
        assert_eq!("\"a\" {% x %} \"b\" ", shown("a \n {%- x -%} \n b"));
        assert_eq!("\"a\\n  \" {% x %} \"\\nb\" ", shown("a\n  {%+ x +%}\nb"));
        assert_eq!("\"a\\n  \" {{ x }} \"\\nb\" ", shown("a\n  {{ x }}\nb"));
        assert_eq!("\"a\" {{ x }} \"b\" ", shown("a\n  {{- x -}}\nb"));
        assert_eq!("{% x %} {% y %} \"z\\n\" ", shown("  {% x %}\n  {% y %}\nz\n\n"));
        assert_eq!("\"a\\n\" \"b\" ", shown("a\n {# c\n #}\nb"));
        assert_eq!("\"a\" \"b\" ", shown("a {#- c -#} b"));
        assert_eq!("\"x\\n\" \"\\n{{ a }}\\n\" \"y\" ", shown("x\n {% raw %}\n{{ a }}\n  {% endraw %}\ny"));
    }

    // Literals have Python's values, and every token knows its line.
    #[test]
    fn literals() {
        assert_eq!("{{ 'a\n\u{e9}\\d' . 1 1.5 1000.0 10 }} ", shown("{{ 'a\\n\\u00e9\\d' . 1 1.5 1e3 1_0 }}"));
        assert_eq!("{{ { 'a' : { } } }} ", shown("{{ {'a': {}} }}"));
        assert_eq!("{{ a . 0 . 1 // b }} ", shown("{{ a.0.1//b }}"));
        assert_eq!(3, tokenize("a\n{# \n #}{{ x }}").unwrap()[1].line);
    }

    // What can't be read the way Python reads it is refused with its line.
    #[test]
    fn refusals_name_the_line() {
        for source in [
            "\n{{ 'a",
            "\n{{ '\\N{DASH}' }}",
            "\n{{ é }}",
            "\n{{ a ! b }}",
            "\n{# x",
            "\n{{ (a] }}",
            "\n{{ a",
            "\n{{ 007 }}",
        ] {
            assert_eq!(2, tokenize(source).unwrap_err().line, "{source}");
        }
    }
}
