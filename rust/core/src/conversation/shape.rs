//! A record of any shape → what is made a sample of: a conversation, or plain text without a chat template.
//!
//! Its keys say which shape a record has, one record at a time; where the shape is set, another one is an error.

use std::borrow::Cow;
use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{
    Conversation, FieldMapping, Message, empty_answer, optional_text, quoted, read_tools, refuse_repeated_keys,
    require_answer, required_text, sharegpt, take, wrong_type,
};
use crate::error::{Error, ErrorKind, Result};
use crate::json::{Data, Member, Value};

/// How a record says what it says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// One turn in fields whose names are settings: Alpaca's shape.
    Fields,
    /// OpenAI's `messages`.
    Messages,
    /// ShareGPT's `conversations`.
    Conversations,
    /// `prompt` and `completion`: two texts, or two lists of messages.
    PromptCompletion,
    /// One text.
    Text,
}

impl Shape {
    const ALL: [Self; 5] = [Self::Fields, Self::Messages, Self::Conversations, Self::PromptCompletion, Self::Text];

    /// The shape of this name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|shape| shape.as_str() == name)
    }

    /// Its name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Fields => "fields",
            Self::Messages => "messages",
            Self::Conversations => "conversations",
            Self::PromptCompletion => "prompt_completion",
            Self::Text => "text",
        }
    }

    /// The keys that a record of the shape needs.
    fn keys(self, mapping: &FieldMapping) -> Vec<&str> {
        match self {
            Self::Fields => vec![&mapping.prompt_key, &mapping.response_key],
            Self::Messages => vec!["messages"],
            Self::Conversations => vec!["conversations"],
            Self::PromptCompletion => vec!["prompt", "completion"],
            Self::Text => vec![&mapping.text_key],
        }
    }

    /// The shape of a record with these keys. What is none is taken for fields, so that the error names their settings.
    fn find(members: &[Member<'_>], mapping: &FieldMapping) -> Self {
        let has = |key: &str| members.iter().any(|member| member.key == key);
        let (has_prompt, has_response) = (has(&mapping.prompt_key), has(&mapping.response_key));
        if has("messages") {
            Self::Messages
        } else if has("conversations") {
            Self::Conversations
        } else if has_prompt && has_response {
            Self::Fields
        } else if has("prompt") && has("completion") {
            Self::PromptCompletion
        } else if has(&mapping.text_key) && !has_prompt && !has_response {
            Self::Text
        } else {
            Self::Fields
        }
    }
}

/// Records by their shape.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShapeCounts([u64; Shape::ALL.len()]);

impl ShapeCounts {
    /// Counts a record.
    pub fn add(&mut self, shape: Shape) {
        self.0[shape as usize] += 1;
    }

    /// All records.
    pub fn total(&self) -> u64 {
        self.0.iter().sum()
    }

    /// The counts by the names of the shapes; those that are 0 are left out.
    pub fn to_map(&self) -> BTreeMap<String, u64> {
        let counts = Shape::ALL.into_iter().zip(self.0).filter(|(_, count)| *count > 0);
        counts.map(|(shape, count)| (shape.as_str().to_owned(), count)).collect()
    }

    /// Reads what [`to_map`](Self::to_map) wrote; `None` where a name is no shape's.
    pub fn from_map(counts: &BTreeMap<String, u64>) -> Option<Self> {
        let mut read = Self::default();
        for (name, count) in counts {
            read.0[Shape::named(name)? as usize] = *count;
        }
        Some(read)
    }
}

impl std::ops::AddAssign for ShapeCounts {
    fn add_assign(&mut self, other: Self) {
        self.0.iter_mut().zip(other.0).for_each(|(count, more)| *count += more);
    }
}

/// Text that no chat template frames.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlainText<'a> {
    /// What stands before it and is not trained on; empty where all is.
    pub prompt: Cow<'a, str>,
    /// What is trained on.
    pub text: Cow<'a, str>,
}

/// What a record holds.
#[derive(Clone, Debug, PartialEq)]
pub enum Content<'a> {
    /// Turns, for the chat template.
    Chat(Conversation<'a>),
    /// Text, as it is.
    Text(PlainText<'a>),
}

/// A record that was read.
#[derive(Clone, Debug, PartialEq)]
pub struct Record<'a> {
    /// Its shape.
    pub shape: Shape,
    /// What it holds.
    pub content: Content<'a>,
}

impl<'a> Record<'a> {
    /// Reads a record of the shape `expected`, or of whatever shape its keys show.
    ///
    /// # Errors
    /// Every error is of class [`Input`](crate::error::ErrorClass::Input) and carries the byte offset in the record.
    pub fn read(record: Value<'a>, mapping: &FieldMapping, expected: Option<Shape>) -> Result<Self> {
        let (type_name, offset) = (record.type_name(), record.offset);
        let Data::Object(mut members) = record.data else {
            return Err(Error::new(ErrorKind::WrongType, format!("expected a record (an object), found {type_name}"))
                .at_offset(offset));
        };
        refuse_repeated_keys(&members, "")?;
        let shape = match expected {
            None => Shape::find(&members, mapping),
            Some(shape) => {
                let keys = shape.keys(mapping);
                let has = |key: &&str| members.iter().any(|member| member.key == *key);
                if !keys.iter().all(has) {
                    return Err(wrong_shape(shape, &keys, &members, mapping).at_offset(offset));
                }
                shape
            }
        };
        let content = match shape {
            Shape::Fields => Content::Chat(Conversation::from_fields(members, offset, mapping)?),
            Shape::Messages => {
                let messages = take(&mut members, "messages").expect("it was found");
                Content::Chat(Conversation::from_messages(messages, "messages")?.with_tools(&mut members)?)
            }
            Shape::Conversations => {
                let messages = take(&mut members, "conversations").expect("it was found");
                let system = match &mapping.system_key {
                    Some(key) => optional_text(&mut members, key)?,
                    None => None,
                };
                Content::Chat(sharegpt::read(messages, system)?.with_tools(&mut members)?)
            }
            Shape::PromptCompletion => prompt_completion(&mut members)?,
            Shape::Text => {
                let (text, text_offset) = required_text(&mut members, &mapping.text_key, "text_key", offset)?;
                if text.trim().is_empty() {
                    return Err(empty_answer(text_offset, &mapping.text_key));
                }
                Content::Text(PlainText { prompt: Cow::Borrowed(""), text })
            }
        };
        Ok(Self { shape, content })
    }
}

fn wrong_shape(shape: Shape, keys: &[&str], members: &[Member<'_>], mapping: &FieldMapping) -> Error {
    let found: Vec<_> = members.iter().map(|member| &*member.key).collect();
    let other = Shape::find(members, mapping);
    let is_other = other.keys(mapping).iter().all(|key| found.contains(key));
    let named = if is_other { format!(" ('{}')", other.as_str()) } else { String::new() };
    let message = format!(
        "expected a record of the shape '{}', with {}, found {}{named}",
        shape.as_str(),
        quoted(keys),
        quoted(&found)
    );
    Error::new(ErrorKind::WrongShape, message).with_hint("record_shape=auto reads each record by its keys")
}

/// `prompt` and `completion`: messages, of which the answers of the completion are trained on, or texts.
fn prompt_completion<'a>(members: &mut [Member<'a>]) -> Result<Content<'a>> {
    let [prompt, completion] = ["prompt", "completion"].map(|key| take(members, key).expect("it was found"));
    let (completion_offset, completion_type) = (completion.offset, completion.type_name());
    match (prompt.data, completion.data) {
        (Data::String(prompt_text), Data::String(text)) => {
            if prompt_text.is_empty() {
                return Err(Error::new(ErrorKind::EmptyPrompt, "expected a prompt, found an empty text")
                    .at_offset(prompt.offset)
                    .at_location("prompt"));
            }
            if text.trim().is_empty() {
                return Err(empty_answer(completion_offset, "completion"));
            }
            Ok(Content::Text(PlainText { prompt: prompt_text, text }))
        }
        (Data::Array(values), completion @ Data::Array(_)) => {
            let mut messages = read_messages(values, "prompt")?;
            messages.iter_mut().for_each(|message| message.is_trained = false);
            let Data::Array(values) = completion else { unreachable!("it is an array") };
            let completion = read_messages(values, "completion")?;
            require_answer(&completion, completion_offset, "completion")?;
            messages.extend(completion);
            Ok(Content::Chat(Conversation { messages, tools: None }.with_tools(members)?))
        }
        (Data::String(_), _) => {
            Err(wrong_type("a string, as 'prompt' is", completion_type, completion_offset, "completion"))
        }
        (Data::Array(_), _) => {
            Err(wrong_type("an array of messages, as 'prompt' is", completion_type, completion_offset, "completion"))
        }
        (data, _) => {
            let type_name = Value { offset: prompt.offset, data }.type_name();
            Err(wrong_type("a string or an array of messages", type_name, prompt.offset, "prompt"))
        }
    }
}

/// Reads messages of OpenAI's shape from the array `place`.
pub(super) fn read_messages<'a>(values: Vec<Value<'a>>, place: &str) -> Result<Vec<Message<'a>>> {
    let read = |(index, value)| Message::from_value(value, &format!("{place}[{index}]"));
    values.into_iter().enumerate().map(read).collect()
}

impl<'a> Conversation<'a> {
    /// Takes the tools that stand beside the messages.
    fn with_tools(mut self, members: &mut [Member<'a>]) -> Result<Self> {
        self.tools = match take(members, "tools") {
            None => None,
            Some(tools) => read_tools(tools)?,
        };
        Ok(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::json::parse;

    fn read(text: &str, shape: Option<Shape>) -> Result<Record<'_>> {
        Record::read(parse(text).unwrap(), &FieldMapping::default(), shape)
    }

    // The keys of a record show its shape; of several shapes the one with turns goes first, plain text last.
    #[test]
    fn keys_show_the_shape() {
        let chat = r#"[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]"#;
        for (record, expected) in [
            (r#"{"text": "t", "instruction": "q", "output": "a"}"#.to_owned(), Shape::Fields),
            (format!(r#"{{"prompt": "q", "completion": "a", "messages": {chat}}}"#), Shape::Messages),
            (r#"{"conversations": [{"from": "gpt", "value": "a"}], "text": "t"}"#.into(), Shape::Conversations),
            (r#"{"text": "t", "prompt": "q", "completion": "a"}"#.into(), Shape::PromptCompletion),
            (r#"{"id": 7, "text": "t"}"#.into(), Shape::Text),
        ] {
            assert_eq!(expected, read(&record, None).unwrap().shape, "{record}");
            assert_eq!(expected, read(&record, Some(expected)).unwrap().shape);
        }
        assert_eq!(ErrorKind::MissingKey, read(r#"{"text": "t", "output": "a"}"#, None).unwrap_err().kind());
        let error = read(r#"{"id": 1, "text": "t"}"#, Some(Shape::Messages)).unwrap_err();
        assert_eq!(ErrorKind::WrongShape, error.kind());
        assert_eq!(
            "expected a record of the shape 'messages', with 'messages', found 'id', 'text' ('text')",
            error.message()
        );
    }

    // Of prompt and completion as messages, the answers of the completion alone are trained on.
    #[test]
    fn completions_are_trained_on() {
        let record = r#"{"prompt": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "q"}],
            "completion": [{"role": "assistant", "content": "b"}], "tools": [{}]}"#;
        let Content::Chat(conversation) = read(record, None).unwrap().content else { panic!("it has turns") };
        let trained: Vec<_> = conversation.messages.iter().map(|message| message.is_trained).collect();
        assert_eq!(vec![false, false, true], trained);
        assert!(conversation.tools.is_some());
    }

    // What is wrong with a pair or a text is named, with its place.
    #[test]
    fn wrong_texts_are_named() {
        for (record, code, location) in [
            (r#"{"prompt": "", "completion": "a"}"#, "empty_prompt", "prompt"),
            (r#"{"prompt": "q", "completion": " "}"#, "empty_answer", "completion"),
            (r#"{"prompt": "q", "completion": []}"#, "wrong_type", "completion"),
            (r#"{"prompt": [], "completion": "a"}"#, "wrong_type", "completion"),
            (r#"{"prompt": 1, "completion": "a"}"#, "wrong_type", "prompt"),
            (r#"{"prompt": [], "completion": []}"#, "no_answer", "completion"),
            (r#"{"prompt": [], "completion": [{"role": "assistant"}]}"#, "missing_key", "completion[0]"),
            (r#"{"text": "\n"}"#, "empty_answer", "text"),
            (r#"{"text": null}"#, "wrong_type", "text"),
        ] {
            let error = read(record, None).unwrap_err();
            assert_eq!((code, Some(location)), (error.kind().code(), error.location()), "{record}");
        }
    }

    // Counts go through a map and back; a name that is no shape's is refused.
    #[test]
    fn counts_have_names() {
        let mut counts = ShapeCounts::default();
        [Shape::Text, Shape::Fields, Shape::Text].into_iter().for_each(|shape| counts.add(shape));
        let map = counts.to_map();
        assert_eq!(
            vec![("fields", 1), ("text", 2)],
            map.iter().map(|(name, count)| (&**name, *count)).collect::<Vec<_>>()
        );
        assert_eq!((Some(counts), 3), (ShapeCounts::from_map(&map), counts.total()));
        assert_eq!(None, ShapeCounts::from_map(&BTreeMap::from([("poem".into(), 1)])));
    }
}
