//! What the template would write if the conversation ended earlier, for all its messages in one run.
//!
//! Before it enters the loop over the messages for a message, a run can try how it would go on if the loop had come to its
//! end: it copies its variables and runs what follows the loop, on the messages before. That is what a run on those
//! messages alone would do, if nothing so far has looked at the message or beyond it, which [`Items::horizon`] tells; the
//! trial is held to the same. So the texts before all answers of a conversation take one run, not one for each.
//!
//! A loop inside of another, of a macro or of a block that is kept has no trials, and neither has a run that has looked at
//! the end of the messages: then there is no fork, and the caller runs the template on the messages before.

use std::cell::RefCell;
use std::rc::Rc;

use super::ast::{For, Kind, Statement};
use super::failure::Eval;
use super::interpreter::Interpreter;
use super::sink::Sink;
use super::value::{Items, SequenceKind, Value};

/// What a template would write behind the messages before one.
#[derive(Debug)]
pub(super) struct Fork<'a> {
    /// How much the run had written by then, as [`Sink::length`] counts.
    pub at: usize,
    /// What comes behind it.
    pub sink: Sink<'a>,
}

/// The forks of a run: one for each message that is asked for and allows it.
pub(super) struct Forks<'a> {
    /// Which messages are asked for.
    pub wanted: Vec<bool>,
    pub found: Vec<Option<Fork<'a>>>,
}

/// The statements behind a loop, from the innermost body to the outermost.
pub(super) struct Behind<'s, 'a> {
    rest: &'a [Statement],
    outer: Option<&'s Behind<'s, 'a>>,
}

impl<'a> Interpreter<'a> {
    /// Runs the template for its forks at the messages that are `wanted`: what it wrote, and the forks. A failure ends it,
    /// and the forks before it stand.
    pub fn run_forked(mut self, wanted: Vec<bool>) -> (Sink<'a>, Vec<Option<Fork<'a>>>) {
        self.forks = Some(Forks { found: wanted.iter().map(|_| None).collect(), wanted });
        let _ = self.outer(&self.program.body, None);
        (self.sink, self.forks.map(|forks| forks.found).unwrap_or_default())
    }

    /// Runs statements that nothing but branches are around; `behind` follows them.
    pub fn outer(&mut self, body: &'a [Statement], behind: Option<&Behind<'_, 'a>>) -> Eval<()> {
        for (index, statement) in body.iter().enumerate() {
            let behind = Behind { rest: &body[index + 1..], outer: behind };
            let done = match &statement.kind {
                Kind::If(branches, otherwise) => {
                    self.branch(branches, otherwise).and_then(|body| self.outer(body, Some(&behind)))
                }
                Kind::For(definition) => self.for_loop(definition, Some(&behind)).map(drop),
                _ => self.statement(statement).map(drop),
            };
            done.map_err(|failure| failure.at_line(statement.line))?;
        }
        Ok(())
    }

    /// Tries how the run would go on if the loop over the messages ended before `message`, if that is wanted.
    pub fn fork(&mut self, message: usize, definition: &'a For, is_unfinished: bool, behind: &Behind<'_, 'a>) {
        let horizon = self.messages.horizon();
        if horizon > message || !self.forks.as_ref().is_some_and(|forks| forks.wanted[message]) {
            return;
        }
        let (Some(sink), Some(places)) = (self.sink.fork(), copied(&self.places)) else { return };
        let at = self.sink.length();
        let none = self.messages.window(0..0);
        let mut trial = Interpreter::new(self.program, self.clock, none, sink);
        trial.places = places;
        trial.end_messages(&self.messages, message);
        let is_done = trial.after_loop(definition, is_unfinished).and_then(|_| {
            let mut behind = Some(behind);
            while let Some(Behind { rest, outer }) = behind {
                trial.body(rest)?;
                behind = *outer;
            }
            Ok(())
        });
        let is_blind = self.messages.horizon() <= message;
        self.messages.restore_horizon(horizon);
        if let (Ok(()), true, Some(forks)) = (is_done, is_blind, &mut self.forks) {
            forks.found[message] = Some(Fork { at, sink: trial.sink });
        }
    }

    /// Ends the list of messages at `length`, unless the template put something else in its place.
    fn end_messages(&mut self, messages: &Items<'a>, length: usize) {
        let place = self.program.context.iter().find(|(name, _)| **name == *"messages");
        if let Some((_, place)) = place
            && let Value::Sequence(SequenceKind::List, items) = &mut self.places[*place]
            && messages.offset_of(items) == Some(0)
            && items.held() == messages.held()
        {
            *items = messages.window(0..length);
        }
    }
}

/// A copy of variables that shares nothing which can change; `None` where that is not simple.
fn copied<'a>(places: &[Value<'a>]) -> Option<Vec<Value<'a>>> {
    let mut copies: Vec<(Rc<RefCell<_>>, Rc<RefCell<_>>)> = Vec::new();
    let mut copy = |value: &Value<'a>| match value {
        Value::Generator(_) => None,
        Value::Namespace(attributes) => {
            let known = copies.iter().find(|(original, _)| Rc::ptr_eq(original, attributes));
            if let Some((_, copy)) = known {
                return Some(Value::Namespace(copy.clone()));
            }
            let is_changing = |value: &Value<'_>| matches!(value, Value::Namespace(_) | Value::Generator(_));
            if attributes.borrow().iter().any(|(_, value)| is_changing(value)) {
                return None;
            }
            let copy = Rc::new(RefCell::new(attributes.borrow().clone()));
            copies.push((attributes.clone(), copy.clone()));
            Some(Value::Namespace(copy))
        }
        value => Some(value.clone()),
    };
    places.iter().map(&mut copy).collect()
}

#[cfg(test)]
mod tests {
    use super::super::sink::Difference;
    use super::super::{ChatTemplate, NAMES, Prompt, input, named};
    use super::*;
    use crate::conversation::{Message, Role};

    fn conversation() -> Vec<Message<'static>> {
        let roles =
            [Role::System, Role::User, Role::Assistant, Role::User, Role::Assistant, Role::User, Role::Assistant];
        let texts = ["Be kind.", "Hello?", "Hi.", "<tool_response>x</tool_response>", " ", "More", "Bye."];
        roles.into_iter().zip(texts).map(|(role, text)| Message::new(role, text)).collect()
    }

    /// For each message: does a fork tell the text before it? That it tells the same as a run on the messages before is
    /// asserted.
    fn told(template: &ChatTemplate, messages: &[Message<'_>], prompt: Prompt) -> Vec<bool> {
        let (text, _) = template.observe(messages, Prompt::None).unwrap();
        let difference = || Difference { text: &text, common: 0, rest: Vec::new() };
        let wanted = vec![true; messages.len()];
        let (_, forks) =
            template.forks(input::messages(messages), None, prompt, Sink::Compare(difference()), wanted.clone());
        let (sink, recorded) =
            template.forks(input::messages(messages), None, prompt, Sink::Record(Vec::new()), wanted);
        let wrote = sink.into_parts();
        let tells = |index: usize| {
            let alone = template.compare(input::messages(&messages[..index]), None, prompt, &text);
            let Some(fork) = &forks[index] else {
                assert!(recorded[index].is_none());
                return false;
            };
            let alone = alone.expect("where a fork is, a run alone succeeds");
            let Sink::Compare(found) = &fork.sink else { unreachable!("the run compared") };
            assert_eq!((alone.common, &alone.rest), (found.common, &found.rest), "before message {index}");
            let Some(Fork { at, sink: Sink::Record(behind) }) = &recorded[index] else {
                unreachable!("the run recorded, and what a run writes does not depend on where it goes")
            };
            let parts = wrote[..*at].iter().chain(behind);
            let seen: String = parts.map(|part| part.plain().unwrap()).collect();
            assert_eq!(seen.as_bytes(), [&text.as_bytes()[..found.common], &found.rest].concat());
            true
        };
        (0..messages.len()).map(tells).collect()
    }

    fn compile(source: &str) -> ChatTemplate {
        ChatTemplate::compile("test", source, &[]).unwrap()
    }

    // A fork writes what a run on the messages before it writes, for every built-in template and prompt.
    #[test]
    fn forks_are_runs_on_the_messages_before() {
        for name in NAMES {
            let template = compile(named(name).unwrap());
            let whole = conversation();
            let conversation = || if template.observe(&whole, Prompt::None).is_ok() { &whole[..] } else { &whole[1..] };
            for prompt in [Prompt::None, Prompt::Answer, Prompt::WithoutThinking] {
                for length in 2..=conversation().len() {
                    told(&template, &conversation()[..length], prompt);
                }
            }
        }
        let chatml = compile(named("chatml").unwrap());
        assert_eq!(vec![true; 7], told(&chatml, &conversation(), Prompt::Answer));
    }

    // What looks at the end of the messages, or changes what a trial shares, has no forks where they would be wrong.
    #[test]
    fn forks_see_no_further_than_their_messages() {
        let write = "{{ '[' + message.role + ']' + message.content }}";
        let prompt = "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}";
        let in_loop = |body: &str| format!("{{% for message in messages %}}{body}{write}{{% endfor %}}{prompt}");
        let all = [true; 7];
        let cases = [
            (in_loop(""), all),
            (in_loop("{% if loop.first %}{{ messages[0].content }}{% endif %}"), all),
            // Whether a message is the last one is known to be false once the next one is there.
            (in_loop("{% if loop.last %}!{% endif %}"), [true, false, false, false, false, false, false]),
            (
                in_loop("{% if message.role == 'user' and loop.last %}!{% endif %}"),
                [true, true, false, true, false, true, false],
            ),
            (in_loop("{% if loop.nextitem %}+{% endif %}"), [true, false, false, false, false, false, false]),
            (in_loop("{% if loop.previtem %}-{% endif %}"), all),
            (in_loop("{{ messages | length }}"), [true, false, false, false, false, false, false]),
            (in_loop("{{ messages[-1].role }}"), [true, false, false, false, false, false, false]),
            (in_loop("{{ messages[:2] | length }}"), [true, false, true, true, true, true, true]),
            (
                in_loop("{% if messages[loop.index0 + 2] %}{% endif %}"),
                [true, false, false, false, false, false, false],
            ),
            (format!("{{% set n = messages | length %}}{}", in_loop("")), [false; 7]),
            (format!("{{% if messages %}}{}{{% endif %}}", in_loop("")), [false, true, true, true, true, true, true]),
            (
                format!("{{% set messages = messages[1:] %}}{}", in_loop("")),
                [false, true, true, true, true, true, true],
            ),
            // The trial runs on the messages before, whatever it asks of them.
            (
                format!("{}{{{{ messages | length }}}}{{{{ messages[-1].role }}}}", in_loop("")),
                [false, true, true, true, true, true, true],
            ),
            (format!("{{% set all = messages %}}{}{{{{ all | length }}}}", in_loop("")), [false; 7]),
            // A trial changes nothing of the run.
            (
                format!(
                    "{{% set n = namespace(x=0) %}}{}{{% set n.x = n.x + 1 %}}{{{{ n.x }}}}",
                    in_loop("{% set n.x = n.x + 2 %}")
                ),
                all,
            ),
            (format!("{{% set g = 'ab' | map('upper') %}}{}{{{{ g | list }}}}", in_loop("")), [false; 7]),
            (format!("{{% for message in messages %}}{write}{{% else %}}none{{% endfor %}}{prompt}"), all),
        ];
        let check = |(source, expected): (String, [bool; 7])| {
            let found = told(&compile(&source), &conversation(), Prompt::Answer);
            (found != expected).then(|| format!("{source}: {found:?}"))
        };
        assert_eq!(Vec::<String>::new(), cases.into_iter().filter_map(check).collect::<Vec<_>>());
    }
}
