//! Conversation → text and the spans of it that are trained on, by the model's own chat template.
//!
//! The reference is `apply_chat_template` of `transformers`: the same bytes come out, or an error does. Templates are
//! programs in Jinja with Python's values, so this is a small interpreter with Python's semantics, not a general Jinja
//! engine with other ones: [`lexer`] and [`parser`] refuse, when the template is loaded, all that is not known to behave
//! the same; [`scope`] gives each name its place; [`interpreter`] runs the tree over the record's own strings, without
//! copying them. [`spans`] proves what is trained on.

mod ast;
mod calls;
mod clock;
mod evaluate;
mod expressions;
mod failure;
mod filters;
mod fork;
mod format;
mod input;
mod interpreter;
mod lexer;
mod load;
mod methods;
mod named;
mod operators;
mod order;
mod origin;
mod parser;
mod plan;
mod predicates;
mod python;
mod scope;
mod sink;
mod spans;
mod thinking;
mod trace;
mod value;
mod visit;

use std::ops::Range;
use std::sync::Arc;

use serde::Serialize;

use self::failure::{Eval, Failure};
use self::fork::Fork;
use self::interpreter::Interpreter;
use self::origin::Made;
use self::plan::Plans;
use self::scope::Program;
use self::sink::{Difference, Output, Sink, Visit};
use self::spans::{Endings, QUESTION, sentence};
use self::thinking::Thinking;
use self::value::{Items, Value};
use crate::conversation::{Conversation, Message, Role};
use crate::error::{Error, ErrorKind, Result};
use crate::json;
use crate::tokenize::control::Stretch;

pub use self::clock::DateTime;
pub use self::load::{SpecialTokens, load};
pub use self::named::{NAMES, named};
pub use self::thinking::DroppedThinking;

/// A compiled chat template. Rendering does not change it, so that all threads share one.
#[derive(Debug)]
pub struct ChatTemplate {
    name: String,
    source: String,
    program: Program,
    special_tokens: SpecialTokens,
    clock: Option<DateTime>,
    endings: Endings,
    thinking: Thinking,
    verdict: Verdict,
    /// Tells this template from all others.
    identity: Arc<()>,
}

/// What is known of a template.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Verdict {
    /// Does every answer of a plain conversation stand where the model would write it?
    pub prefix_preserving: bool,
    /// Does an answer end with a token that ends the turn?
    pub end_of_turn_trained: bool,
    /// Does the template say itself, with `{% generation %}`, what is trained on?
    pub has_generation_markers: bool,
    /// Does the text depend on the date?
    pub date_dependent: bool,
    /// Does it write the thinking of the last answer, given as a field of its message?
    pub shows_thinking: bool,
    /// Does it leave out the thinking of earlier turns?
    pub drops_earlier_thinking: bool,
    /// What its generation prompt opens at its end, such as `<think>`; answers without thinking do not begin with it.
    pub opens_thinking: Option<String>,
}

/// What follows the messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Prompt {
    None,
    /// The generation prompt.
    Answer,
    /// The generation prompt for an answer without thinking.
    WithoutThinking,
    /// The generation prompt; a thought that it opens at its end may be missing.
    Unopened,
}

/// What the text before an answer may end with, in the order of preference.
const PROMPTS: [Prompt; 3] = [Prompt::Answer, Prompt::WithoutThinking, Prompt::Unopened];
/// Variables by which templates are told whether the model is to think.
const THINKING_SWITCHES: [&str; 2] = ["enable_thinking", "thinking"];

/// A rendered conversation. Keep it for the next one: it also holds what has been learned of the template on the way.
#[derive(Clone, Debug, Default)]
pub struct Rendered {
    /// The text.
    pub text: String,
    /// The byte ranges of `text` that are trained on: in order, disjoint, none empty.
    pub spans: Vec<Range<usize>>,
    /// The message that each span is the answer of; `None` where the template's marks do not tell.
    pub answers: Vec<Option<usize>>,
    /// Answers that are not trained on because the template leaves out their thinking, or changes the text before them;
    /// ascending. See [`ChatTemplate::review`].
    pub dropped: Vec<usize>,
    /// Answers before which the text is not what the model would see, because of messages that follow; and how it differs.
    changed: Vec<(usize, String)>,
    /// The stretches of `text` that the record wrote, not the template: in order, disjoint, none empty.
    pub stretches: Vec<Stretch>,
    plans: Plans,
}

impl Rendered {
    /// Puts in text that no template frames: the `parts` of the record, and `end` behind them. What stands from byte `start`
    /// on is trained on.
    pub fn set_plain(&mut self, parts: &[&str], end: &str, start: usize) {
        self.text.clear();
        parts.iter().for_each(|part| self.text.push_str(part));
        self.stretches.clear();
        self.stretches.push(Stretch { range: 0..self.text.len(), is_mixed: false });
        self.text.push_str(end);
        self.spans.clear();
        self.spans.push(start..self.text.len());
        self.answers.clear();
        self.answers.push(None);
        self.dropped.clear();
        self.changed.clear();
    }
}

impl ChatTemplate {
    /// Compiles the Jinja text `source`; `special_tokens` are variables such as `bos_token`, `name` is for messages.
    ///
    /// # Errors
    /// [`ErrorKind::Template`], with the line and the reason, if the template has something that is not known to render
    /// as `transformers` renders it.
    pub fn compile(name: &str, source: &str, special_tokens: &[(String, String)]) -> Result<Self> {
        let program = parser::parse(source).and_then(scope::resolve).map_err(|refusal| {
            let message = format!("chat template '{name}', line {}: {}", refusal.line, refusal.reason);
            Error::new(ErrorKind::Template, message)
                .with_hint("use a named template, or a file with a template that does without it")
        })?;
        let mut template = Self {
            name: name.into(),
            source: source.into(),
            verdict: Verdict {
                prefix_preserving: false,
                end_of_turn_trained: false,
                has_generation_markers: program.has_generation,
                date_dependent: program.is_date_dependent,
                shows_thinking: false,
                drops_earlier_thinking: false,
                opens_thinking: None,
            },
            program,
            special_tokens: special_tokens.to_vec(),
            // What is learned from the probes does not depend on the date, but they need one.
            clock: Some(DateTime::now()),
            endings: Endings::default(),
            thinking: Thinking::default(),
            identity: Arc::default(),
        };
        template.endings = Endings::learn(&template);
        template.verdict.prefix_preserving = template.is_prefix_preserving();
        template.verdict.end_of_turn_trained = template.ends_turns();
        template.thinking = Thinking::learn(&template);
        template.verdict.shows_thinking = template.thinking.is_shown();
        template.verdict.drops_earlier_thinking = template.thinking.drops_earlier;
        template.verdict.opens_thinking = template.endings.opened.as_deref().map(|tag| tag.trim().to_owned());
        template.clock = None;
        Ok(template)
    }

    /// Sets the date that the template takes for today. Without one, templates that ask for it fail.
    pub fn with_clock(mut self, clock: DateTime) -> Self {
        self.clock = Some(clock);
        self.identity = Arc::default();
        self
    }

    /// Renders `conversation` into `out`, whose memory is reused.
    ///
    /// # Errors
    /// [`ErrorKind::TemplateFailed`] if the template refuses the conversation or can't be rendered faithfully on it,
    /// [`ErrorKind::MaskUnproved`] if an answer does not stand where the model would write it, and errors of class
    /// [`Input`](crate::error::ErrorClass::Input) for values that Python would read differently.
    pub fn render(&self, conversation: &Conversation<'_>, out: &mut Rendered) -> Result<()> {
        out.text.clear();
        out.spans.clear();
        out.answers.clear();
        out.changed.clear();
        out.dropped.clear();
        out.stretches.clear();
        let mut plans = std::mem::take(&mut out.plans);
        let is_rendered = plans.render(&self.identity, conversation, out);
        out.plans = plans;
        if is_rendered {
            return Ok(());
        }
        self.render_without_plan(conversation, out)?;
        out.plans.learn(self, conversation);
        Ok(())
    }

    fn render_without_plan(&self, conversation: &Conversation<'_>, out: &mut Rendered) -> Result<()> {
        input::check(conversation)?;
        let messages = input::messages(&conversation.messages);
        let sink = Sink::collect(std::mem::take(&mut out.text), std::mem::take(&mut out.stretches));
        let output = self
            .run(messages.clone(), conversation.tools.as_ref(), Prompt::None, sink)
            .map_err(|failure| self.failed(&failure))?;
        Made { text: out.text, stretches: out.stretches } = output.sink.into_made();
        if self.program.has_generation {
            (out.spans, out.answers) =
                spans::marked(conversation, output.generated, &output.visits)?.into_iter().unzip();
            return Ok(());
        }
        let proved = spans::prove(self, conversation, &messages, &out.text, &output.visits, &PROMPTS)?;
        out.changed = proved.changed;
        (out.spans, out.answers) = proved.spans.into_iter().map(|(span, answer)| (span, Some(answer))).unzip();
        Ok(())
    }

    /// Takes out of `rendered`, the text of `conversation`, the answers whose thinking the template leaves out, by
    /// `policy`; and thoughts, unless `trains_on_thoughts`.
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
        self.thinking.review(conversation, rendered, policy, trains_on_thoughts)
    }

    /// The error of answer `index`, whose thinking is nowhere in the text.
    pub fn dropped_thinking(&self, index: usize) -> Error {
        self.thinking.dropped(index)
    }

    /// Renders `messages` alone, as for inference.
    ///
    /// # Errors
    /// See [`render`](Self::render).
    pub fn render_prompt(&self, conversation: &Conversation<'_>, add_generation_prompt: bool) -> Result<String> {
        input::check(conversation)?;
        let messages = input::messages(&conversation.messages);
        let sink = Sink::collect(String::new(), Vec::new());
        let prompt = if add_generation_prompt { Prompt::Answer } else { Prompt::None };
        match self.run(messages, conversation.tools.as_ref(), prompt, sink) {
            Ok(output) => Ok(output.sink.into_made().text),
            Err(failure) => Err(self.failed(&failure)),
        }
    }

    /// The Jinja text.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// What is known of the template.
    pub fn verdict(&self) -> &Verdict {
        &self.verdict
    }

    fn endings(&self) -> &Endings {
        &self.endings
    }

    fn failed(&self, failure: &Failure) -> Error {
        let place = match failure.line() {
            0 => String::new(),
            line => format!(", line {line}"),
        };
        let message = format!("chat template '{}'{place}: {}", self.name, sentence(failure));
        Error::new(ErrorKind::TemplateFailed, message)
    }

    fn run<'r>(
        &'r self,
        messages: Items<'r>,
        tools: Option<&'r json::Value<'r>>,
        prompt: Prompt,
        sink: Sink<'r>,
    ) -> Eval<Output<'r>> {
        self.interpreter(messages, tools, prompt, sink).run()
    }

    /// What the template writes behind the messages before each one that is `wanted`, as far as one run tells: see [`fork`].
    fn forks<'r>(
        &'r self,
        messages: Items<'r>,
        tools: Option<&'r json::Value<'r>>,
        prompt: Prompt,
        sink: Sink<'r>,
        wanted: Vec<bool>,
    ) -> (Sink<'r>, Vec<Option<Fork<'r>>>) {
        self.interpreter(messages, tools, prompt, sink).run_forked(wanted)
    }

    fn interpreter<'r>(
        &'r self,
        messages: Items<'r>,
        tools: Option<&'r json::Value<'r>>,
        prompt: Prompt,
        sink: Sink<'r>,
    ) -> Interpreter<'r> {
        let mut interpreter = Interpreter::new(&self.program, self.clock, messages, sink);
        for (name, token) in &self.special_tokens {
            interpreter.set(name, Value::text(token));
        }
        interpreter.set("tools", tools.map_or(Value::None, Value::from_json));
        interpreter.set("documents", Value::None);
        interpreter.set("add_generation_prompt", Value::Bool(prompt != Prompt::None));
        if prompt == Prompt::WithoutThinking {
            THINKING_SWITCHES.iter().for_each(|name| interpreter.set(name, Value::Bool(false)));
        }
        interpreter
    }

    fn compare<'r>(
        &'r self,
        messages: Items<'r>,
        tools: Option<&'r json::Value<'r>>,
        prompt: Prompt,
        text: &'r str,
    ) -> Eval<Difference<'r>> {
        let sink = Sink::Compare(Difference { text, common: 0, rest: Vec::new() });
        Ok(self.run(messages, tools, prompt, sink)?.sink.into_difference())
    }

    /// The text of `messages` alone, and what a loop over them wrote.
    fn observe(&self, messages: &[Message<'_>], prompt: Prompt) -> Eval<(String, Vec<Visit>)> {
        let sink = Sink::collect(String::new(), Vec::new());
        let output = self.run(input::messages(messages), None, prompt, sink)?;
        Ok((output.sink.into_made().text, output.visits))
    }

    /// Can it be told that the model is not to think?
    fn knows_thinking(&self) -> bool {
        self.program.context.iter().any(|(name, _)| THINKING_SWITCHES.contains(&&**name))
    }

    /// Tries the proof of [`spans`] on a conversation of two turns.
    fn is_prefix_preserving(&self) -> bool {
        let turns = [
            (Role::User, "A question?"),
            (Role::Assistant, "An answer."),
            (Role::User, "Another question?"),
            (Role::Assistant, "Another answer."),
        ];
        let messages = turns.map(|(role, content)| Message::new(role, content)).into();
        let conversation = Conversation { messages, tools: None };
        let Ok((text, visits)) = self.observe(&conversation.messages, Prompt::None) else { return false };
        let messages = input::messages(&conversation.messages);
        spans::prove(self, &conversation, &messages, &text, &visits, &[Prompt::Answer])
            .is_ok_and(|proved| proved.changed.is_empty())
    }

    /// Does what is trained on of a short conversation end with the end of a turn?
    fn ends_turns(&self) -> bool {
        if !self.program.has_generation {
            return self.endings.has_end_of_turn();
        }
        let messages = vec![Message::new(Role::User, QUESTION), Message::new(Role::Assistant, spans::ANSWER)];
        let mut rendered = Rendered::default();
        let is_rendered = self.render(&Conversation { messages, tools: None }, &mut rendered).is_ok();
        is_rendered
            && rendered.spans.last().is_some_and(|span| {
                let trained = rendered.text[span.clone()].trim_end();
                trained.contains(spans::ANSWER) && !trained.ends_with(spans::ANSWER)
            })
    }
}
