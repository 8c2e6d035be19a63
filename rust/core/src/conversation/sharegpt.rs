//! ShareGPT's shape: `conversations`, an array of `{"from": …, "value": …}`, with the names that its users give to roles.
//!
//! `function_call` is an assistant message whose value is the call, or an array of calls, as JSON; `observation` is the
//! result of one. Both become what OpenAI's shape has for them, which is what chat templates render. A message with `role`
//! instead of `from` is read as one of OpenAI's shape: many data sets keep such messages under this name.

use std::borrow::Cow;

use super::trained::take_flag;
use super::{Conversation, Message, Role, empty_answer, quoted, refuse_repeated_keys, require_answer, wrong_type};
use crate::error::{Error, ErrorKind, Result};
use crate::json::{self, Data, Member, Value};

const PLACE: &str = "conversations";

/// Who speaks, by the names in use; `None` for a function call.
const NAMES: [(&str, Option<Role>); 12] = [
    ("system", Some(Role::System)),
    ("human", Some(Role::User)),
    ("user", Some(Role::User)),
    ("gpt", Some(Role::Assistant)),
    ("assistant", Some(Role::Assistant)),
    ("model", Some(Role::Assistant)),
    ("chatgpt", Some(Role::Assistant)),
    ("function_call", None),
    ("observation", Some(Role::Tool)),
    ("tool", Some(Role::Tool)),
    ("function_response", Some(Role::Tool)),
    ("developer", Some(Role::Developer)),
];

/// Reads the array; `system` is the system prompt that the record has beside it.
pub fn read<'a>(conversations: Value<'a>, system: Option<Cow<'a, str>>) -> Result<Conversation<'a>> {
    let (offset, type_name) = (conversations.offset, conversations.type_name());
    let Data::Array(values) = conversations.data else {
        return Err(wrong_type("an array of messages", type_name, offset, PLACE));
    };
    let mut messages = Vec::with_capacity(values.len() + 1);
    messages.extend(system.map(|system| Message::new(Role::System, system)));
    for (index, value) in values.into_iter().enumerate() {
        messages.push(read_message(value, &format!("{PLACE}[{index}]"))?);
    }
    require_answer(&messages, offset, PLACE)?;
    Ok(Conversation { messages, tools: None })
}

fn read_message<'a>(value: Value<'a>, place: &str) -> Result<Message<'a>> {
    let (offset, type_name) = (value.offset, value.type_name());
    let Data::Object(mut members) = value.data else {
        return Err(wrong_type("a message (an object)", type_name, offset, place));
    };
    let has = |key: &str| members.iter().any(|member| member.key == key);
    if has("role") && !has("from") {
        return Message::from_value(Value { offset, data: Data::Object(members) }, place);
    }
    refuse_repeated_keys(&members, &format!("{place}."))?;
    let (from, from_offset) = take_text(&mut members, "from", offset, place)?;
    let Some((_, role)) = NAMES.iter().find(|(name, _)| *name == from) else {
        let known = NAMES.map(|(name, _)| name);
        return Err(Error::new(ErrorKind::UnknownRole, format!("expected one of {}, found '{from}'", quoted(&known)))
            .at_offset(from_offset)
            .at_location(format!("{place}.from")));
    };
    let (text, text_offset) = take_text(&mut members, "value", offset, place)?;
    let is_trained = take_flag(&mut members, role.unwrap_or(Role::Assistant), place)?;
    let message = match role {
        None => function_call(&text, text_offset, place)?,
        Some(Role::Assistant) if text.trim().is_empty() => {
            return Err(empty_answer(text_offset, &format!("{place}.value")));
        }
        Some(role) => Message::new(*role, text),
    };
    Ok(Message { is_trained, ..message })
}

fn take_text<'a>(members: &mut [Member<'a>], key: &str, offset: usize, place: &str) -> Result<(Cow<'a, str>, usize)> {
    match super::take(members, key) {
        Some(Value { data: Data::String(text), offset }) => Ok((text, offset)),
        Some(value) => Err(wrong_type("a string", value.type_name(), value.offset, &format!("{place}.{key}"))),
        None => {
            let found: Vec<_> = members.iter().map(|member| &*member.key).collect();
            Err(Error::new(ErrorKind::MissingKey, format!("expected the key '{key}', found {}", quoted(&found)))
                .at_offset(offset)
                .at_location(place))
        }
    }
}

/// An assistant message that calls the tools that `text` names: `{"name": …, "arguments": …}`, or an array of those.
fn function_call(text: &str, offset: usize, place: &str) -> Result<Message<'static>> {
    let refuse = |found: &str| {
        let expected = "a function call as JSON, {\"name\": …, \"arguments\": …}, or an array of them";
        wrong_type(expected, found, offset, &format!("{place}.value"))
    };
    let parsed = json::parse(text).map_err(|error| refuse(&format!("a text that is not JSON: {}", error.message)))?;
    let calls = match parsed.into_owned() {
        Value { data: Data::Array(calls), .. } if !calls.is_empty() => calls,
        call => vec![call],
    };
    let member = |key: &'static str, value| Member { key: key.into(), offset: 0, value };
    let value = |data| Value { offset: 0, data };
    let mut tool_calls = Vec::with_capacity(calls.len());
    for call in calls {
        let has_name = match &call.data {
            Data::Object(members) => members.iter().any(|member| member.key == "name"),
            _ => return Err(refuse(call.type_name())),
        };
        if !has_name {
            return Err(refuse("an object without a name"));
        }
        tool_calls.push(value(Data::Object(vec![member("type", Value::string("function")), member("function", call)])));
    }
    let mut message = Message::new(Role::Assistant, "");
    message.fields.push(member("tool_calls", value(Data::Array(tool_calls))));
    Ok(message)
}

#[cfg(test)]
mod tests {
    use super::super::FieldMapping;
    use super::*;

    fn read(text: &str) -> Result<Conversation<'_>> {
        Conversation::from_record(json::parse(text).unwrap(), &FieldMapping::default())
    }

    // Every name of a role becomes a role, a function call becomes tool calls, and tools may be a text.
    #[test]
    fn becomes_openai_shape() {
        let text = r#"{"conversations": [{"from": "human", "value": "q"},
            {"from": "function_call", "value": "{\"name\": \"f\", \"arguments\": {\"x\": 1}}"},
            {"from": "observation", "value": "r"}, {"from": "gpt", "value": "a"}], "tools": "[{\"name\": \"f\"}]"}"#;
        let conversation = read(text).unwrap();

        let roles: Vec<_> = conversation.messages.iter().map(|message| message.role.as_str()).collect();
        assert_eq!(vec!["user", "assistant", "tool", "assistant"], roles);
        let Some(Data::Array(calls)) = conversation.messages[1].get("tool_calls").map(|calls| &calls.data) else {
            panic!("no tool calls")
        };
        let Data::Object(call) = &calls[0].data else { panic!("a call is an object") };
        let Data::Object(function) = &call[1].value.data else { panic!("a function is an object") };
        assert_eq!(Some("f"), function[0].value.as_str());
        assert!(matches!(conversation.tools, Some(Value { data: Data::Array(_), .. })));
    }

    // A message with `role` is one of OpenAI's shape, with its place in this array.
    #[test]
    fn openai_messages_are_read() {
        let text = r#"{"conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}"#;
        let expected = text.replace("conversations", "messages");
        let contents = |text: &str| -> Vec<_> {
            let messages = read(text).unwrap().messages;
            messages
                .iter()
                .map(|message| (message.role, message.get("content").unwrap().as_str().unwrap().to_owned()))
                .collect()
        };
        assert_eq!(contents(&expected), contents(text));
        let error = read(r#"{"conversations": [{"role": "robot", "content": "q"}]}"#).unwrap_err();
        assert_eq!(Some("conversations[0].role"), error.location());
    }

    // What is wrong is named, with its place in the record.
    #[test]
    fn bad_messages_are_named() {
        let failure = |text: &str| {
            let error = read(&format!(r#"{{"conversations": {text}}}"#)).unwrap_err();
            (error.kind().code(), error.location().unwrap().to_owned())
        };
        assert_eq!(("wrong_type", "conversations".into()), failure("{}"));
        assert_eq!(("no_answer", "conversations".into()), failure(r#"[{"from": "human", "value": "q"}]"#));
        assert_eq!(("unknown_role", "conversations[0].from".into()), failure(r#"[{"from": "robot", "value": "q"}]"#));
        assert_eq!(("missing_key", "conversations[0]".into()), failure(r#"[{"from": "human"}]"#));
        assert_eq!(("wrong_type", "conversations[0].value".into()), failure(r#"[{"from": "human", "value": 1}]"#));
        assert_eq!(("empty_answer", "conversations[0].value".into()), failure(r#"[{"from": "gpt", "value": ""}]"#));
        let call = r#"[{"from": "function_call", "value": "{\"arguments\": {}}"}]"#;
        assert_eq!(("wrong_type", "conversations[0].value".into()), failure(call));
    }
}
