//! Calls: methods, macros and the functions that `transformers` gives to templates.

use std::cell::RefCell;
use std::rc::Rc;

use super::ast::{Call, Expr, Function, Macro};
use super::failure::{Cause, Eval, Failure, impossible};
use super::interpreter::Interpreter;
use super::methods::{Arguments, attribute_of, call_method};
use super::operators::{dict_from_pairs, undefined_operation};
use super::value::{SequenceKind, Text, Value};

/// How deep macros may call macros.
const MAX_CALLS: usize = 100;
/// The most that `range` counts to, as in Jinja's sandbox.
const MAX_RANGE: i128 = 100_000;

impl<'a> Interpreter<'a> {
    /// Calls a method, a macro or a function.
    pub fn call(&mut self, call: &'a Call<Expr>) -> Eval<Value<'a>> {
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
            Value::Macro(index) => self.call_macro(index, arguments).map(Value::Text),
            Value::Function(function) => self.call_function(function, arguments),
            Value::Undefined(name) => undefined_operation(name),
            callee => impossible(format!("a {} can't be called here", callee.type_name())),
        }
    }

    fn call_macro(&mut self, index: usize, arguments: Arguments<'a>) -> Eval<Text<'a>> {
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
pub(super) fn set_attribute<'a>(
    attributes: &mut Vec<(Text<'a>, Value<'a>)>,
    name: Text<'a>,
    value: Value<'a>,
) -> Eval<()> {
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
