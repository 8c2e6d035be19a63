//! Expressions: printing and evaluating them.

use super::ast::{Comparison, Expr, Operator};
use super::failure::{Eval, impossible};
use super::interpreter::Interpreter;
use super::methods::{Arguments, Attribute, attribute_of};
use super::operators::{binary, dict_from_pairs, holds, item, negate, slice, undefined_operation};
use super::value::{Items, Text, Value};

impl<'a> Interpreter<'a> {
    /// Prints an expression. Joined texts are written piece by piece: nothing can look at them in between.
    pub fn print(&mut self, expr: &'a Expr) -> Eval<()> {
        match expr {
            Expr::Text(text) => self.write(&Text::Borrowed(text)),
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
                self.write(&text);
                Ok(None)
            }
            value => Ok(Some(value)),
        }
    }

    /// Prints a value.
    pub fn write_value(&mut self, value: &Value<'a>) -> Eval<()> {
        match value {
            Value::Text(text) | Value::Safe(text) => self.write(text),
            value => self.write(&value.to_text()?),
        }
        Ok(())
    }

    /// The truth of an expression.
    pub fn test(&mut self, expr: &'a Expr) -> Eval<bool> {
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

    fn compare(&mut self, first: &'a Expr, rest: &'a [(Comparison, Expr)]) -> Eval<bool> {
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

    /// The value of an expression.
    pub fn eval(&mut self, expr: &'a Expr) -> Eval<Value<'a>> {
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
                let parts = parts.iter().map(|part| self.eval(part)?.to_text()).collect::<Eval<_>>()?;
                let value = Value::Text(Text::join(parts));
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
    pub fn spend_on(&mut self, value: &Value<'a>) -> Eval<()> {
        match value {
            Value::Text(Text::Shared(text)) => self.spend(text.len() / 1024),
            Value::Text(Text::Made(made)) => self.spend(made.text.len() / 1024),
            Value::Sequence(_, items @ Items::Shared(..)) => self.spend(items.held() / 64),
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

    /// The values of arguments.
    pub fn arguments(&mut self, positional: &'a [Expr], named: &'a [(Box<str>, Expr)]) -> Eval<Arguments<'a>> {
        Ok(Arguments {
            positional: positional.iter().map(|value| self.eval(value)).collect::<Eval<_>>()?,
            named: named.iter().map(|(name, value)| Ok((&**name, self.eval(value)?))).collect::<Eval<_>>()?,
        })
    }
}
