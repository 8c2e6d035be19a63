//! Values as text in other ways than printing: JSON as `transformers`' `tojson` writes it, `%` and `str.format`.

use super::failure::{Eval, impossible};
use super::methods::part;
use super::operators::compare;
use super::python::write_float;
use super::value::{SequenceKind, Text, Value};

/// The arguments of `tojson`, as those of Python's `json.dumps`.
#[derive(Debug)]
pub(super) struct JsonStyle {
    pub ensure_ascii: bool,
    /// What each level is indented by; `None` writes everything on one line.
    pub indent: Option<String>,
    pub item_separator: String,
    pub key_separator: String,
    pub sort_keys: bool,
}

impl Default for JsonStyle {
    fn default() -> Self {
        Self {
            ensure_ascii: false,
            indent: None,
            item_separator: ", ".into(),
            key_separator: ": ".into(),
            sort_keys: false,
        }
    }
}

impl JsonStyle {
    /// Appends `value` as JSON.
    pub fn write(&self, value: &Value<'_>, out: &mut String) -> Eval<()> {
        self.write_nested(value, 0, out)
    }

    fn write_nested(&self, value: &Value<'_>, depth: usize, out: &mut String) -> Eval<()> {
        match value {
            Value::None => out.push_str("null"),
            Value::Bool(flag) => out.push_str(if *flag { "true" } else { "false" }),
            Value::Int(number) => out.push_str(&number.to_string()),
            Value::Float(number) => write_json_float(*number, out),
            Value::Text(text) | Value::Safe(text) => self.write_string(text.as_str(), out),
            Value::Sequence(SequenceKind::List | SequenceKind::Tuple, items) => {
                out.push('[');
                for (index, item) in items.iter().enumerate() {
                    self.begin_item(index, depth + 1, out);
                    self.write_nested(&item, depth + 1, out)?;
                }
                self.end(items.len(), depth, out);
                out.push(']');
            }
            Value::Dict(dict) => {
                let mut pairs: Vec<_> = dict.pairs().collect();
                if self.sort_keys {
                    let mut failure = None;
                    pairs.sort_by(|(left, _), (right, _)| match compare(left, right) {
                        Ok(order) => order.unwrap_or(std::cmp::Ordering::Equal),
                        Err(error) => {
                            failure.get_or_insert(error);
                            std::cmp::Ordering::Equal
                        }
                    });
                    if let Some(failure) = failure {
                        return Err(failure);
                    }
                }
                out.push('{');
                for (index, (key, value)) in pairs.iter().enumerate() {
                    self.begin_item(index, depth + 1, out);
                    match key {
                        Value::Text(key) | Value::Safe(key) => self.write_string(key.as_str(), out),
                        Value::None | Value::Bool(_) | Value::Int(_) | Value::Float(_) => {
                            out.push('"');
                            self.write_nested(key, depth, out)?;
                            out.push('"');
                        }
                        _ => return impossible(format!("a {} can't be a key of JSON", key.type_name())),
                    }
                    out.push_str(&self.key_separator);
                    self.write_nested(value, depth + 1, out)?;
                }
                self.end(pairs.len(), depth, out);
                out.push('}');
            }
            _ => return impossible(format!("a {} can't be written as JSON", value.type_name())),
        }
        Ok(())
    }

    fn begin_item(&self, index: usize, depth: usize, out: &mut String) {
        if index > 0 {
            out.push_str(&self.item_separator);
        }
        self.new_line(depth, out);
    }

    fn end(&self, length: usize, depth: usize, out: &mut String) {
        if length > 0 {
            self.new_line(depth, out);
        }
    }

    fn new_line(&self, depth: usize, out: &mut String) {
        if let Some(indent) = &self.indent {
            out.push('\n');
            (0..depth).for_each(|_| out.push_str(indent));
        }
    }

    fn write_string(&self, text: &str, out: &mut String) {
        out.push('"');
        let mut plain = 0;
        for (at, character) in text.char_indices() {
            let short = match character {
                '"' => "\\\"",
                '\\' => "\\\\",
                '\n' => "\\n",
                '\r' => "\\r",
                '\t' => "\\t",
                '\u{8}' => "\\b",
                '\u{c}' => "\\f",
                '\0'..='\u{1f}' => "",
                '\u{7f}'.. if self.ensure_ascii => "",
                _ => continue,
            };
            out.push_str(&text[plain..at]);
            plain = at + character.len_utf8();
            if short.is_empty() {
                for unit in character.encode_utf16(&mut [0; 2]) {
                    out.push_str(&format!("\\u{unit:04x}"));
                }
            } else {
                out.push_str(short);
            }
        }
        out.push_str(&text[plain..]);
        out.push('"');
    }
}

fn write_json_float(number: f64, out: &mut String) {
    match number {
        _ if number.is_nan() => out.push_str("NaN"),
        f64::INFINITY => out.push_str("Infinity"),
        f64::NEG_INFINITY => out.push_str("-Infinity"),
        _ => write_float(number, out),
    }
}

/// `text % arguments` with the plain conversions `%s`, `%d`, `%i`, `%%`; all others are refused.
pub(super) fn percent<'a>(text: &Text<'a>, arguments: &Value<'a>) -> Eval<Value<'a>> {
    let values: Vec<Value<'a>> = match arguments {
        Value::Sequence(SequenceKind::Tuple, items) => items.iter().collect(),
        Value::Dict(_) => return impossible("'%' with a dict is not supported"),
        single => vec![single.clone()],
    };
    let mut values = values.into_iter();
    let mut out = Vec::new();
    let mut rest = text.as_str();
    while let Some(at) = rest.find('%') {
        out.push(part(text, &rest[..at]));
        let letter = rest[at + 1..].chars().next();
        match letter {
            Some('%') => out.push(part(text, &rest[at..=at])),
            Some('s' | 'd' | 'i') => {
                let Some(value) = values.next() else { return impossible("not enough values for the format") };
                match (letter, &value) {
                    (Some('s'), _) => out.push(value.to_text()?),
                    (_, Value::Int(_) | Value::Bool(_)) => {
                        out.push(Value::Int(value.as_int().unwrap_or_default()).to_text()?)
                    }
                    _ => return impossible(format!("can't format a {} with %d", value.type_name())),
                }
            }
            _ => return impossible("the format is not one of %s, %d, %i, %%"),
        }
        rest = &rest[at + 2..];
    }
    out.push(part(text, rest));
    // Python also forgives a list or a dict that is left over, but not other values.
    match values.next() {
        None => Ok(Value::Text(Text::join(out))),
        Some(_) => impossible("too many values for the format"),
    }
}

/// `text.format(…)` with the fields `{}`, `{0}` and `{name}`; all others are refused.
pub(super) fn format<'a>(text: &Text<'a>, arguments: &[Value<'a>], named: &[(&'a str, Value<'a>)]) -> Eval<Value<'a>> {
    let mut out = Vec::new();
    let mut next = 0;
    let mut is_numbered = None;
    let mut rest = text.as_str();
    while let Some(at) = rest.find(['{', '}']) {
        out.push(part(text, &rest[..at]));
        let brace = &rest[at..=at];
        rest = &rest[at + 1..];
        if rest.starts_with(brace) {
            out.push(part(text, brace));
            rest = &rest[1..];
            continue;
        }
        let end = if brace == "{" { rest.find('}') } else { None };
        let Some(end) = end else { return impossible("a brace of the format stands alone") };
        let field = &rest[..end];
        let found = if field.is_empty() || field.bytes().all(|byte| byte.is_ascii_digit()) {
            if is_numbered.replace(!field.is_empty()).is_some_and(|before| before == field.is_empty()) {
                return impossible("the format mixes {} and {0}");
            }
            let index = if field.is_empty() { next } else { field.parse().unwrap_or(usize::MAX) };
            next += 1;
            arguments.get(index)
        } else if field.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_') {
            named.iter().find(|(name, _)| *name == field).map(|(_, value)| value)
        } else {
            return impossible(format!("the field '{{{field}}}' of a format is not supported"));
        };
        match found {
            Some(value) => out.push(value.to_text()?),
            None => return impossible(format!("no value for the field '{{{field}}}' of the format")),
        }
        rest = &rest[end + 1..];
    }
    out.push(part(text, rest));
    Ok(Value::Text(Text::join(out)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::json;

    fn dump(text: &str, style: &JsonStyle) -> String {
        let value = json::parse(text).unwrap();
        let mut out = String::new();
        style.write(&Value::from_json(&value), &mut out).unwrap();
        out
    }

    // JSON comes out as `json.dumps` writes it: separators, number formats, escapes, order.
    #[test]
    fn json_is_pythons() {
        let text = r#"{"b":[1,-0,1.0,1e5,1E-7,true,null,"é<>&'\u007f\u0001\"\n"],"a":{},"c":[]}"#;
        assert_eq!(
            "{\"b\": [1, 0, 1.0, 100000.0, 1e-07, true, null, \"é<>&'\u{7f}\\u0001\\\"\\n\"], \"a\": {}, \"c\": []}",
            dump(text, &JsonStyle::default())
        );
        let style = JsonStyle {
            ensure_ascii: true,
            indent: Some("  ".into()),
            item_separator: ",".into(),
            sort_keys: true,
            ..JsonStyle::default()
        };
        assert_eq!(
            "{\n  \"a\": [\n    \"\\u00e9\\ud83d\\ude00\\u007f\"\n  ],\n  \"b\": {}\n}",
            dump("{\"b\":{},\"a\":[\"é😀\u{7f}\"]}", &style)
        );
    }

    // The plain conversions format as Python does, all others are refused.
    #[test]
    fn formats() {
        let pair = Value::tuple(vec![Value::text("a"), Value::Bool(true)]).unwrap();
        assert_eq!(Some("a is 1%"), percent(&Text::Borrowed("%s is %d%%"), &pair).unwrap().as_str());
        assert!(percent(&Text::Borrowed("%5s"), &Value::None).is_err());
        assert!(percent(&Text::Borrowed("%s"), &pair).is_err());

        let arguments = [Value::Int(1), Value::text("x")];
        assert_eq!(
            Some("1-x {} n"),
            format(&Text::Borrowed("{}-{} {{}} {n}"), &arguments, &[("n", Value::text("n"))]).unwrap().as_str()
        );
        assert_eq!(Some("x1"), format(&Text::Borrowed("{1}{0}"), &arguments, &[]).unwrap().as_str());
        for refused in ["{0:>5}", "{a.b}", "{!r}", "{", "}", "{}{0}", "{9}"] {
            assert!(format(&Text::Borrowed(refused), &arguments, &[]).is_err(), "{refused}");
        }
    }
}
