//! What of a rendered conversation is trained on, proved from the template itself.
//!
//! The reference is what the model sees when it answers: the template's text of the messages before an answer, with
//! `add_generation_prompt`. That text must be a prefix of the whole text; where it ends, the answer begins. The answer
//! ends with its end-of-turn token; white space that the template writes behind it is not the answer's.
//!
//! Where the text with the prompt is no prefix, it may be one in two other ways, tried in this order: as the template
//! writes the prompt for an answer without thinking (`enable_thinking` or `thinking` false); and without the thought that
//! the prompt opens at its end, such as `<think>`, which templates leave out before answers of earlier turns.
//!
//! Where an answer ends that is not the last message, the text alone does not say. Three witnesses do:
//!
//! * the loop over the messages: what it wrote while it stood at the answer. If the template had looked at later messages
//!   by then, the loop is asked under oath: with another message in the place of the next one, and nothing after it, the
//!   text up to there must stay the same; or, for templates that look further ahead, with others in the place of all that
//!   follow. So no part of the span comes from a later message. Where the text before the next answer is known not to
//!   depend on what comes from there, one run asks for all answers, with others in the place of all messages between them.
//! * the conversation cut behind the answer, if its text is a prefix of the whole text;
//! * the same with a generation prompt, if it is a prefix once the prompt is taken off.
//!
//! The loop is believed alone if the span ends with an end-of-turn token that the template is known to write (see
//! [`Endings`]), otherwise the longest of the three counts. Where there is no witness, the conversation is refused. Every
//! run but the first compares its output with the text and keeps nothing; and for most templates there are two of them,
//! however many answers there are: the second tells the text before each answer, see [`fork`](super::fork).

use std::borrow::Cow;
use std::cell::OnceCell;
use std::ops::Range;

use super::failure::{Cause, Eval, Failure};
use super::fork::Fork;
use super::input;
use super::python::trim_end;
use super::sink::{Difference, Sink, Visit, Wrote};
use super::value::Items;
use super::{ChatTemplate, Prompt};
use crate::conversation::{Conversation, Message, Role};
use crate::error::{Error, ErrorKind, Result};
use crate::json::{Data, Member, Value};

/// What a template writes around answers, learned when it is compiled.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Endings {
    /// What `add_generation_prompt` adds behind a user's message.
    pub prompt: Option<String>,
    /// What follows an answer: before a generation prompt, and at the end of a conversation.
    pub tails: Vec<Tail>,
    /// The end of the generation prompt where it opens a thought: the tag, and what follows it.
    pub opened: Option<String>,
}

/// What a template writes behind an answer.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Tail {
    text: String,
    /// How much of it belongs to the answer: all but the white space at its end.
    length: usize,
}

/// The answer of the conversations that templates are tried on.
pub(super) const ANSWER: &str = "An answer.";
pub(super) const QUESTION: &str = "A question?";

impl Endings {
    /// Tries the template on short conversations, with contents as texts or, where it wants them, as lists of parts. A
    /// template that refuses both has no known endings.
    pub fn learn(template: &ChatTemplate) -> Self {
        let question = Message::new(Role::User, QUESTION);
        let texts = [question.clone(), Message::new(Role::Assistant, ANSWER), question];
        let parts = texts.each_ref().map(|message| {
            let text = message.get("content").and_then(Value::as_str).unwrap_or_default();
            let mut message = Message::new(message.role, "");
            message.fields[1].value.data = parts(text.to_owned());
            message
        });
        let learned = [&texts, &parts].map(|messages| Self::observe(template, messages));
        learned.into_iter().find(|endings| !endings.tails.is_empty()).unwrap_or_default()
    }

    fn observe(template: &ChatTemplate, messages: &[Message<'_>; 3]) -> Self {
        let text = |length: usize, prompt: bool| {
            let prompt = if prompt { Prompt::Answer } else { Prompt::None };
            template.observe(&messages[..length], prompt).ok()
        };
        let behind = |text: &str, visit: &Visit| match visit {
            Visit::Wrote(wrote) => Some(text[wrote.end..].to_owned()),
            _ => None,
        };
        let prompt = text(1, true).and_then(|(with, visits)| {
            let without = text(1, false).map(|(text, _)| text)?;
            with.strip_prefix(&*without).map(str::to_owned).or_else(|| behind(&with, &visits[0]))
        });
        let tail = |text: &str| {
            let text = &text[text.rfind(ANSWER)? + ANSWER.len()..];
            Some(Tail { text: text.to_owned(), length: trim_end(text).len() })
        };
        let by_loop = text(3, false).and_then(|(text, visits)| match &visits[1] {
            Visit::Wrote(wrote) => tail(&text[..wrote.end]),
            _ => None,
        });
        let by_prompt = match (text(2, true), &prompt) {
            (Some((text, _)), Some(prompt)) => text.strip_suffix(&**prompt).and_then(tail),
            _ => None,
        };
        let mut last = text(2, false).and_then(|(text, _)| tail(&text));
        let inner = by_loop.or(by_prompt);
        if let (Some(inner), Some(last)) = (&inner, &mut last)
            && inner.length > 0
            && last.text.starts_with(&inner.text)
        {
            // What only the end of a conversation has, such as an end-of-text token, is not the end of the turn.
            last.length = inner.length;
        }
        let mut tails: Vec<Tail> = [last, inner].into_iter().flatten().collect();
        tails.sort_by_key(|tail| std::cmp::Reverse(tail.text.len()));
        let opened = prompt.as_deref().and_then(opened_thought).map(str::to_owned);
        Self { prompt, tails, opened }
    }

    /// Is there a token that ends a turn?
    pub fn has_end_of_turn(&self) -> bool {
        !self.tails.is_empty() && self.tails.iter().all(|tail| tail.length > 0)
    }

    /// The answer without what the template writes behind its end, and whether it ends its turn.
    fn trim<'t>(&self, answer: &'t str) -> (&'t str, bool) {
        let trimmed = trim_end(answer);
        for tail in self.tails.iter().filter(|tail| tail.length > 0) {
            if let Some(content) = trimmed.strip_suffix(trim_end(&tail.text)) {
                return (&answer[..content.len() + tail.length], true);
            }
        }
        let spaces = self.tails.iter().filter(|tail| tail.length == 0);
        let content = spaces.filter_map(|tail| answer.strip_suffix(&*tail.text)).min_by_key(|content| content.len());
        (content.unwrap_or(answer), false)
    }

    /// How much of an answer is behind its end, and whether it ends its turn, if its last characters, `tail`, alone
    /// decide it.
    pub fn behind_end(&self, tail: &str) -> Option<(usize, bool)> {
        let trimmed = trim_end(tail);
        let is_undecided = |ending: &Tail| {
            let (ending, tail) =
                if ending.length > 0 { (trim_end(&ending.text), trimmed) } else { (&*ending.text, tail) };
            ending.len() > tail.len() && ending.ends_with(tail)
        };
        if self.tails.iter().any(is_undecided) {
            return None;
        }
        let (answer, is_ended) = self.trim(tail);
        Some((tail.len() - answer.len(), is_ended))
    }
}

/// What a prompt opens at its end: a tag of thinking such as `<think>`, and white space. The end may close it again.
fn opened_thought(prompt: &str) -> Option<&str> {
    let is_tag = |tag: &str, is_closing: bool| {
        let is_framed = tag.ends_with(['>', ']']) && tag.to_ascii_lowercase().contains("think");
        is_framed && tag.starts_with("</") == is_closing && !tag.contains(char::is_whitespace)
    };
    let last_tag = |text: &str| text.rfind(['<', '[']);
    let end = trim_end(prompt);
    let mut start = last_tag(end)?;
    if is_tag(&end[start..], true) {
        let before = trim_end(&end[..start]);
        start = last_tag(before)?;
        return is_tag(&before[start..], false).then(|| &prompt[start..]);
    }
    (start > 0 && is_tag(&end[start..], false)).then(|| &prompt[start..])
}

/// Finds the spans of `text`, which is the template's text of `conversation`.
///
/// # Errors
/// [`ErrorKind::MaskUnproved`], naming the first message whose answer can't be told from what surrounds it.
pub(super) fn prove<'r>(
    template: &'r ChatTemplate,
    conversation: &'r Conversation<'r>,
    messages: &'r Items<'r>,
    text: &'r str,
    visits: &'r [Visit],
    prompts: &'r [Prompt],
) -> Result<Proved> {
    let proof = Proof {
        template,
        conversation,
        messages,
        text,
        visits,
        prompts,
        forks: Default::default(),
        others: OnceCell::new(),
    };
    let mut proved = Proved::default();
    let answers = || (0..messages.held()).filter(|index| conversation.messages[*index].is_trained);
    let mut starts = answers().map(|index| proof.start(index)).collect::<Vec<_>>().into_iter().peekable();
    for index in answers() {
        let start = starts.next().expect("there is a start for each answer");
        let next = starts.peek().and_then(|next| next.as_ref().ok()?.as_ref().ok().copied());
        let span = match proof.span(index, start, next)? {
            Ok(span) => span,
            Err(reason) => {
                proved.changed.push((index, reason));
                continue;
            }
        };
        if proved.spans.last().is_some_and(|(last, _)| last.end > span.start) {
            return Err(unproved(index, "the answer before it ends behind its beginning"));
        }
        proved.spans.push((span, index));
    }
    Ok(proved)
}

/// What is known of the answers of a conversation.
#[derive(Debug, Default)]
pub(super) struct Proved {
    /// Where an answer stands, and its message.
    pub spans: Vec<(Range<usize>, usize)>,
    /// Answers before which the text is not what the model would see, because of messages that follow; and how it differs.
    pub changed: Vec<(usize, String)>,
}

/// The spans that the template marks itself, of answers that are trained on; with the answer, where the loop over the
/// messages tells it.
///
/// # Errors
/// [`ErrorKind::MaskUnproved`] where some answers are not to be trained on and the loop does not tell which are marked.
pub(super) fn marked(
    conversation: &Conversation<'_>,
    generated: Vec<Range<usize>>,
    visits: &[Visit],
) -> Result<Vec<(Range<usize>, Option<usize>)>> {
    let is_answer = |message: &&Message<'_>| message.role == Role::Assistant;
    let excluded = conversation.messages.iter().filter(is_answer).position(|message| !message.is_trained);
    let mut spans = Vec::new();
    let mut next = 0;
    for span in generated.into_iter().filter(|span| !span.is_empty()) {
        let holds =
            |visit: &Visit| matches!(visit, Visit::Wrote(wrote) if wrote.start <= span.start && span.end <= wrote.end);
        // Behind the loop, the end of the text is the last answer's.
        let is_behind = || match (conversation.messages.last(), visits.last()) {
            (Some(last), Some(Visit::Wrote(wrote))) => last.role == Role::Assistant && wrote.end <= span.start,
            _ => false,
        };
        let answer = (next..visits.len()).find(|index| holds(&visits[*index]));
        let answer = answer.or_else(|| is_behind().then(|| visits.len() - 1));
        next = answer.unwrap_or(next);
        match answer {
            Some(index) if excluded.is_none() || conversation.messages[index].is_trained => spans.push((span, answer)),
            Some(_) => {}
            None if excluded.is_none() => spans.push((span, None)),
            None => {
                let message = "can't tell which answers the template marks, and not all are to be trained on";
                return Err(Error::new(ErrorKind::MaskUnproved, message));
            }
        }
    }
    Ok(spans)
}

struct Proof<'p> {
    template: &'p ChatTemplate,
    conversation: &'p Conversation<'p>,
    messages: &'p Items<'p>,
    text: &'p str,
    visits: &'p [Visit],
    /// The prompts that the text before an answer may end with.
    prompts: &'p [Prompt],
    /// What one run tells of the texts before all answers, with each of the prompts that it was asked for.
    forks: [OnceCell<Vec<Option<Fork<'p>>>>; 2],
    /// The text with other messages in the place of all that are not trained on, and what the loop wrote of it.
    others: OnceCell<Option<(String, Vec<Visit>)>>,
}

pub(super) fn unproved(index: usize, reason: impl std::fmt::Display) -> Error {
    Error::new(ErrorKind::MaskUnproved, format!("can't prove what of the text is this answer: {reason}"))
        .at_location(format!("messages[{index}]"))
}

impl<'p> Proof<'p> {
    /// Compares the text of other messages with the whole text: the bytes that agree, and what follows instead.
    fn compare<'m>(&self, messages: Items<'m>, prompt: Prompt) -> Eval<(usize, Vec<u8>)>
    where
        'p: 'm,
    {
        let tools = self.conversation.tools.as_ref();
        let Difference { common, rest, .. } = self.template.compare(messages, tools, prompt, self.text)?;
        Ok((common, rest))
    }

    /// Compares the text of the messages before an answer with the whole text.
    fn compare_before(&self, index: usize, prompt: Prompt) -> Eval<(usize, Vec<u8>)> {
        let forks = self.forks[usize::from(prompt == Prompt::WithoutThinking)].get_or_init(|| {
            let wanted: Vec<bool> = self.conversation.messages.iter().map(|message| message.is_trained).collect();
            if wanted.iter().filter(|is_trained| **is_trained).count() < 2 {
                return Vec::new();
            }
            let sink = Sink::Compare(Difference { text: self.text, common: 0, rest: Vec::new() });
            let tools = self.conversation.tools.as_ref();
            self.template.forks(input::messages(&self.conversation.messages), tools, prompt, sink, wanted).1
        });
        if let Some(Some(Fork { sink: Sink::Compare(difference), .. })) = forks.get(index) {
            return Ok((difference.common, difference.rest.clone()));
        }
        self.compare(self.messages.window(0..index), prompt)
    }

    /// Where an answer stands that begins at `start`, or how the text before it differs from what the model would see;
    /// `next` is where the next answer begins, if that is known.
    fn span(
        &self,
        index: usize,
        start: Eval<Start>,
        next: Option<usize>,
    ) -> Result<std::result::Result<Range<usize>, String>> {
        let start = match start {
            Ok(Ok(start)) => start,
            Ok(Err((common, rest))) => {
                let start = common.saturating_sub(20);
                let seen = String::from_utf8_lossy(&self.text.as_bytes()[start..common]);
                let rest: String = String::from_utf8_lossy(&rest).chars().take(20).collect();
                let reason = format!(
                    "the model would see {rest:?} behind {seen:?}, where the conversation goes on in another way"
                );
                if index + 1 < self.messages.len() {
                    return Ok(Err(reason));
                }
                return Err(unproved(index, reason)
                    .with_hint("use a template with {% generation %} markers or another named template"));
            }
            Err(failure) => {
                return Err(unproved(index, format!("the messages before it don't render: {}", sentence(&failure))));
            }
        };
        let last = self.messages.len() - 1;
        let end = if index == last {
            self.trimmed(start, self.text.len()).map(|(end, _)| end)
        } else {
            self.inner_end(index, start, next)
        };
        match end {
            Some(end) if end > start => Ok(Ok(start..end)),
            Some(_) => Err(unproved(index, "the template writes nothing of it")),
            None => Err(unproved(index, "its end can't be told from what follows")),
        }
    }

    /// Where an answer begins, or else how far the text agrees with the text and prompt before it, and what follows there.
    fn start(&self, index: usize) -> Eval<Start> {
        let mut difference: Option<(usize, Vec<u8>)> = None;
        for prompt in self.prompts {
            if *prompt == Prompt::WithoutThinking && !self.template.knows_thinking() {
                continue;
            }
            // The last prompt is the first without its end.
            let (common, rest) = match (prompt, &difference) {
                (Prompt::Unopened, Some(difference)) => difference.clone(),
                _ => self.compare_before(index, *prompt)?,
            };
            if rest.is_empty() {
                return Ok(Ok(common));
            }
            if let (Prompt::Unopened, Some(opened)) = (prompt, &self.template.endings().opened)
                && let Some(start) = (common + rest.len()).checked_sub(opened.len())
                && start <= common
                && [&self.text.as_bytes()[start..common], &rest].concat() == opened.as_bytes()
                && self.text.is_char_boundary(start)
            {
                return Ok(Ok(start));
            }
            difference.get_or_insert((common, rest));
        }
        Ok(Err(difference.expect("there is a first prompt")))
    }

    /// The end of an answer whose text, white space behind it included, is `start..end`; and whether it ends its turn.
    fn trimmed(&self, start: usize, end: usize) -> Option<(usize, bool)> {
        let (answer, is_ended) = self.template.endings().trim(self.text.get(start..end)?);
        Some((start + answer.len(), is_ended))
    }

    /// The end of an answer that other messages follow.
    fn inner_end(&self, index: usize, start: usize, next: Option<usize>) -> Option<usize> {
        let by_loop = match self.visits[index] {
            Visit::Wrote(wrote) if self.is_independent(index, wrote, next) => self.trimmed(start, wrote.end),
            _ => None,
        };
        if let Some((end, true)) = by_loop {
            return Some(end);
        }
        let cut = || self.messages.window(0..index + 1);
        let by_cut = match self.compare(cut(), Prompt::None) {
            Ok((end, rest)) if rest.is_empty() => self.trimmed(start, end),
            _ => None,
        };
        let by_prompt = match (&self.template.endings().prompt, self.compare(cut(), Prompt::Answer)) {
            (Some(prompt), Ok((common, rest))) => {
                let end = (common + rest.len()).checked_sub(prompt.len())?;
                let agrees = end <= common && {
                    let tail = [&self.text.as_bytes()[end..common], &rest].concat();
                    tail == prompt.as_bytes()
                };
                if agrees { self.trimmed(start, end) } else { None }
            }
            _ => None,
        };
        [by_loop, by_cut, by_prompt].into_iter().flatten().map(|(end, _)| end).max()
    }

    /// Does the loop write the same of an answer if all messages that are not trained on are others?
    fn is_same_among_others(&self, index: usize, wrote: Wrote) -> bool {
        let others = self.others.get_or_init(|| {
            let other =
                |message: &Message<'p>| if message.is_trained { message.clone() } else { other_message(message) };
            let messages: Vec<Message<'p>> = self.conversation.messages.iter().map(other).collect();
            let sink = Sink::collect(String::new(), Vec::new());
            let tools = self.conversation.tools.as_ref();
            let output = self.template.run(input::messages(&messages), tools, Prompt::None, sink).ok()?;
            Some((output.sink.into_made().text, output.visits))
        });
        match others {
            Some((text, visits)) => matches!(&visits[index], Visit::Wrote(other)
                if text[other.start..other.end] == self.text[wrote.start..wrote.end]),
            None => false,
        }
    }

    /// Does the text up to `end` stay the same whatever follows message `index`?
    fn is_independent(&self, index: usize, wrote: Wrote, next: Option<usize>) -> bool {
        let Wrote { end, horizon, .. } = wrote;
        // What did not look at them does not depend on them.
        if horizon <= index + 1 {
            return true;
        }
        // What stands before the next answer's beginning does not depend on that answer or what follows it.
        if next.is_some_and(|next| end <= next) && self.is_same_among_others(index, wrote) {
            return true;
        }
        [1, self.conversation.messages.len() - index - 1].into_iter().any(|num_others| {
            let messages = followed_by_others(self.conversation, index, num_others);
            let difference = self.compare(input::messages(&messages), Prompt::None);
            difference.is_ok_and(|(common, _)| common >= end)
        })
    }
}

/// Where an answer begins, or else how far the text agrees with the text and prompt before it, and what follows there.
type Start = std::result::Result<usize, (usize, Vec<u8>)>;

/// The conversation up to message `index`, and other messages in the place of the next `num_others`.
pub(super) fn followed_by_others<'c>(
    conversation: &Conversation<'c>,
    index: usize,
    num_others: usize,
) -> Vec<Message<'c>> {
    let (before, behind) = conversation.messages.split_at(index + 1);
    before.iter().cloned().chain(behind[..num_others].iter().map(other_message)).collect()
}

fn other_message<'c>(message: &Message<'c>) -> Message<'c> {
    let mut other = Message { role: message.role, fields: Vec::new(), is_trained: false };
    for member in &message.fields {
        let mut member = member.clone();
        if member.key == "content" {
            member.value.data = other_content(&member.value);
        }
        if message.role != Role::Assistant || matches!(&*member.key, "role" | "content") {
            other.fields.push(member);
        }
    }
    other
}

/// A content that differs from `content` in its first letter.
fn other_content<'a>(content: &Value<'a>) -> Data<'a> {
    let other = |text: &str| if text.trim_start().starts_with('Y') { "Z" } else { "Y" };
    match &content.data {
        Data::String(text) => Data::String(Cow::Borrowed(other(text))),
        Data::Array(_) => parts(other("").to_owned()),
        data => data.clone(),
    }
}

/// A content of one part.
fn parts<'a>(text: String) -> Data<'a> {
    let member =
        |key: &'static str, text: String| Member { key: Cow::Borrowed(key), offset: 0, value: Value::string(text) };
    let part = Data::Object(vec![member("type", "text".into()), member("text", text)]);
    Data::Array(vec![Value { offset: 0, data: part }])
}

/// What a failure says, for messages.
pub(super) fn sentence(failure: &Failure) -> String {
    match failure.cause() {
        Cause::Raised(message) => format!("the template says: {message}"),
        Cause::Impossible(message) => message.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Rendered;
    use super::*;

    fn trained(source: &str, messages: Vec<Message<'static>>) -> std::result::Result<Vec<String>, ErrorKind> {
        let template = ChatTemplate::compile("test", source, &[]).unwrap();
        let mut rendered = Rendered::default();
        // The third time, the conversation is rendered by plan.
        for _ in 0..3 {
            template
                .render(&Conversation { messages: messages.clone(), tools: None }, &mut rendered)
                .map_err(|error| error.kind())?;
        }
        assert!(rendered.changed.is_empty());
        Ok(rendered.spans.iter().map(|span| rendered.text[span.clone()].to_owned()).collect())
    }

    fn talk(num_turns: usize) -> Vec<Message<'static>> {
        let turn = |_| [Message::new(Role::User, "Why?"), Message::new(Role::Assistant, "So.")];
        (0..num_turns).flat_map(turn).collect()
    }

    fn template(before: &str, in_answer: &str) -> String {
        let answer = format!("{{{{ message.content }}}}{in_answer}{{{{ '<|end|>\n' }}}}");
        let other = "{{ '[user]' + message.content + '<|end|>\n' }}";
        let prompt = "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}";
        format!(
            "{before}{{% for message in messages %}}{{% if message.role == 'assistant' %}}{{{{ '[assistant]' }}}}{answer}\
             {{% else %}}{other}{{% endif %}}{{% endfor %}}{prompt}"
        )
    }

    // Where an answer ends is proved for templates that look at the end of the conversation, too.
    #[test]
    fn answers_end_where_they_end_however_far_the_template_looks() {
        let looks = ["", "{% set n = messages | length %}", "{% for message in messages[::-1] %}{{ '' }}{% endfor %}"];
        for look in looks {
            assert_eq!(Ok(vec!["So.<|end|>".to_owned(); 3]), trained(&template(look, ""), talk(3)), "{look}");
        }
    }

    // What a template takes from a later message is never trained on as part of an answer.
    #[test]
    fn text_of_later_messages_is_no_part_of_an_answer() {
        let peeks = [
            "{% if loop.nextitem %}{{ loop.nextitem.content }}{% endif %}",
            "{% if not loop.last %}{{ messages[loop.index].content }}{% endif %}",
            "{% if not loop.last %}{{ messages[-1].content }}{% endif %}",
            "{% for later in messages[loop.index:] %}{% if later.role == 'user' %}{{ later.content }}{% endif %}{% endfor %}",
        ];
        for before in ["", "{% set n = messages | length %}"] {
            for peek in peeks {
                let found = trained(&template(before, peek), talk(3));
                let is_clean = |spans: &Vec<String>| spans.iter().all(|span| !span.contains("Why"));
                assert!(found.as_ref().map_or(true, is_clean), "{before}{peek}: {found:?}");
                assert_ne!(Ok(vec!["So.<|end|>".to_owned(); 3]), found, "{before}{peek}");
            }
        }
    }
}
