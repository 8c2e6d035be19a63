//! How Python sees text: white space, stripping, splitting, `repr`, numbers as text, title case.

use std::fmt::Write;

use super::failure::{Eval, impossible};

/// `str.isspace` of one character: Unicode's white space and the four information separators.
pub(super) fn is_space(character: char) -> bool {
    character.is_whitespace() || matches!(character, '\u{1c}'..='\u{1f}')
}

/// `str.rstrip()`
pub(super) fn trim_end(text: &str) -> &str {
    text.trim_end_matches(is_space)
}

/// `str.splitlines()`: a line break at the end begins no further line.
pub(super) fn split_lines(text: &str, keep_ends: bool) -> Vec<&str> {
    let mut lines = Vec::new();
    let mut start = 0;
    let mut characters = text.char_indices().peekable();
    while let Some((at, character)) = characters.next() {
        let is_break = matches!(
            character,
            '\n' | '\r' | '\u{b}' | '\u{c}' | '\u{1c}'..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}'
        );
        if !is_break {
            continue;
        }
        let mut end = at + character.len_utf8();
        if character == '\r' && characters.next_if(|(_, next)| *next == '\n').is_some() {
            end += 1;
        }
        lines.push(&text[start..if keep_ends { end } else { at }]);
        start = end;
    }
    if start < text.len() {
        lines.push(&text[start..]);
    }
    lines
}

/// `repr` of a string.
pub(super) fn write_repr(text: &str, out: &mut String) {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(quote);
    for character in text.chars() {
        match character {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            _ if character == quote => {
                out.push('\\');
                out.push(character);
            }
            ' '..='~' => out.push(character),
            _ if is_printable(character) => out.push(character),
            _ => {
                let code = character as u32;
                let written = match code {
                    0..=0xff => write!(out, "\\x{code:02x}"),
                    0x100..=0xffff => write!(out, "\\u{code:04x}"),
                    _ => write!(out, "\\U{code:08x}"),
                };
                written.expect("writing to a string can't fail");
            }
        }
    }
    out.push(quote);
}

/// Python's `str.isprintable`. Rust escapes the same classes of characters in debug output; the letter in front keeps it
/// from escaping combining characters, which it does at the start of a string only.
fn is_printable(character: char) -> bool {
    let mut pair = [0; 5];
    pair[0] = b'a';
    let length = character.encode_utf8(&mut pair[1..]).len();
    let text = std::str::from_utf8(&pair[..=length]).expect("a letter and a character are UTF-8");
    text.escape_debug().nth(1) == Some(character)
}

/// `repr` of a float: the shortest digits that read back, with an exponent below 1e-4 and from 1e16 on.
pub(super) fn write_float(number: f64, out: &mut String) {
    if !number.is_finite() {
        out.push_str(if number.is_nan() {
            "nan"
        } else if number > 0.0 {
            "inf"
        } else {
            "-inf"
        });
        return;
    }
    let scientific = format!("{number:e}");
    let (digits, exponent) = scientific.split_once('e').expect("scientific notation has an exponent");
    let exponent: i32 = exponent.parse().expect("an exponent is an integer");
    let written = if (-4..16).contains(&exponent) {
        write!(out, "{number:?}")
    } else {
        let sign = if exponent < 0 { '-' } else { '+' };
        write!(out, "{digits}e{sign}{:02}", exponent.unsigned_abs())
    };
    written.expect("writing to a string can't fail");
}

/// `str.capitalize()`
pub(super) fn capitalize(text: &str) -> Eval<String> {
    let mut characters = text.chars();
    let Some(first) = characters.next() else { return Ok(String::new()) };
    let mut result = String::with_capacity(text.len());
    result.push(title_letter(first)?);
    // Lower-casing the whole text, not the rest, lets a final sigma see the letters before it, as in Python.
    let lower = text.to_lowercase();
    let skipped = first.to_lowercase().map(char::len_utf8).sum();
    result.push_str(&lower[skipped..]);
    Ok(result)
}

/// `str.title()`: the first letter of each run of letters is large, the others are small.
pub(super) fn title(text: &str) -> Eval<String> {
    let mut result = String::with_capacity(text.len());
    let mut in_word = false;
    for character in text.chars() {
        let is_cased = character.is_lowercase() || character.is_uppercase();
        match (is_cased, in_word) {
            (true, true) if character == 'Σ' => return impossible("title case of the letter 'Σ' is not supported"),
            (true, true) => result.extend(character.to_lowercase()),
            (true, false) => result.push(title_letter(character)?),
            (false, _) => result.push(character),
        }
        in_word = is_cased;
    }
    Ok(result)
}

/// Title case of a letter, for the letters where it is the upper case; the others are few and refused.
pub(super) fn title_letter(letter: char) -> Eval<char> {
    let mut upper = letter.to_uppercase();
    match (upper.next(), upper.next()) {
        (Some(upper), None) if !matches!(letter, '\u{1c4}'..='\u{1cc}' | '\u{1f1}'..='\u{1f3}' | '\u{10d0}'..='\u{10ff}') => {
            Ok(upper)
        }
        _ => impossible(format!("title case of the letter '{letter}' is not supported")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn repr(text: &str) -> String {
        let mut out = String::new();
        write_repr(text, &mut out);
        out
    }

    fn float(number: f64) -> String {
        let mut out = String::new();
        write_float(number, &mut out);
        out
    }

    // `repr` chooses quotes and escapes as Python does.
    #[test]
    fn repr_is_pythons() {
        assert_eq!(r"'a\n\\é，😀'", repr("a\n\\é，😀"));
        assert_eq!("\"it's\"", repr("it's"));
        assert_eq!(r#"'it\'s "x"'"#, repr("it's \"x\""));
        assert_eq!(r"'\x00\x7f\xa0\u200b\ufeff\U000e0001'", repr("\0\u{7f}\u{a0}\u{200b}\u{feff}\u{e0001}"));
        assert_eq!("'\u{301}e\u{301}'", repr("\u{301}e\u{301}"));
    }

    // Floats have Python's shortest text.
    #[test]
    fn floats_are_pythons() {
        let cases = [
            (1.0, "1.0"),
            (-0.0, "-0.0"),
            (0.1, "0.1"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.5e-5, "1.5e-05"),
            (0.0001, "0.0001"),
            (1e22, "1e+22"),
            (5e-324, "5e-324"),
            (1.7976931348623157e308, "1.7976931348623157e+308"),
            (f64::INFINITY, "inf"),
        ];
        for (number, expected) in cases {
            assert_eq!(expected, float(number));
        }
    }

    // Lines break where Python breaks them.
    #[test]
    fn lines_are_pythons() {
        assert_eq!(vec!["a", "", "b", "c"], split_lines("a\r\n\nb\u{2028}c\u{c}", false));
        assert_eq!(vec!["a\r\n", "b"], split_lines("a\r\nb", true));
        assert!(split_lines("", false).is_empty());
    }

    // Case follows Python; letters whose title case is neither upper nor one letter are refused.
    #[test]
    fn case_is_pythons() {
        assert_eq!("Éa b", capitalize("ÉA B").unwrap());
        assert_eq!("It'S A-B 3X", title("it's a-B 3x").unwrap());
        assert!(capitalize("ßa").is_err());
        assert!(capitalize("ǆ").is_err());
    }
}
