//! A strict JSON reader (RFC 8259) that borrows from its input and keeps the place of every value.
//!
//! Stricter than most: no NaN, no lone surrogates (they are not Unicode text), bounded depth. Repeated keys are kept in
//! order; who looks a key up decides what they mean.

use std::borrow::Cow;

/// How deep arrays and objects may nest. Deeper input is refused, so that no input can exhaust the stack.
pub const MAX_DEPTH: usize = 128;

/// A JSON value and the byte where it begins.
#[derive(Clone, Debug, PartialEq)]
pub struct Value<'a> {
    /// Byte offset of the value in the parsed text; 0 for values that were made, not parsed.
    pub offset: usize,
    /// The value itself.
    pub data: Data<'a>,
}

/// The data of a [`Value`].
#[derive(Clone, Debug, PartialEq)]
pub enum Data<'a> {
    /// `null`
    Null,
    /// `true` or `false`
    Bool(bool),
    /// A number as it is written, so that nothing is lost before somebody needs it.
    Number(Cow<'a, str>),
    /// A string; borrowed where it has no escapes.
    String(Cow<'a, str>),
    /// An array.
    Array(Vec<Value<'a>>),
    /// An object, its members in the order of the text.
    Object(Vec<Member<'a>>),
}

/// One `"key": value` of an object.
#[derive(Clone, Debug, PartialEq)]
pub struct Member<'a> {
    /// The key.
    pub key: Cow<'a, str>,
    /// Byte offset of the key.
    pub offset: usize,
    /// The value.
    pub value: Value<'a>,
}

/// Why a text is not JSON.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SyntaxError {
    /// Byte offset where the text stops being JSON.
    pub offset: usize,
    /// What was expected and what was found.
    pub message: String,
}

impl<'a> Value<'a> {
    /// A string value that was made, not parsed.
    pub fn string(text: impl Into<Cow<'a, str>>) -> Self {
        Self { offset: 0, data: Data::String(text.into()) }
    }

    /// The same value, borrowing from nothing.
    pub fn into_owned(self) -> Value<'static> {
        let data = match self.data {
            Data::Null => Data::Null,
            Data::Bool(flag) => Data::Bool(flag),
            Data::Number(text) => Data::Number(text.into_owned().into()),
            Data::String(text) => Data::String(text.into_owned().into()),
            Data::Array(values) => Data::Array(values.into_iter().map(Value::into_owned).collect()),
            Data::Object(members) => Data::Object(
                members
                    .into_iter()
                    .map(|Member { key, offset, value }| Member {
                        key: key.into_owned().into(),
                        offset,
                        value: value.into_owned(),
                    })
                    .collect(),
            ),
        };
        Value { offset: self.offset, data }
    }

    /// Appends the value as JSON.
    pub fn write(&self, out: &mut String) {
        let quote = |text: &str, out: &mut String| out.push_str(&serde_json::Value::from(text).to_string());
        match &self.data {
            Data::Null => out.push_str("null"),
            Data::Bool(flag) => out.push_str(if *flag { "true" } else { "false" }),
            Data::Number(number) => out.push_str(number),
            Data::String(text) => quote(text, out),
            Data::Array(values) => {
                out.push('[');
                for (index, value) in values.iter().enumerate() {
                    out.push_str(if index > 0 { "," } else { "" });
                    value.write(out);
                }
                out.push(']');
            }
            Data::Object(members) => {
                out.push('{');
                for (index, member) in members.iter().enumerate() {
                    out.push_str(if index > 0 { "," } else { "" });
                    quote(&member.key, out);
                    out.push(':');
                    member.value.write(out);
                }
                out.push('}');
            }
        }
    }

    /// The text, if the value is a string.
    pub fn as_str(&self) -> Option<&str> {
        match &self.data {
            Data::String(text) => Some(text),
            _ => None,
        }
    }

    /// What the value is, for messages: "a string", "null", …
    pub fn type_name(&self) -> &'static str {
        match &self.data {
            Data::Null => "null",
            Data::Bool(_) => "a boolean",
            Data::Number(_) => "a number",
            Data::String(_) => "a string",
            Data::Array(_) => "an array",
            Data::Object(_) => "an object",
        }
    }
}

/// Reads one JSON value, with nothing but white space around it.
pub fn parse(text: &str) -> Result<Value<'_>, SyntaxError> {
    let mut parser = Parser { text, bytes: text.as_bytes(), at: 0 };
    parser.skip_space();
    let value = parser.value(0)?;
    parser.skip_space();
    match parser.peek() {
        None => Ok(value),
        Some(_) => Err(parser.expected("the end of the record")),
    }
}

struct Parser<'a> {
    text: &'a str,
    bytes: &'a [u8],
    at: usize,
}

type Parsed<T> = Result<T, SyntaxError>;

impl<'a> Parser<'a> {
    fn peek(&self) -> Option<u8> {
        self.bytes.get(self.at).copied()
    }

    fn skip_space(&mut self) {
        while matches!(self.peek(), Some(b' ' | b'\n' | b'\r' | b'\t')) {
            self.at += 1;
        }
    }

    fn error(&self, offset: usize, message: impl Into<String>) -> SyntaxError {
        SyntaxError { offset, message: message.into() }
    }

    fn expected(&self, what: &str) -> SyntaxError {
        let found = match self.text[self.at..].chars().next() {
            None => "the end of the record".to_owned(),
            Some(character) if character.is_control() => format!("the control character U+{:04X}", character as u32),
            Some(character) => format!("{character:?}"),
        };
        self.error(self.at, format!("invalid JSON: expected {what}, found {found}"))
    }

    fn value(&mut self, depth: usize) -> Parsed<Value<'a>> {
        let offset = self.at;
        let data = match self.peek() {
            Some(b'"') => Data::String(self.string()?),
            Some(b'{') => Data::Object(self.object(depth)?),
            Some(b'[') => Data::Array(self.array(depth)?),
            Some(b'-' | b'0'..=b'9') => Data::Number(self.number()?.into()),
            Some(b't') => self.literal("true", Data::Bool(true))?,
            Some(b'f') => self.literal("false", Data::Bool(false))?,
            Some(b'n') => self.literal("null", Data::Null)?,
            _ => return Err(self.expected("a value")),
        };
        Ok(Value { offset, data })
    }

    fn literal(&mut self, word: &'static str, data: Data<'a>) -> Parsed<Data<'a>> {
        if !self.bytes[self.at..].starts_with(word.as_bytes()) {
            return Err(self.expected("a value"));
        }
        self.at += word.len();
        Ok(data)
    }

    fn deeper(&self, depth: usize) -> Parsed<usize> {
        if depth == MAX_DEPTH {
            return Err(self.error(self.at, format!("invalid JSON: nested deeper than {MAX_DEPTH} levels")));
        }
        Ok(depth + 1)
    }

    fn object(&mut self, depth: usize) -> Parsed<Vec<Member<'a>>> {
        let depth = self.deeper(depth)?;
        let mut members = Vec::new();
        self.at += 1;
        self.skip_space();
        if self.peek() == Some(b'}') {
            self.at += 1;
            return Ok(members);
        }
        loop {
            if self.peek() != Some(b'"') {
                return Err(self.expected("a key in double quotes"));
            }
            let offset = self.at;
            let key = self.string()?;
            self.skip_space();
            if self.peek() != Some(b':') {
                return Err(self.expected("':' after the key"));
            }
            self.at += 1;
            self.skip_space();
            let value = self.value(depth)?;
            members.push(Member { key, offset, value });
            self.skip_space();
            match self.peek() {
                Some(b',') => self.at += 1,
                Some(b'}') => {
                    self.at += 1;
                    return Ok(members);
                }
                _ => return Err(self.expected("',' or '}'")),
            }
            self.skip_space();
        }
    }

    fn array(&mut self, depth: usize) -> Parsed<Vec<Value<'a>>> {
        let depth = self.deeper(depth)?;
        let mut values = Vec::new();
        self.at += 1;
        self.skip_space();
        if self.peek() == Some(b']') {
            self.at += 1;
            return Ok(values);
        }
        loop {
            values.push(self.value(depth)?);
            self.skip_space();
            match self.peek() {
                Some(b',') => self.at += 1,
                Some(b']') => {
                    self.at += 1;
                    return Ok(values);
                }
                _ => return Err(self.expected("',' or ']'")),
            }
            self.skip_space();
        }
    }

    fn digits(&mut self) -> Parsed<()> {
        if !matches!(self.peek(), Some(b'0'..=b'9')) {
            return Err(self.expected("a digit"));
        }
        while matches!(self.peek(), Some(b'0'..=b'9')) {
            self.at += 1;
        }
        Ok(())
    }

    fn number(&mut self) -> Parsed<&'a str> {
        let start = self.at;
        if self.peek() == Some(b'-') {
            self.at += 1;
        }
        match self.peek() {
            Some(b'0') => self.at += 1,
            _ => self.digits()?,
        }
        if self.peek() == Some(b'.') {
            self.at += 1;
            self.digits()?;
        }
        if matches!(self.peek(), Some(b'e' | b'E')) {
            self.at += 1;
            if matches!(self.peek(), Some(b'+' | b'-')) {
                self.at += 1;
            }
            self.digits()?;
        }
        Ok(&self.text[start..self.at])
    }

    fn string(&mut self) -> Parsed<Cow<'a, str>> {
        let start = self.at + 1;
        self.at = start;
        let mut owned = String::new();
        loop {
            let end = self.at + num_plain(&self.bytes[self.at..]);
            let plain = &self.text[self.at..end];
            self.at = end + 1;
            match self.bytes.get(end) {
                Some(b'"') if owned.is_empty() && end - start == plain.len() => return Ok(Cow::Borrowed(plain)),
                Some(b'"') => {
                    owned.push_str(plain);
                    return Ok(Cow::Owned(owned));
                }
                Some(b'\\') => {
                    if owned.is_empty() {
                        // One allocation for nearly all strings: up to the closing quote, which is what an unescaped text
                        // needs at most.
                        let num_more = memchr::memchr(b'"', &self.bytes[end..]).unwrap_or_default();
                        owned.reserve(plain.len() + num_more + 64);
                    }
                    owned.push_str(plain);
                    owned.push(self.escape(end)?);
                }
                Some(byte) => {
                    let text = format!("invalid JSON: the control character U+{byte:04X} must be escaped in a string");
                    return Err(self.error(end, text));
                }
                None => return Err(self.error(end, "invalid JSON: a string is not closed by '\"'")),
            }
        }
    }

    /// Reads the rest of an escape whose backslash stands at `backslash`; `self.at` is just behind it.
    fn escape(&mut self, backslash: usize) -> Parsed<char> {
        let letter = self.peek();
        self.at += 1;
        Ok(match letter {
            Some(b'"') => '"',
            Some(b'\\') => '\\',
            Some(b'/') => '/',
            Some(b'b') => '\u{8}',
            Some(b'f') => '\u{c}',
            Some(b'n') => '\n',
            Some(b'r') => '\r',
            Some(b't') => '\t',
            Some(b'u') => return self.unicode_escape(backslash),
            None => return Err(self.error(self.bytes.len(), "invalid JSON: a string is not closed by '\"'")),
            Some(_) => return Err(self.error(backslash, "invalid JSON: unknown escape in a string")),
        })
    }

    fn unicode_escape(&mut self, backslash: usize) -> Parsed<char> {
        let first = self.hex4(backslash)?;
        let code = match first {
            0xD800..=0xDBFF if self.bytes[self.at..].starts_with(b"\\u") => {
                self.at += 2;
                let second = self.hex4(self.at - 2)?;
                if !(0xDC00..=0xDFFF).contains(&second) {
                    return Err(self.lone_surrogate(backslash, first));
                }
                0x10000 + ((first - 0xD800) << 10) + (second - 0xDC00)
            }
            code => code,
        };
        char::from_u32(code).ok_or_else(|| self.lone_surrogate(backslash, first))
    }

    fn lone_surrogate(&self, offset: usize, code: u32) -> SyntaxError {
        self.error(offset, format!("invalid JSON: \\u{code:04x} is half of a surrogate pair, which is not a character"))
    }

    fn hex4(&mut self, backslash: usize) -> Parsed<u32> {
        let mut code = 0;
        for _ in 0..4 {
            let digit = self.peek().and_then(|byte| (byte as char).to_digit(16));
            let Some(digit) = digit else {
                return Err(self.error(backslash, "invalid JSON: expected four hexadecimal digits after \\u"));
            };
            code = code * 16 + digit;
            self.at += 1;
        }
        Ok(code)
    }
}

/// How many bytes of a string come before the first that is not plain: a quote, a backslash or a control character.
#[inline(always)]
fn num_plain(bytes: &[u8]) -> usize {
    let mut num = 0;
    while let Some(block) = bytes[num..].first_chunk() {
        let not_plain = not_plain(block);
        if not_plain != 0 {
            return num + not_plain.trailing_zeros() as usize;
        }
        num += block.len();
    }
    num + bytes[num..].iter().take_while(|byte| is_plain(**byte)).count()
}

fn is_plain(byte: u8) -> bool {
    !matches!(byte, b'"' | b'\\' | 0..0x20)
}

/// A bit for each byte that is not plain.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn not_plain(block: &[u8; 16]) -> u32 {
    use std::arch::x86_64::*;
    let words = u128::from_le_bytes(*block);
    // SAFETY: every x86-64 processor has SSE2.
    unsafe {
        let bytes = _mm_set_epi64x((words >> 64) as i64, words as i64);
        let is = |byte: u8| _mm_cmpeq_epi8(bytes, _mm_set1_epi8(byte as i8));
        let control = _mm_cmpeq_epi8(_mm_min_epu8(bytes, _mm_set1_epi8(0x1f)), bytes);
        _mm_movemask_epi8(_mm_or_si128(_mm_or_si128(is(b'"'), is(b'\\')), control)) as u32
    }
}

/// A bit for each byte that is not plain.
#[cfg(not(target_arch = "x86_64"))]
#[inline(always)]
fn not_plain(block: &[u8; 16]) -> u32 {
    (0..).zip(block).fold(0, |bits, (place, byte)| bits | u32::from(!is_plain(*byte)) << place)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn to_serde(value: &Value<'_>) -> serde_json::Value {
        match &value.data {
            Data::Null => serde_json::Value::Null,
            Data::Bool(flag) => (*flag).into(),
            Data::Number(text) => serde_json::from_str(text).unwrap(),
            Data::String(text) => text.as_ref().into(),
            Data::Array(values) => values.iter().map(to_serde).collect(),
            Data::Object(members) => {
                members.iter().map(|member| (member.key.to_string(), to_serde(&member.value))).collect()
            }
        }
    }

    fn failure(text: &str) -> (usize, String) {
        let error = parse(text).unwrap_err();
        (error.offset, error.message)
    }

    // What is not JSON is refused at the first byte that can't be right, in a sentence.
    #[test]
    fn errors_say_where_and_what() {
        assert_eq!((0, "invalid JSON: expected a value, found the end of the record".into()), failure(""));
        assert_eq!((6, "invalid JSON: expected ',' or '}', found '\"'".into()), failure(r#"{"a":1"b":2}"#));
        assert_eq!((1, "invalid JSON: expected a key in double quotes, found 'a'".into()), failure("{a:1}"));
        assert_eq!((5, "invalid JSON: expected a value, found '}'".into()), failure(r#"{"a":}"#));
        assert_eq!((1, "invalid JSON: expected the end of the record, found '1'".into()), failure("01"));
        assert_eq!((4, "invalid JSON: a string is not closed by '\"'".into()), failure(r#""abc"#));
        assert_eq!(
            (1, "invalid JSON: \\ud800 is half of a surrogate pair, which is not a character".into()),
            failure(r#""\ud800""#)
        );
        assert_eq!(
            (2, "invalid JSON: the control character U+000A must be escaped in a string".into()),
            failure("\"a\nb\"")
        );
        assert_eq!((0, "invalid JSON: expected a value, found 'N'".into()), failure("NaN"));
    }

    // Each byte at each place of a block is plain or not, as the grammar has it.
    #[test]
    fn plain_bytes_are_told_from_others() {
        for byte in 0..=255u8 {
            for place in 0..40 {
                let mut bytes = [b'a'; 40];
                bytes[place] = byte;
                let is_plain = byte >= 0x20 && byte != b'"' && byte != b'\\';
                assert_eq!(if is_plain { 40 } else { place }, num_plain(&bytes), "{byte} at {place}");
            }
        }
    }

    // Depth is bounded: a hostile input is an error, never an exhausted stack.
    #[test]
    fn nesting_is_bounded() {
        assert!(parse(&format!("{}{}", "[".repeat(MAX_DEPTH), "]".repeat(MAX_DEPTH))).is_ok());
        assert_eq!(MAX_DEPTH, failure(&"[".repeat(100_000)).0);
    }

    // Every value knows the byte where it begins.
    #[test]
    fn offsets_point_at_values() {
        let text = r#" {"a": [1, "x"]}"#;
        let Data::Object(members) = parse(text).unwrap().data else { panic!("not an object") };
        let Data::Array(values) = &members[0].value.data else { panic!("not an array") };

        assert_eq!(2, members[0].offset);
        assert_eq!(
            ['[', '1', '"'],
            [members[0].value.offset, values[0].offset, values[1].offset].map(|at| text.as_bytes()[at] as char)
        );
    }

    fn json() -> impl Strategy<Value = serde_json::Value> {
        let leaf = prop_oneof![
            Just(serde_json::Value::Null),
            any::<bool>().prop_map(Into::into),
            any::<i64>().prop_map(Into::into),
            any::<String>().prop_map(Into::into),
        ];
        leaf.prop_recursive(4, 32, 6, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..6).prop_map(Into::into),
                prop::collection::btree_map(any::<String>(), inner, 0..6)
                    .prop_map(|map| serde_json::Value::Object(map.into_iter().collect())),
            ]
        })
    }

    proptest! {
        // Whatever serde_json writes, we read back as the same value; and it reads what we write.
        #[test]
        fn reads_what_serde_writes(value in json()) {
            let text = serde_json::to_string_pretty(&value).unwrap();
            let read = parse(&text).unwrap();
            prop_assert_eq!(&value, &to_serde(&read));
            let mut written = String::new();
            read.write(&mut written);
            prop_assert_eq!(value, serde_json::from_str::<serde_json::Value>(&written).unwrap());
        }

        // Random text near JSON is accepted or refused exactly as serde_json does, and never panics.
        #[test]
        fn agrees_with_serde(text in r#"[\[\]{}:,"\\/ubfnrt0-9eE+\-. a-fé\ud7ff\n\t]{0,24}"#) {
            let ours = parse(&text);
            match serde_json::from_str::<serde_json::Value>(&text) {
                Ok(value) => prop_assert_eq!(value, to_serde(&ours.unwrap())),
                // serde_json refuses numbers beyond f64; as JSON they are well-formed.
                Err(error) if error.to_string().starts_with("number out of range") => {}
                Err(_) => prop_assert!(ours.is_err(), "accepted {:?}", text),
            }
        }
    }
}
