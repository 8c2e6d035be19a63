//! What a template sees of a conversation: messages as `transformers` hands them over.
//!
//! `apply_chat_template` leaves out the fields that are null, and gives the reasoning of a message under all the names
//! that templates read it by. Everything else is passed as it is, without a copy.

use std::collections::HashSet;
use std::rc::Rc;

use super::thinking;
use super::trace::{Trace, Traced};
use super::value::{Dict, Items, Text, Value};
use crate::conversation::{Conversation, Message};
use crate::error::{Error, ErrorKind, Result};
use crate::json::{self, Data, Member};

/// The messages as a list.
pub(super) fn messages<'a>(messages: &'a [Message<'a>]) -> Items<'a> {
    list(messages.iter().map(|message| {
        let is_plain = |member: &Member<'_>| !matches!(member.value.data, Data::Null) && !is_reasoning(&member.key);
        match message.fields.iter().all(is_plain) {
            true => Value::Dict(Dict::Json(&message.fields)),
            false => dict(message, |_, member| Value::of_member(member)),
        }
    }))
}

/// The messages as a list whose texts are traced, but for roles and for the last `num_untraced` contents.
pub(super) fn traced<'a>(messages: &'a [Message<'a>], trace: &'a Trace, num_untraced: usize) -> Items<'a> {
    let first_untraced = messages.len() - num_untraced;
    list(messages.iter().enumerate().map(|(index, message)| {
        dict(message, |field, member| match member.value.as_str() {
            Some(text) if member.key != "role" && (index < first_untraced || member.key != "content") => {
                Value::Text(Text::Traced(Rc::new(Traced::new((index, field), text, trace))))
            }
            _ => Value::of_member(member),
        })
    }))
}

fn list<'a>(messages: impl Iterator<Item = Value<'a>>) -> Items<'a> {
    let list = Value::list(messages.collect()).and_then(|list| list.iterate());
    list.expect("messages of a record nest no deeper than JSON may")
}

fn is_reasoning(key: &str) -> bool {
    thinking::FIELDS.contains(&key)
}

/// A message as a dict of what `convert` makes of its fields.
fn dict<'a>(message: &'a Message<'a>, convert: impl Fn(usize, &'a Member<'a>) -> Value<'a>) -> Value<'a> {
    let fields = message.fields.iter().enumerate().filter(|(_, member)| !matches!(member.value.data, Data::Null));
    let mut fields: Vec<(Value<'a>, Value<'a>)> =
        fields.map(|(index, member)| (Value::record(&member.key), convert(index, member))).collect();
    let find =
        |fields: &[(Value<'a>, Value<'a>)], name: &str| fields.iter().position(|(key, _)| key.as_str() == Some(name));
    let reasoning = thinking::FIELDS.iter().find_map(|name| find(&fields, name)).map(|at| fields[at].1.clone());
    if let Some(reasoning) = reasoning {
        if find(&fields, "thinking").is_none() {
            fields.insert(0, (Value::text("thinking"), reasoning.clone()));
        }
        match find(&fields, "reasoning_content") {
            Some(at) => fields[at].1 = reasoning,
            None => fields.push((Value::text("reasoning_content"), reasoning)),
        }
    }
    Value::dict(fields).expect("a message of a record nests no deeper than JSON may")
}

/// Refuses what Python would read in another way than it is written: integers beyond 128 bits, and objects that name a
/// key twice.
pub(super) fn check(conversation: &Conversation<'_>) -> Result<()> {
    for (index, message) in conversation.messages.iter().enumerate() {
        for member in &message.fields {
            check_value(&member.value)
                .map_err(|error| error.at_location(format!("messages[{index}].{}", member.key)))?;
        }
    }
    match &conversation.tools {
        Some(tools) => check_value(tools).map_err(|error| error.at_location("tools")),
        None => Ok(()),
    }
}

fn check_value(value: &json::Value<'_>) -> Result<()> {
    match &value.data {
        Data::Array(values) => values.iter().try_for_each(check_value),
        Data::Object(members) => {
            let mut seen = HashSet::new();
            for member in members {
                if !seen.insert(&*member.key) {
                    let message = format!("expected each key once, found '{}' twice", member.key);
                    return Err(Error::new(ErrorKind::DuplicateKey, message).at_offset(member.offset));
                }
                check_value(&member.value)?;
            }
            Ok(())
        }
        Data::Number(text) if !text.contains(['.', 'e', 'E']) && text.parse::<i128>().is_err() => {
            let message = format!("expected an integer of at most 128 bits, found {text:.60}");
            Err(Error::new(ErrorKind::WrongType, message).at_offset(value.offset))
        }
        _ => Ok(()),
    }
}
