//! Runs a template: walks its tree and writes its text.

use std::cell::Cell;
use std::ops::Range;
use std::rc::Rc;

use super::ast::{Body, Call, Expr, For, Kind, Place, Scoped, Statement, Target};
use super::calls::set_attribute;
use super::clock::DateTime;
use super::failure::{Eval, impossible};
use super::filters::Filter;
use super::fork::{Behind, Forks};
use super::scope::Program;
use super::sink::{Output, Sink, Visit, Wrote};
use super::value::{Items, Loop, SequenceKind, Text, Value};

/// How much one rendering may do: loop iterations and calls, and kibibytes of text kept in variables. No chat needs a tenth.
const MAX_WORK: u64 = 50_000_000;

/// What a statement does to the loop around it.
pub(super) enum Flow {
    Next,
    Break,
    Continue,
}

/// One run of a template.
pub(super) struct Interpreter<'a> {
    pub program: &'a Program,
    pub clock: Option<DateTime>,
    /// The variables: those of the template, then those of each macro that runs.
    pub places: Vec<Value<'a>>,
    /// Where the variables of the running macro begin.
    pub base: usize,
    /// How many macros run.
    pub calls: usize,
    work: u64,
    pub sink: Sink<'a>,
    /// Texts of macros and blocks that are not written but kept; the innermost last.
    captures: Vec<Sink<'a>>,
    generated: Vec<Range<usize>>,
    pub messages: Items<'a>,
    visits: Vec<Visit>,
    pub forks: Option<Forks<'a>>,
}

impl<'a> Interpreter<'a> {
    /// A run over `messages`, whose output goes into `sink`.
    pub fn new(program: &'a Program, clock: Option<DateTime>, messages: Items<'a>, sink: Sink<'a>) -> Self {
        let places = vec![Value::Undefined(""); program.num_places];
        let mut interpreter = Self {
            program,
            clock,
            places,
            base: program.num_places,
            calls: 0,
            work: 0,
            sink,
            captures: Vec::new(),
            generated: Vec::new(),
            visits: vec![Visit::Silent; messages.held()],
            messages,
            forks: None,
        };
        for (name, place) in &program.context {
            interpreter.places[*place] = Value::Undefined(name);
        }
        let messages = Value::Sequence(SequenceKind::List, interpreter.messages.clone());
        interpreter.set("messages", messages);
        interpreter
    }

    /// Gives a variable that the template may read its value.
    pub fn set(&mut self, name: &str, value: Value<'a>) {
        if let Some((_, place)) = self.program.context.iter().find(|(known, _)| **known == *name) {
            self.places[*place] = value;
        }
    }

    /// Runs the template.
    pub fn run(mut self) -> Eval<Output<'a>> {
        self.outer(&self.program.body, None)?;
        Ok(Output { sink: self.sink, generated: self.generated, visits: self.visits })
    }

    /// Pays for work; a template that does too much is stopped.
    pub fn spend(&mut self, work: usize) -> Eval<()> {
        self.work += work as u64;
        if self.work > MAX_WORK {
            return impossible("the template does not come to an end");
        }
        Ok(())
    }

    /// Writes a text to where the output goes.
    pub fn write(&mut self, text: &Text<'a>) {
        match self.captures.last_mut() {
            Some(capture) => capture.write(text),
            None => self.sink.write(text),
        }
    }

    /// The variable at `place`, to be set.
    pub fn slot(&mut self, place: Place) -> &mut Value<'a> {
        match place {
            Place::Root(index) => &mut self.places[index],
            Place::Local(index) => &mut self.places[self.base + index],
        }
    }

    /// The variable at `place`.
    pub fn load(&self, place: Place) -> &Value<'a> {
        match place {
            Place::Root(index) => &self.places[index],
            Place::Local(index) => &self.places[self.base + index],
        }
    }

    pub fn enter(&mut self, scoped: &'a Scoped) {
        for (place, outer) in &scoped.entry {
            let value = outer.map_or(Value::Undefined(""), |outer| self.load(outer).clone());
            *self.slot(*place) = value;
        }
    }

    pub fn body(&mut self, body: &'a [Statement]) -> Eval<Flow> {
        for statement in body {
            match self.statement(statement) {
                Ok(Flow::Next) => {}
                Ok(flow) => return Ok(flow),
                Err(failure) => return Err(failure.at_line(statement.line)),
            }
        }
        Ok(Flow::Next)
    }

    pub fn statement(&mut self, statement: &'a Statement) -> Eval<Flow> {
        match &statement.kind {
            Kind::Text(text) => self.write(&Text::Borrowed(text)),
            Kind::Print(value) => self.print(value)?,
            Kind::Set(target, value) => {
                let value = self.eval(value)?;
                self.assign(target, value)?;
            }
            Kind::SetBlock(target, filters, scoped) => {
                let text = self.capture(scoped)?;
                let value = self.filtered(Value::Text(text), filters)?;
                self.assign(target, value)?;
            }
            Kind::FilterBlock(filters, scoped) => {
                let text = self.capture(scoped)?;
                let value = self.filtered(Value::Text(text), filters)?;
                self.write_value(&value)?;
            }
            Kind::If(branches, otherwise) => {
                let body = self.branch(branches, otherwise)?;
                return self.body(body);
            }
            Kind::For(definition) => return self.for_loop(definition, None),
            Kind::With(values, scoped) => {
                let evaluated: Vec<_> = values.iter().map(|(_, value)| self.eval(value)).collect::<Eval<_>>()?;
                for ((target, _), value) in values.iter().zip(evaluated) {
                    self.assign(target, value)?;
                }
                self.enter(scoped);
                return self.body(&scoped.body);
            }
            Kind::Macro(name, index) => *self.slot(name.place) = Value::Macro(*index),
            Kind::Generation(scoped) => {
                let start = self.sink.length();
                self.enter(scoped);
                let flow = self.body(&scoped.body)?;
                self.generated.push(start..self.sink.length());
                return Ok(flow);
            }
            Kind::Break => return Ok(Flow::Break),
            Kind::Continue => return Ok(Flow::Continue),
        }
        Ok(Flow::Next)
    }

    /// The branch of an `{% if %}` that is to run.
    pub fn branch(&mut self, branches: &'a [(Expr, Body)], otherwise: &'a Body) -> Eval<&'a Body> {
        for (test, body) in branches {
            if self.test(test)? {
                return Ok(body);
            }
        }
        Ok(otherwise)
    }

    /// Runs a body whose output is kept.
    pub fn capture(&mut self, scoped: &'a Scoped) -> Eval<Text<'a>> {
        self.enter(scoped);
        self.captures.push(self.sink.capture());
        self.body(&scoped.body)?;
        let capture = self.captures.pop().expect("the capture was pushed above");
        self.spend(1 + capture.length() / 1024)?;
        Ok(capture.into_captured())
    }

    fn filtered(&mut self, mut value: Value<'a>, filters: &'a [Call<Filter>]) -> Eval<Value<'a>> {
        for filter in filters {
            value = filter.callee.apply(value, self.arguments(&filter.arguments, &filter.named)?)?;
        }
        Ok(value)
    }

    /// Runs a loop; `behind` is what follows it, if nothing but the template is around it.
    pub fn for_loop(&mut self, definition: &'a For, behind: Option<&Behind<'_, 'a>>) -> Eval<Flow> {
        let mut items = self.eval(&definition.iterable)?.iterate()?;
        // Without `loop` the condition is asked when its item's turn comes, as Jinja asks it; with it, beforehand.
        let mut condition = definition.condition.as_ref();
        if let (Some(test), Some(_)) = (condition, definition.loop_place) {
            let mut passing = Vec::new();
            for value in items.iter() {
                self.spend(1)?;
                self.enter(&definition.scoped);
                self.assign(&definition.target, value.clone())?;
                if self.test(test)? {
                    passing.push(value);
                }
            }
            items = Value::list(passing)?.iterate()?;
            condition = None;
        }
        let state = definition.loop_place.map(|place| {
            let state = Rc::new(Loop { items: items.clone(), index: Cell::new(0) });
            *self.slot(place) = Value::Loop(state.clone());
            state
        });
        let first_message = self.messages.offset_of(&items);
        // Jinja's `else` runs unless some iteration came to its end: not after `break` or `continue` alone.
        let mut is_unfinished = true;
        for index in 0..items.held() {
            if let (Some(first), Some(behind)) = (first_message, behind) {
                self.fork(first + index, definition, is_unfinished, behind);
            }
            self.spend(1)?;
            self.enter(&definition.scoped);
            let value = items.get(index).expect("the index is below the length");
            self.assign(&definition.target, value)?;
            if let Some(test) = condition
                && !self.test(test)?
            {
                continue;
            }
            if let Some(state) = &state {
                state.index.set(index);
            }
            let start = self.sink.length();
            let flow = self.body(&definition.scoped.body)?;
            if let Some(first) = first_message {
                self.visit(first + index, start);
            }
            match flow {
                Flow::Next => is_unfinished = false,
                Flow::Continue => {}
                Flow::Break => return self.after_loop(definition, is_unfinished),
            }
        }
        items.look_at_end();
        self.after_loop(definition, is_unfinished)
    }

    /// Runs the `{% else %}` of a loop, if it is to run.
    pub fn after_loop(&mut self, definition: &'a For, is_unfinished: bool) -> Eval<Flow> {
        if is_unfinished {
            self.enter(&definition.otherwise);
            return self.body(&definition.otherwise.body);
        }
        Ok(Flow::Next)
    }

    fn visit(&mut self, message: usize, start: usize) {
        let wrote = Wrote { start, end: self.sink.length(), horizon: self.messages.horizon() };
        if wrote.start < wrote.end {
            let visit = &mut self.visits[message];
            *visit = if *visit == Visit::Silent { Visit::Wrote(wrote) } else { Visit::Ambiguous };
        }
    }

    fn assign(&mut self, target: &'a Target, value: Value<'a>) -> Eval<()> {
        match target {
            Target::Name(name) => *self.slot(name.place) = value,
            Target::Attribute(name, attribute) => {
                let Value::Namespace(attributes) = self.load(name.place) else {
                    return impossible(format!("'{}' is not a namespace", name.text));
                };
                set_attribute(&mut attributes.borrow_mut(), Text::Borrowed(attribute), value)?;
            }
            Target::Tuple(targets) => {
                let values = value.iterate()?;
                if values.len() != targets.len() {
                    return impossible(format!("expected {} values to unpack, found {}", targets.len(), values.len()));
                }
                for (target, value) in targets.iter().zip(values.iter()) {
                    self.assign(target, value)?;
                }
            }
        }
        Ok(())
    }
}
