//! Earlier turns of a record of fields: an array of pairs, each a prompt and its answer.

use std::borrow::Cow;

use super::{Message, Role, empty_answer, take, wrong_type};
use crate::error::Result;
use crate::json::{Data, Member, Value};

/// Puts the turns that the field `key` holds behind `messages`; a field that is missing, null or empty holds none. Their
/// answers are trained on as any other.
pub fn read<'a>(members: &mut [Member<'a>], key: &str, messages: &mut Vec<Message<'a>>) -> Result<()> {
    let Some(Value { offset, data }) = take(members, key) else { return Ok(()) };
    let pairs = match data {
        Data::Null => return Ok(()),
        Data::Array(pairs) => pairs,
        data => {
            let type_name = Value { offset, data }.type_name();
            return Err(wrong_type("an array of pairs of prompt and answer", type_name, offset, key));
        }
    };
    for (index, pair) in pairs.into_iter().enumerate() {
        let place = format!("{key}[{index}]");
        let (offset, type_name) = (pair.offset, pair.type_name());
        let pair: [Value<'a>; 2] = match pair.data {
            Data::Array(texts) => texts.try_into().map_err(|texts: Vec<_>| {
                wrong_type("a prompt and an answer", &format!("{} values", texts.len()), offset, &place)
            })?,
            _ => return Err(wrong_type("an array of a prompt and an answer", type_name, offset, &place)),
        };
        let [prompt, answer] = pair;
        let answer_offset = answer.offset;
        let (prompt, answer) = (text(prompt, &format!("{place}[0]"))?, text(answer, &format!("{place}[1]"))?);
        if answer.trim().is_empty() {
            return Err(empty_answer(answer_offset, &format!("{place}[1]")));
        }
        messages.push(Message::new(Role::User, prompt));
        messages.push(Message::new(Role::Assistant, answer));
    }
    Ok(())
}

fn text<'a>(value: Value<'a>, place: &str) -> Result<Cow<'a, str>> {
    let (type_name, offset) = (value.type_name(), value.offset);
    match value.data {
        Data::String(text) => Ok(text),
        _ => Err(wrong_type("a string", type_name, offset, place)),
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Conversation, FieldMapping};
    use super::*;
    use crate::json::parse;

    fn read(history: &str) -> Result<Vec<String>> {
        let mapping = FieldMapping { history_key: Some("history".into()), ..FieldMapping::default() };
        let text = format!(r#"{{"instruction": "q", "output": "a", "history": {history}}}"#);
        let conversation = Conversation::from_record(parse(&text).unwrap().into_owned(), &mapping)?;
        let content = |message: &Message<'_>| message.get("content").unwrap().as_str().unwrap().to_owned();
        Ok(conversation.messages.iter().map(content).collect())
    }

    // Earlier turns come first, in order; there may be none.
    #[test]
    fn history_comes_first() {
        assert_eq!(vec!["1", "2", "", "4", "q", "a"], read(r#"[["1", "2"], ["", "4"]]"#).unwrap());
        assert_eq!(vec!["q", "a"], read("null").unwrap());
        assert_eq!(vec!["q", "a"], read("[]").unwrap());
    }

    // What is no pair of texts is named, with its place.
    #[test]
    fn wrong_history_is_named() {
        for (history, code, location) in [
            (r#""x""#, "wrong_type", "history"),
            (r#"["x"]"#, "wrong_type", "history[0]"),
            (r#"[["1", "2"], ["3"]]"#, "wrong_type", "history[1]"),
            (r#"[["1", null]]"#, "wrong_type", "history[0][1]"),
            (r#"[["1", " "]]"#, "empty_answer", "history[0][1]"),
        ] {
            let error = read(history).unwrap_err();
            assert_eq!((code, Some(location)), (error.kind().code(), error.location()), "{history}");
        }
    }
}
