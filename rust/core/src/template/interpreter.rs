//! Runs a template: walks its tree and writes its text.

use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::rc::Rc;

use super::ast::{Body, Call, Expr, For, Function, Kind, Macro, Operator, Place, Scoped, Statement, Target};
use super::clock::DateTime;
use super::failure::{Cause, Eval, Failure, impossible};
use super::filters::Filter;
use super::methods::{Arguments, Attribute, attribute_of, call_method};
use super::operators::{binary, dict_from_pairs, holds, item, negate, slice, undefined_operation};
use super::scope::Program;
use super::value::{Items, Loop, SequenceKind, Text, Value};

/// How deep macros may call macros.
const MAX_CALLS: usize = 100;
/// How much one rendering may do: loop iterations and calls, and kibibytes of text kept in variables. No chat needs a tenth.
const MAX_WORK: u64 = 50_000_000;
/// The most that `range` counts to, as in Jinja's sandbox.
const MAX_RANGE: i128 = 100_000;

/// Where the text goes.
#[derive(Debug)]
pub(super) enum Sink<'a> {
    /// Kept.
    Collect(String),
    /// Compared with another text.
    Compare(Difference<'a>),
}

/// How far an output agrees with `text`, and what it is from there on.
#[derive(Debug)]
pub(super) struct Difference<'a> {
    pub text: &'a str,
    /// Bytes that agree; a character may be cut.
    pub common: usize,
    pub rest: Vec<u8>,
}

impl<'a> Sink<'a> {
    /// The text that was kept.
    pub fn into_text(self) -> String {
        match self {
            Self::Collect(text) => text,
            Self::Compare(_) => unreachable!("the run was not asked to keep its text"),
        }
    }

    /// The outcome of a comparison.
    pub fn into_difference(self) -> Difference<'a> {
        match self {
            Self::Compare(difference) => difference,
            Self::Collect(_) => unreachable!("the run was not asked to compare"),
        }
    }

    fn write(&mut self, text: &str) {
        match self {
            Self::Collect(out) => out.push_str(text),
            Self::Compare(Difference { text: expected, common, rest }) => {
                let mut bytes = text.as_bytes();
                if rest.is_empty() {
                    let expected = &expected.as_bytes()[*common..];
                    let agreeing = if expected.starts_with(bytes) {
                        bytes.len()
                    } else {
                        bytes.iter().zip(expected).take_while(|(byte, expected)| byte == expected).count()
                    };
                    *common += agreeing;
                    bytes = &bytes[agreeing..];
                }
                rest.extend_from_slice(bytes);
            }
        }
    }

    fn length(&self) -> usize {
        match self {
            Self::Collect(out) => out.len(),
            Self::Compare(difference) => difference.common + difference.rest.len(),
        }
    }
}

/// What one run leaves.
pub(super) struct Output<'a> {
    pub sink: Sink<'a>,
    /// What `{% generation %}` wrote.
    pub generated: Vec<Range<usize>>,
    /// What was written while a loop over the messages stood at each of them.
    pub visits: Vec<Visit>,
}

/// The output of a loop over the messages while it stood at one message.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Visit {
    /// No loop wrote anything there.
    Silent,
    Wrote(Range<usize>),
    /// Several loops wrote something.
    Ambiguous,
}

/// What a statement does to the loop around it.
enum Flow {
    Next,
    Break,
    Continue,
}

pub(super) struct Interpreter<'a> {
    program: &'a Program,
    clock: Option<DateTime>,
    /// The variables: those of the template, then those of each macro that runs.
    places: Vec<Value<'a>>,
    /// Where the variables of the running macro begin.
    base: usize,
    calls: usize,
    work: u64,
    sink: Sink<'a>,
    /// Texts of macros and blocks that are not written but kept; the innermost last.
    captures: Vec<String>,
    generated: Vec<Range<usize>>,
    messages: Items<'a>,
    visits: Vec<Visit>,
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
            visits: vec![Visit::Silent; messages.len()],
            messages,
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
        self.body(&self.program.body)?;
        Ok(Output { sink: self.sink, generated: self.generated, visits: self.visits })
    }

    fn spend(&mut self, work: usize) -> Eval<()> {
        self.work += work as u64;
        if self.work > MAX_WORK {
            return impossible("the template does not come to an end");
        }
        Ok(())
    }

    fn write(&mut self, text: &str) {
        match self.captures.last_mut() {
            Some(capture) => capture.push_str(text),
            None => self.sink.write(text),
        }
    }

    fn slot(&mut self, place: Place) -> &mut Value<'a> {
        match place {
            Place::Root(index) => &mut self.places[index],
            Place::Local(index) => &mut self.places[self.base + index],
        }
    }

    fn load(&self, place: Place) -> &Value<'a> {
        match place {
            Place::Root(index) => &self.places[index],
            Place::Local(index) => &self.places[self.base + index],
        }
    }

    fn enter(&mut self, scoped: &'a Scoped) {
        for (place, outer) in &scoped.entry {
            let value = outer.map_or(Value::Undefined(""), |outer| self.load(outer).clone());
            *self.slot(*place) = value;
        }
    }

    fn body(&mut self, body: &'a Body) -> Eval<Flow> {
        for statement in body {
            match self.statement(statement) {
                Ok(Flow::Next) => {}
                Ok(flow) => return Ok(flow),
                Err(failure) => return Err(failure.at_line(statement.line)),
            }
        }
        Ok(Flow::Next)
    }

    fn statement(&mut self, statement: &'a Statement) -> Eval<Flow> {
        match &statement.kind {
            Kind::Text(text) => self.write(text),
            Kind::Print(value) => self.print(value)?,
            Kind::Set(target, value) => {
                let value = self.eval(value)?;
                self.assign(target, value)?;
            }
            Kind::SetBlock(target, filters, scoped) => {
                let text = self.capture(scoped)?;
                let value = self.filtered(Value::owned(text), filters)?;
                self.assign(target, value)?;
            }
            Kind::FilterBlock(filters, scoped) => {
                let text = self.capture(scoped)?;
                let value = self.filtered(Value::owned(text), filters)?;
                self.write_value(&value)?;
            }
            Kind::If(branches, otherwise) => {
                for (test, body) in branches {
                    if self.test(test)? {
                        return self.body(body);
                    }
                }
                return self.body(otherwise);
            }
            Kind::For(definition) => return self.for_loop(definition),
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

    fn capture(&mut self, scoped: &'a Scoped) -> Eval<String> {
        self.enter(scoped);
        self.captures.push(String::new());
        self.body(&scoped.body)?;
        let text = self.captures.pop().unwrap_or_default();
        self.spend(1 + text.len() / 1024)?;
        Ok(text)
    }

    fn filtered(&mut self, mut value: Value<'a>, filters: &'a [Call<Filter>]) -> Eval<Value<'a>> {
        for filter in filters {
            value = filter.callee.apply(value, self.arguments(&filter.arguments, &filter.named)?)?;
        }
        Ok(value)
    }

    fn for_loop(&mut self, definition: &'a For) -> Eval<Flow> {
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
        for (index, value) in items.iter().enumerate() {
            self.spend(1)?;
            self.enter(&definition.scoped);
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
                self.visit(first + index, start..self.sink.length());
            }
            match flow {
                Flow::Next => is_unfinished = false,
                Flow::Continue => {}
                Flow::Break => break,
            }
        }
        if is_unfinished {
            self.enter(&definition.otherwise);
            return self.body(&definition.otherwise.body);
        }
        Ok(Flow::Next)
    }

    fn visit(&mut self, message: usize, wrote: Range<usize>) {
        if !wrote.is_empty() {
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

    /// Prints an expression. Joined texts are written piece by piece: nothing can look at them in between.
    fn print(&mut self, expr: &'a Expr) -> Eval<()> {
        match expr {
            Expr::Text(text) => self.write(text),
            Expr::Concat(parts) => {
                for part in parts {
                    let value = self.eval(part)?;
                    self.write_value(&value)?;
                }
            }
            _ => {
                if let Some(value) = self.print_sum(expr)? {
                    self.write_value(&value)?;
                }
            }
        }
        Ok(())
    }

    /// Writes a sum whose first summand is a text; gives back the value of what is something else.
    fn print_sum(&mut self, expr: &'a Expr) -> Eval<Option<Value<'a>>> {
        let value = match expr {
            Expr::Binary(Operator::Add, pair) => match self.print_sum(&pair.0)? {
                // The left side is written: what follows is a text too, or an error.
                None => match self.eval(&pair.1)? {
                    Value::Text(right) => Value::Text(right),
                    right => binary(Operator::Add, &Value::text(""), &right)?,
                },
                Some(left) => binary(Operator::Add, &left, &self.eval(&pair.1)?)?,
            },
            _ => self.eval(expr)?,
        };
        match value {
            Value::Text(text) => {
                self.write(text.as_str());
                Ok(None)
            }
            value => Ok(Some(value)),
        }
    }

    fn write_value(&mut self, value: &Value<'a>) -> Eval<()> {
        match value {
            Value::Text(text) | Value::Safe(text) => self.write(text.as_str()),
            value => {
                let text = value.to_text()?;
                self.write(text.as_str());
            }
        }
        Ok(())
    }

    /// The truth of an expression.
    fn test(&mut self, expr: &'a Expr) -> Eval<bool> {
        match expr {
            Expr::Not(value) => Ok(!self.test(value)?),
            Expr::And(pair) => Ok(self.test(&pair.0)? && self.test(&pair.1)?),
            Expr::Or(pair) => Ok(self.test(&pair.0)? || self.test(&pair.1)?),
            Expr::Compare(first, rest) => self.compare(first, rest),
            Expr::Test(value, call) => {
                let value = self.eval(value)?;
                let arguments = self.arguments(&call.arguments, &call.named)?;
                if let Some((name, _)) = arguments.named.first() {
                    return impossible(format!("the test takes no argument '{name}'"));
                }
                call.callee.holds(&value, &arguments.positional)
            }
            _ => Ok(self.eval(expr)?.is_true()),
        }
    }

    fn compare(&mut self, first: &'a Expr, rest: &'a [(super::ast::Comparison, Expr)]) -> Eval<bool> {
        let mut left = self.eval(first)?;
        for (comparison, right) in rest {
            let right = self.eval(right)?;
            if !holds(*comparison, &left, &right)? {
                return Ok(false);
            }
            left = right;
        }
        Ok(true)
    }

    fn eval(&mut self, expr: &'a Expr) -> Eval<Value<'a>> {
        Ok(match expr {
            Expr::None => Value::None,
            Expr::Bool(flag) => Value::Bool(*flag),
            Expr::Int(number) => Value::Int(*number),
            Expr::Float(number) => Value::Float(*number),
            Expr::Text(text) => Value::text(text),
            Expr::Name(name) => match self.load(name.place) {
                Value::Undefined(_) => Value::Undefined(&name.text),
                value => value.clone(),
            },
            Expr::Function(function) => Value::Function(*function),
            Expr::Sequence(kind, items) => {
                Value::sequence(*kind, items.iter().map(|item| self.eval(item)).collect::<Eval<_>>()?)?
            }
            Expr::Dict(pairs) => {
                let mut evaluated = Vec::with_capacity(pairs.len());
                for (key, value) in pairs {
                    evaluated.push((self.eval(key)?, self.eval(value)?));
                }
                dict_from_pairs(evaluated)?
            }
            Expr::Attribute(value, attribute, name) => self.attribute(value, *attribute, name)?,
            Expr::Item(value, key) => {
                let value = self.eval(value)?;
                let key = self.eval(key)?;
                item(&value, &key)?
            }
            Expr::Slice(value, bounds) => {
                let value = self.eval(value)?;
                let mut evaluated = [const { None }; 3];
                for (evaluated, bound) in evaluated.iter_mut().zip(bounds.iter()) {
                    *evaluated = bound.as_ref().map(|bound| self.eval(bound)).transpose()?;
                }
                slice(&value, evaluated)?
            }
            Expr::Not(_) | Expr::Compare(..) | Expr::Test(..) => Value::Bool(self.test(expr)?),
            Expr::And(pair) => {
                let left = self.eval(&pair.0)?;
                if left.is_true() { self.eval(&pair.1)? } else { left }
            }
            Expr::Or(pair) => {
                let left = self.eval(&pair.0)?;
                if left.is_true() { left } else { self.eval(&pair.1)? }
            }
            Expr::Negative(value) => match self.eval(value)? {
                Value::Undefined(name) => return undefined_operation(name),
                value => negate(&value)?,
            },
            Expr::Positive(value) => match self.eval(value)? {
                Value::Float(number) => Value::Float(number),
                value => match value.as_int() {
                    Some(number) => Value::Int(number),
                    None => return impossible(format!("a {} has no sign", value.type_name())),
                },
            },
            Expr::Binary(operator, pair) => {
                let left = self.eval(&pair.0)?;
                let right = self.eval(&pair.1)?;
                let value = binary(*operator, &left, &right)?;
                self.spend_on(&value)?;
                value
            }
            Expr::Concat(parts) => {
                let mut text = String::new();
                for part in parts {
                    self.eval(part)?.write(&mut text)?;
                }
                let value = Value::owned(text);
                self.spend_on(&value)?;
                value
            }
            Expr::Conditional(parts) => {
                let (test, then, otherwise) = &**parts;
                if self.test(test)? {
                    self.eval(then)?
                } else {
                    match otherwise {
                        Some(otherwise) => self.eval(otherwise)?,
                        None => Value::Undefined("if without else"),
                    }
                }
            }
            Expr::Filter(value, call) => {
                let value = self.eval(value)?;
                let arguments = self.arguments(&call.arguments, &call.named)?;
                let value = call.callee.apply(value, arguments)?;
                self.spend_on(&value)?;
                value
            }
            Expr::Call(call) => self.call(call)?,
        })
    }

    /// Pays for a value that was made, so that no template can fill the memory.
    fn spend_on(&mut self, value: &Value<'a>) -> Eval<()> {
        match value {
            Value::Text(Text::Shared(text)) => self.spend(text.len() / 1024),
            Value::Sequence(_, items @ Items::Shared(..)) => self.spend(items.len() / 64),
            _ => Ok(()),
        }
    }

    fn attribute(&mut self, value: &'a Expr, attribute: Attribute, name: &'a str) -> Eval<Value<'a>> {
        // Most attributes are fields of a message: read without copying the message's handle.
        let evaluated;
        let value = match value {
            Expr::Name(variable) => self.load(variable.place),
            value => {
                evaluated = self.eval(value)?;
                &evaluated
            }
        };
        if let (Value::Dict(dict), Attribute::Other) = (value, attribute) {
            return Ok(dict.get(name).unwrap_or(Value::Undefined(name)));
        }
        if let Some(found) = attribute_of(value, attribute, name)? {
            return Ok(found);
        }
        Ok(match value {
            Value::Dict(dict) => dict.get(name).unwrap_or(Value::Undefined(name)),
            _ => Value::Undefined(name),
        })
    }

    fn arguments(&mut self, positional: &'a [Expr], named: &'a [(Box<str>, Expr)]) -> Eval<Arguments<'a>> {
        Ok(Arguments {
            positional: positional.iter().map(|value| self.eval(value)).collect::<Eval<_>>()?,
            named: named.iter().map(|(name, value)| Ok((&**name, self.eval(value)?))).collect::<Eval<_>>()?,
        })
    }

    fn call(&mut self, call: &'a Call<Expr>) -> Eval<Value<'a>> {
        if let Expr::Attribute(value, method, name) = &call.callee {
            let value = self.eval(value)?;
            let arguments = self.arguments(&call.arguments, &call.named)?;
            let found = attribute_of(&value, *method, name)?;
            return match found {
                Some(Value::Method) => {
                    let value = call_method(&value, *method, arguments)?;
                    self.spend_on(&value)?;
                    Ok(value)
                }
                Some(Value::Undefined(_)) => impossible(format!("the method '{name}' is forbidden in templates")),
                _ => impossible(format!("a {} has no method '{name}'", value.type_name())),
            };
        }
        let callee = self.eval(&call.callee)?;
        let arguments = self.arguments(&call.arguments, &call.named)?;
        match callee {
            Value::Macro(index) => self.call_macro(index, arguments).map(Value::owned),
            Value::Function(function) => self.call_function(function, arguments),
            Value::Undefined(name) => undefined_operation(name),
            callee => impossible(format!("a {} can't be called here", callee.type_name())),
        }
    }

    fn call_macro(&mut self, index: usize, arguments: Arguments<'a>) -> Eval<String> {
        let definition: &'a Macro = &self.program.macros[index];
        if self.calls == MAX_CALLS {
            return impossible(format!("macros that call each other deeper than {MAX_CALLS} levels"));
        }
        let num_parameters = definition.parameters.len();
        let mut values: Vec<Option<Value<'a>>> = arguments.positional.into_iter().map(Some).collect();
        if values.len() > num_parameters {
            return impossible(format!("macro '{}' takes at most {num_parameters} arguments", definition.name));
        }
        values.resize_with(num_parameters, || None);
        for (name, value) in arguments.named {
            match definition.parameters.iter().position(|parameter| *parameter.text == *name) {
                Some(at) if values[at].is_none() => values[at] = Some(value),
                _ => return impossible(format!("macro '{}' takes no argument '{name}'", definition.name)),
            }
        }

        let outer_base = std::mem::replace(&mut self.base, self.places.len());
        self.places.resize(self.base + definition.num_places, Value::Undefined(""));
        self.calls += 1;
        let first_default = num_parameters - definition.defaults.len();
        for (at, (parameter, value)) in definition.parameters.iter().zip(values).enumerate() {
            let value = match (value, at.checked_sub(first_default)) {
                (Some(value), _) => value,
                (None, Some(default)) => self.eval(&definition.defaults[default])?,
                (None, None) => Value::Undefined(&parameter.text),
            };
            *self.slot(parameter.place) = value;
        }
        let text = self.capture(&definition.scoped)?;
        self.calls -= 1;
        self.places.truncate(self.base);
        self.base = outer_base;
        Ok(text)
    }

    fn call_function(&mut self, function: Function, arguments: Arguments<'a>) -> Eval<Value<'a>> {
        match function {
            Function::RaiseException => {
                let [message] = arguments.bind(["message"], 1)?;
                let message = message.unwrap_or(Value::None).to_text()?;
                Err(Failure::new(Cause::Raised(message.as_str().to_owned())))
            }
            Function::StrftimeNow => {
                let [format] = arguments.bind(["format"], 1)?;
                match (format.as_ref().and_then(Value::as_str), self.clock) {
                    (Some(format), Some(clock)) => match clock.format(format) {
                        Ok(text) => Ok(Value::owned(text)),
                        Err(directive) => impossible(format!("the date format '{directive}' is not supported")),
                    },
                    _ => impossible("strftime_now takes a format"),
                }
            }
            Function::Range => {
                if !arguments.named.is_empty() {
                    return impossible("range takes no named arguments");
                }
                let numbers: Option<Vec<i128>> = arguments.positional.iter().map(Value::as_int).collect();
                let (start, stop, step) = match numbers.as_deref() {
                    Some([stop]) => (0, *stop, 1),
                    Some([start, stop]) => (*start, *stop, 1),
                    Some([start, stop, step]) if *step != 0 => (*start, *stop, *step),
                    _ => return impossible("range takes one to three integers, the step not 0"),
                };
                let length =
                    if step > 0 { (stop - start + step - 1) / step } else { (start - stop - step - 1) / -step };
                if length > MAX_RANGE {
                    return impossible(format!("range of more than {MAX_RANGE} numbers"));
                }
                self.spend(length.max(0) as usize / 64)?;
                let values = (0..length).map(|index| Value::Int(start + index * step)).collect();
                Value::sequence(SequenceKind::Range, values)
            }
            Function::Dict => dict_from_pairs(pairs(arguments)?),
            Function::Namespace => {
                let mut attributes = Vec::new();
                for (key, value) in pairs(arguments)? {
                    match key {
                        Value::Text(key) => set_attribute(&mut attributes, key, value)?,
                        key => return impossible(format!("a namespace can't have the attribute {}", key.type_name())),
                    }
                }
                Ok(Value::Namespace(Rc::new(RefCell::new(attributes))))
            }
        }
    }
}

/// The pairs that `dict(…)` makes a dict of.
fn pairs<'a>(arguments: Arguments<'a>) -> Eval<Vec<(Value<'a>, Value<'a>)>> {
    let mut pairs = Vec::new();
    match arguments.positional.as_slice() {
        [] => {}
        [Value::Dict(dict)] => pairs.extend(dict.pairs()),
        [values] => {
            for pair in values.iterate()?.iter() {
                let pair = pair.iterate()?;
                match (pair.len(), pair.get(0), pair.get(1)) {
                    (2, Some(key), Some(value)) => pairs.push((key, value)),
                    _ => return impossible("a dict is made of pairs"),
                }
            }
        }
        _ => return impossible("a dict is made of at most one value"),
    }
    pairs.extend(arguments.named.into_iter().map(|(name, value)| (Value::text(name), value)));
    Ok(pairs)
}

/// Sets an attribute of a namespace, which holds plain values only: so it can't hold itself.
fn set_attribute<'a>(attributes: &mut Vec<(Text<'a>, Value<'a>)>, name: Text<'a>, value: Value<'a>) -> Eval<()> {
    if matches!(value, Value::Namespace(_) | Value::Loop(_) | Value::Method) {
        return impossible(format!("a {} in a namespace is not supported", value.type_name()));
    }
    if name.as_str().starts_with('_') {
        return impossible(format!("a namespace can't have the attribute '{}'", name.as_str()));
    }
    match attributes.iter_mut().find(|(known, _)| known.as_str() == name.as_str()) {
        Some((_, old)) => *old = value,
        None => attributes.push((name, value)),
    }
    Ok(())
}
