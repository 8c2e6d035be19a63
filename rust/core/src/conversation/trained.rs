//! Which answers of a conversation are trained on: all, unless the record or the settings say otherwise.

use super::{Conversation, Role, wrong_type};
use crate::error::Result;
use crate::json::{Data, Member};

/// Which answers are trained on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Answers {
    /// All.
    #[default]
    All,
    /// The last one of a conversation.
    Last,
}

impl Answers {
    /// The policy of this name.
    pub fn named(name: &str) -> Option<Self> {
        [Self::All, Self::Last].into_iter().find(|policy| policy.as_str() == name)
    }

    /// Its name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::All => "all_answers",
            Self::Last => "last_answer",
        }
    }
}

impl Conversation<'_> {
    /// Takes the answers out of the training that the settings do not want: all but the last, or those that call tools.
    pub fn train_on(&mut self, answers: Answers, tool_calls: bool) {
        if answers == Answers::Last {
            let mut is_later = false;
            for message in self.messages.iter_mut().rev().filter(|message| message.role == Role::Assistant) {
                message.is_trained &= !is_later;
                is_later = true;
            }
        }
        if !tool_calls {
            for message in &mut self.messages {
                let calls = message.get("tool_calls");
                let has_calls =
                    calls.is_some_and(|calls| matches!(&calls.data, Data::Array(calls) if !calls.is_empty()));
                message.is_trained &= !has_calls;
            }
        }
    }
}

/// Takes `weight` (0 or 1) and `train` out of a message: whether it is trained on. Only answers are; that another message
/// is not may be said.
pub(super) fn take_flag(fields: &mut Vec<Member<'_>>, role: Role, place: &str) -> Result<bool> {
    let mut is_trained = role == Role::Assistant;
    for key in ["weight", "train"] {
        let Some(at) = fields.iter().position(|member| member.key == key) else { continue };
        let value = fields.remove(at).value;
        let expected = if key == "weight" { "the number 0 or 1" } else { "true or false" };
        let flag = match &value.data {
            Data::Null => continue,
            Data::Bool(flag) if key == "train" => *flag,
            Data::Number(number) if key == "weight" && matches!(number.parse(), Ok(0.0)) => false,
            Data::Number(number) if key == "weight" && matches!(number.parse(), Ok(1.0)) => true,
            Data::Number(number) => {
                return Err(wrong_type(expected, &format!("{number:.20}"), value.offset, &format!("{place}.{key}")));
            }
            _ => return Err(wrong_type(expected, value.type_name(), value.offset, &format!("{place}.{key}"))),
        };
        if flag && role != Role::Assistant {
            let expected = "an answer where a message is to be trained on";
            let found = format!("a message of the role '{}'", role.as_str());
            return Err(wrong_type(expected, &found, value.offset, &format!("{place}.{key}")));
        }
        is_trained &= flag;
    }
    Ok(is_trained)
}

#[cfg(test)]
mod tests {
    use super::super::FieldMapping;
    use super::*;
    use crate::json::parse;

    fn read(messages: &str) -> Result<Conversation<'_>> {
        let record = parse(messages).unwrap();
        Conversation::from_record(record, &FieldMapping::default())
    }

    fn trained(conversation: &Conversation<'_>) -> Vec<usize> {
        let messages = conversation.messages.iter().enumerate();
        messages.filter(|(_, message)| message.is_trained).map(|(index, _)| index).collect()
    }

    const CHAT: &str = r#"{"messages": [{"role": "user", "content": "q", "train": false}, {"role": "assistant", "content": "a", "weight": 0},
        {"role": "assistant", "content": "b", "tool_calls": [{}], "weight": 1.0}, {"role": "assistant", "content": "c", "train": true, "weight": null}]}"#;

    // Answers are trained on unless their weight is 0, and the settings take out more; no template sees the flags.
    #[test]
    fn answers_are_chosen() {
        let mut conversation = read(CHAT).unwrap();
        assert_eq!(vec![2, 3], trained(&conversation));
        assert!(conversation.messages.iter().all(|message| message.get("weight").or(message.get("train")).is_none()));
        conversation.train_on(Answers::All, false);
        assert_eq!(vec![3], trained(&conversation));
        let mut conversation = read(CHAT).unwrap();
        conversation.train_on(Answers::Last, true);
        assert_eq!(vec![3], trained(&conversation));

        let shared = r#"{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "train": false}, {"from": "gpt", "value": "b"}]}"#;
        assert_eq!(vec![2], trained(&read(shared).unwrap()));
    }

    // A weight that is neither 0 nor 1, and one on a message that is no answer, are errors with their place.
    #[test]
    fn wrong_flags_are_refused() {
        let with = |role: &str, flag: &str| {
            format!(
                r#"{{"messages": [{{"role": "assistant", "content": "a"}}, {{"role": "{role}", "content": "b", {flag}}}]}}"#
            )
        };
        for (role, flag, found) in [
            ("assistant", r#""weight": 0.5"#, "0.5"),
            ("assistant", r#""weight": true"#, "a boolean"),
            ("assistant", r#""train": 1"#, "1"),
            ("user", r#""weight": 1"#, "a message of the role 'user'"),
        ] {
            let text = with(role, flag);
            let error = read(&text).unwrap_err();
            assert!(error.message().ends_with(&format!("found {found}")), "{}", error.message());
            assert!(error.location().unwrap().starts_with("messages[1]."));
        }
    }
}
