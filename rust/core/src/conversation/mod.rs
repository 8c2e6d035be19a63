//! Record → conversation: which fields hold what, and the checks that need no template and no tokenizer.

mod history;
mod shape;
mod sharegpt;
mod trained;

use std::borrow::Cow;
use std::collections::HashSet;

use crate::error::{Error, ErrorKind, Result};
use crate::json::{self, Data, Member, Value};

pub use shape::{Content, PlainText, Record, Shape, ShapeCounts};
pub use trained::Answers;

/// Who speaks. The names are those of OpenAI's chat format, which chat templates expect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Instructions of the application.
    System,
    /// Newer name of [`Role::System`], which some templates tell apart.
    Developer,
    /// The person.
    User,
    /// The model: what is trained on.
    Assistant,
    /// The result of a tool call.
    Tool,
}

impl Role {
    const ALL: [Self; 5] = [Self::System, Self::Developer, Self::User, Self::Assistant, Self::Tool];

    /// The role that has this name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|role| role.as_str() == name)
    }

    /// The name as templates and records spell it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::Developer => "developer",
            Self::User => "user",
            Self::Assistant => "assistant",
            Self::Tool => "tool",
        }
    }
}

/// One turn. `fields` is the whole message as the template sees it, `role` and `content` included, in the record's order.
#[derive(Clone, Debug, PartialEq)]
pub struct Message<'a> {
    /// Who speaks.
    pub role: Role,
    /// All fields of the message.
    pub fields: Vec<Member<'a>>,
    /// Is it an answer that is trained on?
    pub is_trained: bool,
}

impl<'a> Message<'a> {
    /// A message of plain text.
    pub fn new(role: Role, content: impl Into<Cow<'a, str>>) -> Self {
        let member = |key: &'static str, value| Member { key: Cow::Borrowed(key), offset: 0, value };
        Self {
            role,
            fields: vec![member("role", Value::string(role.as_str())), member("content", Value::string(content))],
            is_trained: role == Role::Assistant,
        }
    }

    /// The value of `key`, where the message has it.
    pub fn get(&self, key: &str) -> Option<&Value<'a>> {
        self.fields.iter().find(|member| member.key == key).map(|member| &member.value)
    }
}

/// The turns of one record, and the tools the model may call.
#[derive(Clone, Debug, PartialEq)]
pub struct Conversation<'a> {
    /// The turns, in order.
    pub messages: Vec<Message<'a>>,
    /// The `tools` array of the record: JSON schemas, passed to the template as they are.
    pub tools: Option<Value<'a>>,
}

/// Which fields of a record hold what, for records that are not `messages`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FieldMapping {
    /// Field of the system prompt; a record may lack it.
    pub system_key: Option<String>,
    /// Field of the prompt; required.
    pub prompt_key: String,
    /// Field appended to the prompt after a newline; a record may lack it.
    pub query_key: Option<String>,
    /// Field of the answer; required.
    pub response_key: String,
    /// Field of the turns before, an array of pairs of prompt and answer; a record may lack it.
    pub history_key: Option<String>,
    /// Field of plain text.
    pub text_key: String,
}

impl Default for FieldMapping {
    fn default() -> Self {
        Self {
            system_key: None,
            prompt_key: "instruction".into(),
            query_key: None,
            response_key: "output".into(),
            history_key: None,
            text_key: "text".into(),
        }
    }
}

impl<'a> Conversation<'a> {
    /// Reads a record that holds turns, of whatever shape.
    ///
    /// For fields, the user's text is the prompt, or the prompt, a newline and the query where the query is not empty. A
    /// system field that is missing, null or empty makes no system message, so that the template's own default applies.
    ///
    /// # Errors
    /// Every error is of class [`Input`](crate::error::ErrorClass::Input) and carries the byte offset in the record.
    pub fn from_record(record: Value<'a>, mapping: &FieldMapping) -> Result<Self> {
        let offset = record.offset;
        match Record::read(record, mapping, None)?.content {
            Content::Chat(conversation) => Ok(conversation),
            Content::Text(_) => {
                Err(Error::new(ErrorKind::WrongShape, "expected turns, found plain text").at_offset(offset))
            }
        }
    }

    fn from_fields(mut members: Vec<Member<'a>>, offset: usize, mapping: &FieldMapping) -> Result<Self> {
        let mut messages = Vec::with_capacity(3);
        if let Some(key) = &mapping.system_key
            && let Some(system) = optional_text(&mut members, key)?
        {
            messages.push(Message::new(Role::System, system));
        }
        if let Some(key) = &mapping.history_key {
            history::read(&mut members, key, &mut messages)?;
        }
        let query = match &mapping.query_key {
            Some(key) => optional_text(&mut members, key)?,
            None => None,
        };
        let prompt = required_text(&mut members, &mapping.prompt_key, "prompt_key", offset)?;
        let response = required_text(&mut members, &mapping.response_key, "response_key", offset)?;
        let (prompt, prompt_offset) = prompt;
        if prompt.is_empty() && query.is_none() {
            return Err(Error::new(ErrorKind::EmptyPrompt, "expected a prompt, found an empty text")
                .at_offset(prompt_offset)
                .at_location(&*mapping.prompt_key));
        }
        let user = match query {
            Some(query) => Cow::Owned([&*prompt, &*query].join("\n")),
            None => prompt,
        };
        let (response, response_offset) = response;
        if response.trim().is_empty() {
            return Err(empty_answer(response_offset, &mapping.response_key));
        }
        messages.push(Message::new(Role::User, user));
        messages.push(Message::new(Role::Assistant, response));
        Ok(Self { messages, tools: None })
    }

    fn from_messages(messages: Value<'a>, place: &str) -> Result<Self> {
        let offset = messages.offset;
        let type_name = messages.type_name();
        let Data::Array(values) = messages.data else {
            return Err(wrong_type("an array of messages", type_name, offset, place));
        };
        let messages = shape::read_messages(values, place)?;
        require_answer(&messages, offset, place)?;
        Ok(Self { messages, tools: None })
    }
}

fn require_answer(messages: &[Message<'_>], offset: usize, place: &str) -> Result<()> {
    if messages.iter().any(|message| message.role == Role::Assistant) {
        return Ok(());
    }
    Err(Error::new(ErrorKind::NoAnswer, "expected at least one assistant message, found none")
        .at_offset(offset)
        .at_location(place))
}

/// `tools`: an array of schemas, or a text that holds one as JSON; null, an empty text and an empty array mean none.
fn read_tools(tools: Value<'_>) -> Result<Option<Value<'_>>> {
    let (type_name, offset) = (tools.type_name(), tools.offset);
    let refuse = |found: &str| Err(wrong_type("an array of tools", found, offset, "tools"));
    match tools.data {
        Data::Null => Ok(None),
        Data::Array(ref schemas) => Ok((!schemas.is_empty()).then_some(tools)),
        Data::String(text) if text.trim().is_empty() => Ok(None),
        Data::String(text) => match json::parse(&text) {
            Ok(parsed @ Value { data: Data::Array(_), .. }) => read_tools(parsed.into_owned()),
            Ok(parsed) => refuse(&format!("a text that holds {}", parsed.type_name())),
            Err(error) => refuse(&format!("a text that is not JSON: {}", error.message)),
        },
        _ => refuse(type_name),
    }
}

impl<'a> Message<'a> {
    fn from_value(value: Value<'a>, place: &str) -> Result<Self> {
        let offset = value.offset;
        let type_name = value.type_name();
        let Data::Object(mut fields) = value.data else {
            return Err(wrong_type("a message (an object)", type_name, offset, place));
        };
        refuse_repeated_keys(&fields, &format!("{place}."))?;
        let find = |key: &str| fields.iter().find(|member| member.key == key).map(|member| &member.value);
        let missing = |key: &str| {
            let found: Vec<_> = fields.iter().map(|member| &*member.key).collect();
            Error::new(ErrorKind::MissingKey, format!("expected the key '{key}', found {}", quoted(&found)))
                .at_offset(offset)
                .at_location(place)
        };

        let role = find("role").ok_or_else(|| missing("role"))?;
        let name = role
            .as_str()
            .ok_or_else(|| wrong_type("a string", role.type_name(), role.offset, &format!("{place}.role")))?;
        let role = Role::named(name).ok_or_else(|| {
            let known = Role::ALL.map(Role::as_str);
            Error::new(ErrorKind::UnknownRole, format!("expected a role of {}, found '{name}'", quoted(&known)))
                .at_offset(role.offset)
                .at_location(format!("{place}.role"))
        })?;

        let calls_tools =
            matches!(find("tool_calls"), Some(Value { data: Data::Array(calls), .. }) if !calls.is_empty());
        let is_answer = role == Role::Assistant && !calls_tools;
        match find("content") {
            None if is_answer || role != Role::Assistant => return Err(missing("content")),
            None => {}
            Some(Value { data: Data::Null, .. }) if !is_answer && role == Role::Assistant => {}
            Some(content) => match &content.data {
                Data::String(text) if is_answer && text.trim().is_empty() => {
                    return Err(empty_answer(content.offset, &format!("{place}.content")));
                }
                Data::Array(parts) if is_answer && parts.is_empty() => {
                    return Err(empty_answer(content.offset, &format!("{place}.content")));
                }
                Data::String(_) | Data::Array(_) => {}
                _ => {
                    let place = format!("{place}.content");
                    return Err(wrong_type("a text or a list of parts", content.type_name(), content.offset, &place));
                }
            },
        }
        let is_trained = trained::take_flag(&mut fields, role, place)?;
        Ok(Self { role, fields, is_trained })
    }
}

fn refuse_repeated_keys(members: &[Member<'_>], place: &str) -> Result<()> {
    let repeated = if members.len() <= 16 {
        let is_repeated = |&index: &usize| members[..index].iter().any(|earlier| earlier.key == members[index].key);
        (0..members.len()).find(is_repeated).map(|index| &members[index])
    } else {
        // Comparing all with all would take hours for an object of a million keys.
        let mut seen = HashSet::with_capacity(members.len());
        members.iter().find(|member| !seen.insert(&member.key))
    };
    match repeated {
        None => Ok(()),
        Some(member) => {
            let message = format!("expected each key once, found '{}' twice", member.key);
            Err(Error::new(ErrorKind::DuplicateKey, message)
                .at_offset(member.offset)
                .at_location(format!("{place}{}", member.key)))
        }
    }
}

/// Moves the value of `key` out; the key stays, so that messages can name all that were found.
fn take<'a>(members: &mut [Member<'a>], key: &str) -> Option<Value<'a>> {
    let member = members.iter_mut().find(|member| member.key == key)?;
    let offset = member.value.offset;
    Some(std::mem::replace(&mut member.value, Value { offset, data: Data::Null }))
}

fn optional_text<'a>(members: &mut [Member<'a>], key: &str) -> Result<Option<Cow<'a, str>>> {
    match take(members, key) {
        None | Some(Value { data: Data::Null, .. }) => Ok(None),
        Some(Value { data: Data::String(text), .. }) => Ok((!text.is_empty()).then_some(text)),
        Some(value) => Err(wrong_type("a string", value.type_name(), value.offset, key)),
    }
}

fn required_text<'a>(
    members: &mut [Member<'a>],
    key: &str,
    option: &str,
    record_offset: usize,
) -> Result<(Cow<'a, str>, usize)> {
    match take(members, key) {
        Some(Value { data: Data::String(text), offset }) => Ok((text, offset)),
        Some(value) => Err(wrong_type("a string", value.type_name(), value.offset, key)),
        None => {
            let found: Vec<_> = members.iter().map(|member| &*member.key).collect();
            Err(Error::new(ErrorKind::MissingKey, format!("expected the key '{key}', found {}", quoted(&found)))
                .at_offset(record_offset)
                .with_hint(format!(
                    "set {option} to the field that holds it, or give the record a 'messages' or 'conversations' array"
                )))
        }
    }
}

fn quoted(names: &[&str]) -> String {
    match names {
        [] => "no keys".into(),
        names => names.iter().map(|name| format!("'{name}'")).collect::<Vec<_>>().join(", "),
    }
}

fn wrong_type(expected: &str, found: &str, offset: usize, location: &str) -> Error {
    Error::new(ErrorKind::WrongType, format!("expected {expected}, found {found}"))
        .at_offset(offset)
        .at_location(location)
}

fn empty_answer(offset: usize, location: &str) -> Error {
    Error::new(ErrorKind::EmptyAnswer, "expected an answer to learn, found an empty text")
        .at_offset(offset)
        .at_location(location)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::json::parse;

    fn read(text: &str) -> Result<Conversation<'_>> {
        let mapping = FieldMapping {
            system_key: Some("system".into()),
            query_key: Some("input".into()),
            ..FieldMapping::default()
        };
        Conversation::from_record(parse(text).unwrap(), &mapping)
    }

    fn turns(text: &str) -> Vec<(&'static str, String)> {
        let conversation = read(text).unwrap();
        let content = |message: &Message<'_>| message.get("content").unwrap().as_str().unwrap().to_owned();
        conversation.messages.iter().map(|message| (message.role.as_str(), content(message))).collect()
    }

    fn failure(text: &str) -> (&'static str, char, Option<String>) {
        let error = read(text).unwrap_err();
        let found = text[error.offset().unwrap()..].chars().next().unwrap();
        (error.kind().code(), found, error.location().map(Into::into))
    }

    // The user's text is prompt, newline, query; system and query are left out where the record leaves them out.
    #[test]
    fn fields_become_messages() {
        assert_eq!(
            vec![("system", "s".into()), ("user", "p\nq".into()), ("assistant", "a".into())],
            turns(r#"{"system":"s","instruction":"p","input":"q","output":"a"}"#)
        );
        assert_eq!(
            vec![("user", "p".into()), ("assistant", "a".into())],
            turns(r#"{"system":null,"instruction":"p","input":"","output":"a","other":[1]}"#)
        );
    }

    // `messages` keeps every field of every message, and the tools.
    #[test]
    fn messages_are_kept_whole() {
        let text = r#"{"tools":[{"name":"f"}],"messages":[{"role":"user","content":"q","name":"n"},
            {"role":"assistant","content":null,"tool_calls":[{}]},{"role":"tool","content":"r"},{"role":"assistant","content":"a"}]}"#;
        let conversation = read(text).unwrap();

        assert_eq!(4, conversation.messages.len());
        assert_eq!(Some("n"), conversation.messages[0].get("name").and_then(Value::as_str));
        assert!(conversation.tools.is_some());
    }

    // A missing key is told with all the keys that are there, in their order.
    #[test]
    fn missing_keys_are_told_with_the_others() {
        let message = |text: &str| read(text).unwrap_err().message().to_owned();
        assert_eq!(
            "expected the key 'output', found 'system', 'instruction', 'input', 'answer'",
            message(r#"{"system":"s","instruction":"p","input":"q","answer":"a"}"#)
        );
        assert_eq!("expected the key 'instruction', found no keys", message("{}"));
    }

    // A key is found to be repeated however many keys there are.
    #[test]
    fn repeated_keys_are_found_among_many() {
        for num_keys in [1, 15, 16, 17, 100_000] {
            let keys: Vec<_> = (0..num_keys).map(|number| format!("\"{number}\":0")).collect();
            let record = |more: &str| format!(r#"{{"instruction":"p",{},{more}}}"#, keys.join(","));
            assert!(read(&record(r#""output":"a""#)).is_ok());
            let error = read(&record(r#""0":1,"output":"a""#)).map(|_| ()).unwrap_err();
            assert_eq!((ErrorKind::DuplicateKey, Some("0")), (error.kind(), error.location()));
        }
    }

    // Every bad record is refused by name, at the byte of the offending value, with its place in the record.
    #[test]
    fn bad_records_are_named() {
        let at = |place: &str| Some(place.to_owned());
        assert_eq!(("wrong_type", '[', None), failure("[1]"));
        assert_eq!(("missing_key", '{', None), failure(r#"{"instruction":"p"}"#));
        assert_eq!(("wrong_type", '7', at("output")), failure(r#"{"instruction":"p","output":7}"#));
        assert_eq!(("wrong_type", 'n', at("output")), failure(r#"{"instruction":"p","output":null}"#));
        assert_eq!(("wrong_type", '[', at("input")), failure(r#"{"instruction":"p","input":[],"output":"a"}"#));
        assert_eq!(("empty_prompt", '"', at("instruction")), failure(r#"{"instruction":"","output":"a"}"#));
        assert_eq!(("empty_answer", '"', at("output")), failure(r#"{"instruction":"p","output":" \n"}"#));
        assert_eq!(("duplicate_key", '"', at("output")), failure(r#"{"instruction":"p","output":"a","output":"b"}"#));
        assert_eq!(("wrong_type", '{', at("messages")), failure(r#"{"messages":{}}"#));
        assert_eq!(("no_answer", '[', at("messages")), failure(r#"{"messages":[{"role":"user","content":"x"}]}"#));
        assert_eq!(("wrong_type", '3', at("messages[0]")), failure(r#"{"messages":[3]}"#));
        assert_eq!(("missing_key", '{', at("messages[0]")), failure(r#"{"messages":[{"content":"x"}]}"#));
        assert_eq!(("missing_key", '{', at("messages[0]")), failure(r#"{"messages":[{"role":"user"}]}"#));
        assert_eq!(
            ("unknown_role", '"', at("messages[0].role")),
            failure(r#"{"messages":[{"role":"robot","content":"x"}]}"#)
        );
        assert_eq!(
            ("wrong_type", 'n', at("messages[0].content")),
            failure(r#"{"messages":[{"role":"user","content":null}]}"#)
        );
        assert_eq!(
            ("empty_answer", '"', at("messages[0].content")),
            failure(r#"{"messages":[{"role":"assistant","content":""}]}"#)
        );
        assert_eq!(
            ("wrong_type", '5', at("tools")),
            failure(r#"{"tools":5,"messages":[{"role":"assistant","content":"a"}]}"#)
        );
    }
}
