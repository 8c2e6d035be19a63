//! Rendering by plan: what a template writes for one shape of conversation, learned once and then copied together.
//!
//! The shape of a conversation is the fields and roles of its messages; all fields must be texts. When a shape comes again,
//! the template runs once on traced texts (see [`trace`](super::trace)). If the trace is not spoilt, the output is known
//! for every conversation of that shape: constants and stripped fields, one behind the other, as long as the template's
//! questions about the texts have the same answers. For the template is a function of shape and texts, and a trace holds
//! all that it asked of the texts. The proof of the spans is repeated on the traced outputs: piece by piece the text before
//! an answer is a prefix of the whole, so it is one for all texts. A conversation whose answers differ, and any shape
//! without a plan, is rendered in the ordinary way.

use std::cell::OnceCell;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use super::fork::Fork;
use super::origin::push_stretch;
use super::sink::{Sink, Visit};
use super::spans::{followed_by_others, marked};
use super::trace::{Guard, Trace, View};
use super::value::{Items, Text};
use super::{ChatTemplate, PROMPTS, Prompt, Rendered, input};
use crate::conversation::{Conversation, Message};
use crate::json::Data;

/// Conversations of more messages have no plan: their shapes seldom come twice.
const MAX_MESSAGES: usize = 512;
/// How many shapes are remembered.
const MAX_SHAPES: usize = 4096;
/// How many steps all plans have together.
const MAX_STEPS: usize = 1 << 17;
/// How many plans a shape may have: one for each set of answers.
const MAX_PLANS: usize = 4;
/// How often a shape is tried before it is left alone.
const MAX_ATTEMPTS: usize = 6;

/// The plans of one template, as one thread has learned them.
#[derive(Clone, Debug, Default)]
pub(super) struct Plans {
    template: Option<Arc<()>>,
    shapes: HashMap<Box<[u8]>, Shape>,
    num_steps: usize,
    /// The shape of the last conversation.
    shape: Vec<u8>,
}

#[derive(Clone, Debug, Default)]
struct Shape {
    plans: Vec<Plan>,
    num_attempts: usize,
}

/// How to write the conversations of one shape that give the same answers.
#[derive(Clone, Debug)]
struct Plan {
    guards: Vec<Guard>,
    steps: Vec<Step>,
}

#[derive(Clone, Debug)]
enum Step {
    Constant(Box<str>),
    Field(View),
    /// A span of this answer begins here.
    Begin(Option<usize>),
    /// The span ends here.
    End,
}

impl Plans {
    /// Renders by plan, if there is one.
    pub fn render(&mut self, identity: &Arc<()>, conversation: &Conversation<'_>, out: &mut Rendered) -> bool {
        if !self.template.as_ref().is_some_and(|known| Arc::ptr_eq(known, identity)) {
            *self = Self { template: Some(identity.clone()), ..Self::default() };
        }
        if !write_shape(conversation, &mut self.shape) {
            self.shape.clear();
            return false;
        }
        let Some(shape) = self.shapes.get(&*self.shape) else { return false };
        match shape.plans.iter().find(|plan| plan.fits(conversation)) {
            Some(plan) => {
                plan.write(conversation, out);
                true
            }
            None => false,
        }
    }

    /// Learns from a conversation that was rendered without a plan just now, if its shape has been seen before.
    pub fn learn(&mut self, template: &ChatTemplate, conversation: &Conversation<'_>) {
        if self.shape.is_empty() {
            return;
        }
        let Some(shape) = self.shapes.get_mut(&*self.shape) else {
            if self.shapes.len() < MAX_SHAPES {
                self.shapes.insert(self.shape.as_slice().into(), Shape::default());
            }
            return;
        };
        if shape.plans.len() < MAX_PLANS && shape.num_attempts < MAX_ATTEMPTS && self.num_steps < MAX_STEPS {
            shape.num_attempts += 1;
            if let Some(plan) = Plan::learn(template, conversation) {
                self.num_steps += plan.steps.len() + plan.guards.len();
                shape.plans.push(plan);
            }
        }
    }
}

/// Writes what decides the shape of a conversation; `false` if it has none.
fn write_shape(conversation: &Conversation<'_>, shape: &mut Vec<u8>) -> bool {
    shape.clear();
    if conversation.tools.is_some() || conversation.messages.len() > MAX_MESSAGES {
        return false;
    }
    let mut write = |text: &str| {
        shape.extend_from_slice(&(text.len() as u32).to_le_bytes());
        shape.extend_from_slice(text.as_bytes());
    };
    for message in &conversation.messages {
        write(message.role.as_str());
        write(if message.is_trained { "trained" } else { "" });
        for member in &message.fields {
            let Data::String(text) = &member.value.data else { return false };
            write(&member.key);
            if member.key == "role" {
                write(text);
            }
        }
    }
    true
}

fn field<'c>(conversation: &'c Conversation<'_>, (message, field): (usize, usize)) -> &'c str {
    conversation.messages[message].fields[field].value.as_str().unwrap_or_default()
}

impl Plan {
    fn fits(&self, conversation: &Conversation<'_>) -> bool {
        self.guards.iter().all(|guard| guard.holds(field(conversation, guard.field())))
    }

    fn write(&self, conversation: &Conversation<'_>, out: &mut Rendered) {
        let Rendered { text, spans, answers, stretches, .. } = out;
        let (mut start, mut answer) = (0, None);
        for step in &self.steps {
            match step {
                Step::Constant(constant) => text.push_str(constant),
                Step::Field(view) => {
                    let start = text.len();
                    text.push_str(view.of(field(conversation, view.field)));
                    push_stretch(stretches, start..text.len(), false);
                }
                Step::Begin(index) => (start, answer) = (text.len(), *index),
                Step::End if start < text.len() => {
                    spans.push(start..text.len());
                    answers.push(answer);
                }
                Step::End => {}
            }
        }
    }

    fn learn(template: &ChatTemplate, conversation: &Conversation<'_>) -> Option<Self> {
        let trace = Trace::default();
        let messages = input::traced(&conversation.messages, &trace, 0);
        let output = template.run(messages.clone(), None, Prompt::None, Sink::Record(Vec::new())).ok()?;
        let parts = output.sink.into_parts();
        let spans = if template.verdict().has_generation_markers {
            let spans = marked(conversation, output.generated, &output.visits).ok()?;
            let place = |(span, answer): (Range<usize>, _)| (Position::at(span.start), Position::at(span.end), answer);
            spans.into_iter().map(place).collect()
        } else {
            let proof =
                Proof { template, conversation, messages, trace: &trace, parts: &parts, before: Default::default() };
            proof.spans(&output.visits)?
        };
        Some(Self { steps: steps(&parts, &spans)?, guards: trace.guards()? })
    }
}

/// A place in recorded output: before byte `offset` of a part; the offset is 0 unless the part is a constant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Position {
    part: usize,
    offset: usize,
}

impl Position {
    fn at(part: usize) -> Self {
        Self { part, offset: 0 }
    }

    /// The same place, not at the end of a part but at the beginning of the next.
    fn forward(mut self, parts: &[Text<'_>]) -> Self {
        while self.offset > 0 && parts[self.part].plain().is_some_and(|text| text.len() == self.offset) {
            self = Self::at(self.part + 1);
        }
        self
    }
}

/// Where a span begins and ends, and its answer.
type Span = (Position, Position, Option<usize>);

/// Where `beginning` ends in `parts`, if it is a beginning of what is behind `at` whatever the texts are.
fn end_of_prefix(parts: &[Text<'_>], at: Position, beginning: &[Text<'_>]) -> Option<Position> {
    beginning.iter().try_fold(at, |at, part| behind_part(parts, at, part))
}

/// Where `part` ends in `parts`, if what is behind `at` begins with it whatever the texts are.
fn behind_part(parts: &[Text<'_>], mut at: Position, part: &Text<'_>) -> Option<Position> {
    if let Text::Traced(traced) = part {
        return match parts.get(at.part) {
            Some(Text::Traced(other)) if at.offset == 0 && other.view == traced.view => Some(Position::at(at.part + 1)),
            _ => None,
        };
    }
    let mut bytes = part.plain()?.as_bytes();
    while !bytes.is_empty() {
        let found = &parts.get(at.part)?.plain()?.as_bytes()[at.offset..];
        let length = bytes.len().min(found.len());
        if bytes[..length] != found[..length] {
            return None;
        }
        bytes = &bytes[length..];
        at.offset += length;
        at = at.forward(parts);
    }
    Some(at)
}

/// The proof of [`spans`](super::spans), for all texts at once.
struct Proof<'p> {
    template: &'p ChatTemplate,
    conversation: &'p Conversation<'p>,
    messages: Items<'p>,
    trace: &'p Trace,
    parts: &'p [Text<'p>],
    /// What one run tells of the texts before all answers, with each of the prompts that it was asked for.
    before: [OnceCell<Vec<Option<Before<'p>>>>; 2],
}

/// The text before an answer: a beginning of the whole, and what the template would write behind it.
#[derive(Clone)]
struct Before<'p> {
    /// Where the beginning ends, if it is one.
    end: Option<Position>,
    behind: Vec<Text<'p>>,
}

impl<'p> Proof<'p> {
    fn spans(&self, visits: &[Visit]) -> Option<Vec<Span>> {
        let mut spans: Vec<Span> = Vec::new();
        let last = self.conversation.messages.len() - 1;
        for (index, message) in self.conversation.messages.iter().enumerate() {
            if !message.is_trained {
                continue;
            }
            let start = PROMPTS.iter().find_map(|prompt| self.start(index, *prompt))?;
            let end = if index == last { self.parts.len() } else { self.inner_end(index, &visits[index])? };
            let (end, is_ended) = self.trimmed(start, end)?;
            // Without the end of a turn the loop's word does not count alone.
            if end <= start || (index < last && !is_ended) || spans.last().is_some_and(|(_, before, _)| *before > start)
            {
                return None;
            }
            spans.push((start, end, Some(index)));
        }
        Some(spans)
    }

    /// Where an answer begins that follows this prompt.
    fn start(&self, index: usize, prompt: Prompt) -> Option<Position> {
        if prompt == Prompt::WithoutThinking && !self.template.knows_thinking() {
            return None;
        }
        let Before { end, behind: mut seen } = self.before(index, prompt)?;
        if prompt == Prompt::Unopened {
            let mut opened = self.template.endings().opened.as_deref()?;
            while !opened.is_empty() {
                let last = seen.pop()?;
                let last = last.plain()?;
                match (last.strip_suffix(opened), opened.strip_suffix(last)) {
                    (Some(rest), _) => {
                        seen.push(Text::Shared(rest.into()));
                        opened = "";
                    }
                    (None, Some(rest)) => opened = rest,
                    (None, None) => return None,
                }
            }
        }
        end_of_prefix(self.parts, end?, &seen)
    }

    /// The text of the messages before an answer.
    fn before(&self, index: usize, prompt: Prompt) -> Option<Before<'p>> {
        let known = self.before[usize::from(prompt == Prompt::WithoutThinking)].get_or_init(|| self.all_before(prompt));
        if let Some(Some(before)) = known.get(index) {
            return Some(before.clone());
        }
        let seen = self.template.run(self.messages.window(0..index), None, prompt, Sink::Record(Vec::new())).ok()?;
        Some(Before { end: Some(Position::at(0)), behind: seen.sink.into_parts() })
    }

    /// The texts before answers, as far as one run tells them.
    fn all_before(&self, prompt: Prompt) -> Vec<Option<Before<'p>>> {
        let messages = &self.conversation.messages;
        let wanted = messages.iter().map(|message| message.is_trained).collect();
        let traced = input::traced(messages, self.trace, 0);
        let (sink, forks) = self.template.forks(traced, None, prompt, Sink::Record(Vec::new()), wanted);
        let wrote = sink.into_parts();
        let (mut num_parts, mut end) = (0, Some(Position::at(0)));
        let mut before = |fork: Option<Fork<'p>>| {
            let Fork { at, sink } = fork?;
            end = end.and_then(|end| end_of_prefix(self.parts, end, &wrote[num_parts..at]));
            num_parts = at;
            Some(Before { end, behind: sink.into_parts() })
        };
        forks.into_iter().map(&mut before).collect()
    }

    /// The part behind an answer that other messages follow: the loop's word, under oath.
    fn inner_end(&self, index: usize, visit: &Visit) -> Option<usize> {
        let Visit::Wrote(wrote) = visit else { return None };
        let num_behind = self.conversation.messages.len() - index - 1;
        let is_same = |num_others: usize| self.is_independent(index, wrote.end, num_others);
        // What did not look at later messages does not depend on them.
        (wrote.horizon <= index + 1 || is_same(1).is_some() || is_same(num_behind).is_some()).then_some(wrote.end)
    }

    /// Do the parts up to `end` stay the same with other messages in the place of the next `num_others`?
    fn is_independent(&self, index: usize, end: usize, num_others: usize) -> Option<()> {
        let messages: Vec<Message<'_>> = followed_by_others(self.conversation, index, num_others);
        let trace = Trace::default();
        let other = input::traced(&messages, &trace, num_others);
        let output = self.template.run(other, None, Prompt::None, Sink::Record(Vec::new())).ok()?;
        end_of_prefix(&output.sink.into_parts(), Position::at(0), &self.parts[..end])?;
        let guards = trace.guards()?;
        guards.into_iter().for_each(|guard| self.trace.note(guard));
        Some(())
    }

    /// Where the answer in `start..end` ends, and whether it ends its turn, if constants at its end decide it.
    fn trimmed(&self, start: Position, end: usize) -> Option<(Position, bool)> {
        let is_constant = |part: &&Text<'_>| part.plain().is_some();
        let num_constant = self.parts.get(start.part..end)?.iter().rev().take_while(is_constant).count();
        let first = end - num_constant;
        let offset = if first == start.part { start.offset } else { 0 };
        let tail: String = self.parts[first..end].iter().filter_map(Text::plain).collect();
        let (mut behind, is_ended) = self.template.endings().behind_end(&tail[offset..])?;
        let mut part = end;
        while behind > 0 {
            part -= 1;
            let length = self.parts[part].plain()?.len();
            if behind < length {
                return Some((Position { part, offset: length - behind }, is_ended));
            }
            behind -= length;
        }
        Some((Position::at(part), is_ended))
    }
}

/// The steps that write `parts` and mark `spans`.
fn steps(parts: &[Text<'_>], spans: &[Span]) -> Option<Vec<Step>> {
    let mut marks =
        spans.iter().flat_map(|(start, end, answer)| [(*start, Step::Begin(*answer)), (*end, Step::End)]).peekable();
    let mut steps = Vec::new();
    let mut constant = String::new();
    let flush = |constant: &mut String, steps: &mut Vec<Step>| {
        if !constant.is_empty() {
            steps.push(Step::Constant(std::mem::take(constant).into()));
        }
    };
    for index in 0..=parts.len() {
        let text = parts.get(index).map_or(Some(""), Text::plain);
        let mut written = 0;
        while let Some((position, step)) = marks.next_if(|(position, _)| position.part == index) {
            constant.push_str(text.unwrap_or_default().get(written..position.offset)?);
            written = position.offset;
            flush(&mut constant, &mut steps);
            steps.push(step);
        }
        match (text, parts.get(index)) {
            // A constant with a part that is not the template's: a name of a field, which few templates print.
            (Some(_), Some(Text::Record(_) | Text::Made(_))) => return None,
            (Some(text), _) => constant.push_str(text.get(written..)?),
            (None, Some(Text::Traced(traced))) => {
                flush(&mut constant, &mut steps);
                steps.push(Step::Field(traced.view.clone()));
            }
            _ => return None,
        }
    }
    flush(&mut constant, &mut steps);
    // Marks that are left over lie behind one another, which no proof lets happen.
    marks.next().is_none().then_some(steps)
}
