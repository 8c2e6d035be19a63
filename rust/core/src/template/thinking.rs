//! What answers think: how a template writes it, and the answers whose thinking it leaves out.
//!
//! Many templates drop the thinking of earlier turns. Such an answer stands in the text without the thinking that led to
//! it; to train on it would teach the model not to think. And an answer behind another one, such as a tool call, whose
//! thinking was there when it was written, stands behind a text that the model did not see; so it is left out likewise. A thought is in the text if it stands at the beginning of its
//! answer, framed as the template frames thoughts or as the record does itself, `<think>…</think>`.

use super::spans::{ANSWER, QUESTION, unproved};
use super::{ChatTemplate, Rendered};
use crate::conversation::{Conversation, Message, Role};
use crate::error::{Error, ErrorKind, Result};
use crate::json::{Member, Value};

/// What becomes of an answer whose thinking the template leaves out of the text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DroppedThinking {
    /// It is not trained on, and counted; the other answers are.
    #[default]
    Skip,
    /// It is trained on in a sample of its own, the conversation up to it, where its thinking is shown.
    Split,
    /// The record is left out.
    Reject,
    /// It is trained on as the template writes it.
    Keep,
}

impl DroppedThinking {
    /// The policy of this name.
    pub fn named(name: &str) -> Option<Self> {
        let all = [Self::Skip, Self::Split, Self::Reject, Self::Keep];
        all.into_iter().find(|policy| policy.as_str() == name)
    }

    /// Its name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Skip => "skip",
            Self::Split => "split",
            Self::Reject => "reject",
            Self::Keep => "keep",
        }
    }
}

/// What the text of a template shows of thoughts, learned when it is compiled.
#[derive(Clone, Debug, Default)]
pub(super) struct Thinking {
    /// What stands before a thought in its answer, and behind it, without white space around; empty where the generation
    /// prompt opens the thought. `None` where the template does not know thoughts.
    frame: Option<(String, String)>,
    /// Does it leave out the thoughts of earlier turns?
    pub drops_earlier: bool,
}

const OPENING: &str = "<think>";
const CLOSING: &str = "</think>";
const THOUGHT: &str = "A thought!";
/// The fields of a message that hold its thinking; the first that is there is the one that counts.
pub(super) const FIELDS: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

impl Thinking {
    /// Tries the template on short conversations.
    pub fn learn(template: &ChatTemplate) -> Self {
        let mut answer = Message::new(Role::Assistant, ANSWER);
        answer.fields.push(Member { key: FIELDS[0].into(), offset: 0, value: Value::string(THOUGHT) });
        let turn = [Message::new(Role::User, QUESTION), answer];
        let render = |messages: Vec<Message<'_>>| {
            let mut rendered = Rendered::default();
            let conversation = Conversation { messages, tools: None };
            template.render_without_plan(&conversation, &mut rendered).is_ok().then_some(rendered)
        };
        let frame = render(turn.to_vec()).and_then(|Rendered { text, spans, .. }| {
            let (before, behind) = text[spans.first()?.start..].split_once(THOUGHT)?;
            let (behind, _) = behind.split_once(ANSWER)?;
            Some((before.trim().to_owned(), behind.trim().to_owned()))
        });
        let both = render([turn.clone(), turn].concat());
        let drops_earlier = both.is_some_and(|rendered| rendered.text.matches(THOUGHT).count() == 1);
        Self { frame: frame.filter(|(_, closing)| !closing.is_empty()), drops_earlier }
    }

    /// Does it write the thinking of the last answer?
    pub fn is_shown(&self) -> bool {
        self.frame.is_some()
    }

    /// Takes answers whose thinking is left out of `rendered`, by `policy`, and thoughts where they are not to be trained on.
    ///
    /// # Errors
    /// [`ErrorKind::ThinkingDropped`] by [`DroppedThinking::Reject`]; [`ErrorKind::MaskUnproved`] where the template's own
    /// marks do not tell which answer they belong to.
    pub fn review(
        &self,
        conversation: &Conversation<'_>,
        rendered: &mut Rendered,
        policy: DroppedThinking,
        trains_on_thoughts: bool,
    ) -> Result<()> {
        rendered.dropped.clear();
        if let Some((index, reason)) = rendered.changed.first() {
            let is_left_out = matches!(policy, DroppedThinking::Skip | DroppedThinking::Split);
            if !is_left_out || (rendered.spans.is_empty() && policy == DroppedThinking::Skip) {
                return Err(unproved(*index, reason).with_hint(
                    "messages behind it change what the template writes before it: dropped_thinking=split trains on it in a \
                     sample of its own",
                ));
            }
            rendered.dropped.extend(rendered.changed.iter().map(|(index, _)| *index));
        }
        if policy == DroppedThinking::Keep && trains_on_thoughts {
            return Ok(());
        }
        let Rendered { text, spans, answers, dropped, .. } = rendered;
        let mut at = 0;
        while at < spans.len() {
            let Some(index) = answers[at] else {
                if conversation.messages.iter().any(|message| message.is_trained && thought_of(message).is_some()) {
                    let message = "can't tell which answer the template marks, so whether its thinking is in the text";
                    return Err(Error::new(ErrorKind::MaskUnproved, message)
                        .with_hint("dropped_thinking=keep trains on what the template marks"));
                }
                return Ok(());
            };
            let of_answer = at..at + answers[at..].iter().take_while(|answer| **answer == Some(index)).count();
            let thought = thought_of(&conversation.messages[index]);
            if thought.is_none() && trains_on_thoughts {
                at = of_answer.end;
                continue;
            }
            let found = of_answer.clone().find_map(|span| {
                Some((span, self.end_of_thought(&text[spans[span].clone()], thought.unwrap_or_default())?))
            });
            match found {
                Some((span, end)) if !trains_on_thoughts => {
                    spans[span].start += end;
                    at = of_answer.end;
                }
                None if thought.is_some() && policy != DroppedThinking::Keep => {
                    if policy == DroppedThinking::Reject {
                        return Err(self.dropped(index));
                    }
                    dropped.push(index);
                    spans.drain(of_answer.clone());
                    answers.drain(of_answer);
                }
                _ => at = of_answer.end,
            }
        }
        dropped.sort_unstable();
        Ok(())
    }

    /// The error of an answer whose thinking is nowhere in the text.
    pub fn dropped(&self, index: usize) -> Error {
        let message =
            "the template leaves out the thinking of this answer, so that there is nothing right to learn from it";
        let hint = match self.is_shown() {
            true => "choose dropped_thinking=split, which shows it in a sample of its own, or keep",
            false => "choose a template that writes it, or dropped_thinking=keep, which trains on answers without it",
        };
        Error::new(ErrorKind::ThinkingDropped, message).at_location(format!("messages[{index}]")).with_hint(hint)
    }

    /// Where `thought` ends in an answer that begins with it, closing tag included. An empty thought is one that is
    /// opened and closed.
    fn end_of_thought(&self, answer: &str, thought: &str) -> Option<usize> {
        let own = (OPENING.to_owned(), CLOSING.to_owned());
        let frames = self.frame.iter().chain([&own]);
        for (opening, closing) in frames {
            let mut rest = answer.trim_start();
            if let Some(behind) = rest.strip_prefix(&**opening) {
                rest = behind.trim_start();
            }
            // Without a tag, nothing tells an empty thought from none.
            let Some(behind) = rest.strip_prefix(thought) else { continue };
            let Some(behind) = behind.trim_start().strip_prefix(&**closing) else { continue };
            return Some(answer.len() - behind.trim_start().len());
        }
        None
    }
}

/// The thinking of a message, as a field or within its content, without white space around; `None` where there is none.
fn thought_of<'m>(message: &'m Message<'_>) -> Option<&'m str> {
    let field = FIELDS.iter().find_map(|name| message.get(name)).and_then(Value::as_str).map(str::trim);
    if let Some(thought) = field.filter(|thought| !thought.is_empty()) {
        return Some(thought);
    }
    let content = message.get("content")?.as_str()?;
    let end = memchr::memmem::find(content.as_bytes(), CLOSING.as_bytes())?;
    let thought = &content[..end];
    let thought = thought.rfind(OPENING).map_or(thought, |at| &thought[at + OPENING.len()..]).trim();
    (!thought.is_empty()).then_some(thought)
}
