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
mod trace;
mod value;
mod visit;

use std::ops::Range;
use std::sync::Arc;

use serde::Serialize;

use self::failure::{Eval, Failure};
use self::interpreter::Interpreter;
use self::origin::Made;
use self::plan::Plans;
use self::scope::Program;
use self::sink::{Difference, Output, Sink, Visit};
use self::spans::{Endings, sentence};
use self::value::{Items, Value};
use crate::conversation::{Conversation, Message, Role};
use crate::error::{Error, ErrorKind, Result};
use crate::json;
use crate::tokenize::control::Stretch;

pub use self::clock::DateTime;
pub use self::load::{SpecialTokens, load};
pub use self::named::{NAMES, named};

/// A compiled chat template. Rendering does not change it, so that all threads share one.
#[derive(Debug)]
pub struct ChatTemplate {
    name: String,
    source: String,
    program: Program,
    special_tokens: SpecialTokens,
    clock: Option<DateTime>,
    endings: Endings,
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
}

/// A rendered conversation. Keep it for the next one: it also holds what has been learned of the template on the way.
#[derive(Clone, Debug, Default)]
pub struct Rendered {
    /// The text.
    pub text: String,
    /// The byte ranges of `text` that are trained on: in order, disjoint, none empty.
    pub spans: Vec<Range<usize>>,
    /// The stretches of `text` that the record wrote, not the template: in order, disjoint, none empty.
    pub stretches: Vec<Stretch>,
    plans: Plans,
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
            },
            program,
            special_tokens: special_tokens.to_vec(),
            // What is learned from the probes does not depend on the date, but they need one.
            clock: Some(DateTime::now()),
            endings: Endings::default(),
            identity: Arc::default(),
        };
        template.endings = Endings::learn(&template);
        template.verdict.prefix_preserving = template.is_prefix_preserving();
        template.verdict.end_of_turn_trained = template.ends_turns();
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
            .run(messages.clone(), conversation.tools.as_ref(), false, sink)
            .map_err(|failure| self.failed(&failure))?;
        Made { text: out.text, stretches: out.stretches } = output.sink.into_made();
        if self.program.has_generation {
            out.spans.extend(output.generated.into_iter().filter(|span| !span.is_empty()));
            return Ok(());
        }
        spans::prove(self, conversation, &messages, &out.text, &output.visits, &mut out.spans)
    }

    /// Renders `messages` alone, as for inference.
    ///
    /// # Errors
    /// See [`render`](Self::render).
    pub fn render_prompt(&self, conversation: &Conversation<'_>, add_generation_prompt: bool) -> Result<String> {
        input::check(conversation)?;
        let messages = input::messages(&conversation.messages);
        let sink = Sink::collect(String::new(), Vec::new());
        match self.run(messages, conversation.tools.as_ref(), add_generation_prompt, sink) {
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
        add_generation_prompt: bool,
        sink: Sink<'r>,
    ) -> Eval<Output<'r>> {
        let mut interpreter = Interpreter::new(&self.program, self.clock, messages, sink);
        for (name, token) in &self.special_tokens {
            interpreter.set(name, Value::text(token));
        }
        interpreter.set("tools", tools.map_or(Value::None, Value::from_json));
        interpreter.set("documents", Value::None);
        interpreter.set("add_generation_prompt", Value::Bool(add_generation_prompt));
        interpreter.run()
    }

    fn compare<'r>(
        &'r self,
        messages: Items<'r>,
        tools: Option<&'r json::Value<'r>>,
        add_generation_prompt: bool,
        text: &'r str,
    ) -> Eval<Difference<'r>> {
        let sink = Sink::Compare(Difference { text, common: 0, rest: Vec::new() });
        Ok(self.run(messages, tools, add_generation_prompt, sink)?.sink.into_difference())
    }

    /// The text of `messages` alone, and what a loop over them wrote.
    fn observe(&self, messages: &[Message<'_>], add_generation_prompt: bool) -> Eval<(String, Vec<Visit>)> {
        let sink = Sink::collect(String::new(), Vec::new());
        let output = self.run(input::messages(messages), None, add_generation_prompt, sink)?;
        Ok((output.sink.into_made().text, output.visits))
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
        let Ok((text, visits)) = self.observe(&conversation.messages, false) else { return false };
        let messages = input::messages(&conversation.messages);
        spans::prove(self, &conversation, &messages, &text, &visits, &mut Vec::new()).is_ok()
    }

    /// Does what is trained on of a short conversation end with the end of a turn?
    fn ends_turns(&self) -> bool {
        if !self.program.has_generation {
            return self.endings.has_end_of_turn();
        }
        let messages = vec![Message::new(Role::User, "A question?"), Message::new(Role::Assistant, spans::ANSWER)];
        let mut rendered = Rendered::default();
        let is_rendered = self.render(&Conversation { messages, tools: None }, &mut rendered).is_ok();
        is_rendered
            && rendered.spans.last().is_some_and(|span| {
                let trained = rendered.text[span.clone()].trim_end();
                trained.contains(spans::ANSWER) && !trained.ends_with(spans::ANSWER)
            })
    }
}
