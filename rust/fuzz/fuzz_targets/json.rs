//! Our JSON reader against `serde_json`: the same texts are accepted, with the same values, and refused at the same place.
//!
//! Allowed differences, all on purpose:
//! - numbers: we keep them as written, `serde_json` refuses those beyond f64;
//! - depth: we allow 128 levels, `serde_json` 127;
//! - the place of an error inside a word (`tru`) or an escape: we name its first byte, `serde_json` the byte where it went
//!   wrong; a line break in a string: we name the break, `serde_json` the line after it;
//! - the place of an end that comes too early: we name the byte behind the last one, `serde_json` the last one.

#![no_main]

use libfuzzer_sys::fuzz_target;
use sft_fast_core::json::{Data, MAX_DEPTH, Value, parse};

fn to_serde(value: &Value<'_>) -> serde_json::Value {
    match &value.data {
        Data::Null => serde_json::Value::Null,
        Data::Bool(flag) => (*flag).into(),
        Data::Number(text) => serde_json::from_str(text).expect("serde_json accepted it"),
        Data::String(text) => text.as_ref().into(),
        Data::Array(values) => values.iter().map(to_serde).collect(),
        Data::Object(members) => {
            members.iter().map(|member| (member.key.to_string(), to_serde(&member.value))).collect()
        }
    }
}

/// Every value and key begins where its offset says.
fn check_offsets(value: &Value<'_>, text: &str) {
    let first = text.as_bytes()[value.offset];
    let is_right = match &value.data {
        Data::Null => first == b'n',
        Data::Bool(flag) => first == if *flag { b't' } else { b'f' },
        Data::Number(number) => text[value.offset..].starts_with(&**number),
        Data::String(_) => first == b'"',
        Data::Array(values) => {
            values.iter().for_each(|value| check_offsets(value, text));
            first == b'['
        }
        Data::Object(members) => {
            for member in members {
                assert_eq!(b'"', text.as_bytes()[member.offset]);
                check_offsets(&member.value, text);
            }
            first == b'{'
        }
    };
    assert!(is_right, "{value:?} does not begin at its offset");
}

/// Line from 1, column from 1 in bytes.
fn place(text: &str, offset: usize) -> (usize, usize) {
    let before = &text.as_bytes()[..offset];
    let line_start = before.iter().rposition(|&byte| byte == b'\n').map_or(0, |newline| newline + 1);
    (1 + before.iter().filter(|&&byte| byte == b'\n').count(), 1 + offset - line_start)
}

fuzz_target!(|data: &[u8]| {
    let theirs = serde_json::from_slice::<serde_json::Value>(data);
    let Ok(text) = std::str::from_utf8(data) else {
        assert!(theirs.is_err(), "serde_json accepts what is not UTF-8");
        return;
    };
    match (parse(text), theirs) {
        (Ok(ours), Ok(theirs)) => {
            check_offsets(&ours, text);
            assert_eq!(theirs, to_serde(&ours));
        }
        (Err(ours), Err(theirs)) => {
            assert!(ours.offset <= text.len() && text.is_char_boundary(ours.offset));
            let reason = theirs.to_string();
            let is_within = ["expected ident", "invalid escape", "unicode", "surrogate", "hex escape"]
                .iter()
                .any(|part| reason.contains(part));
            let is_deep = reason.starts_with("recursion limit") || ours.message.contains("nested deeper");
            if is_within || is_deep || reason.starts_with("number out of range") {
                return;
            }
            if theirs.is_eof() {
                let rest = &text[ours.offset..];
                let is_cut_word = ["true", "false", "null"].iter().any(|word| word.starts_with(rest));
                assert!(is_cut_word || rest.starts_with('\\'), "{ours:?} {reason}");
                return;
            }
            if text.as_bytes().get(ours.offset) == Some(&b'\n') {
                return;
            }
            assert_eq!((theirs.line(), theirs.column()), place(text, ours.offset), "{ours:?} {reason}");
        }
        (Ok(_), Err(theirs)) => {
            let reason = theirs.to_string();
            assert!(reason.starts_with("number out of range") || reason.starts_with("recursion limit"), "{reason}");
        }
        (Err(ours), Ok(_)) => panic!("refused: {ours:?}, {MAX_DEPTH}"),
    }
});
