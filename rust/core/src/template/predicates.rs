//! Jinja's tests: `value is predicate`.

use super::ast::Comparison;
use super::failure::{Eval, impossible};
use super::operators::{binary, equal, holds};
use super::value::{SequenceKind, Text, Value};

/// A test that we know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Predicate {
    Boolean,
    Callable,
    Compares(Comparison),
    Defined,
    DivisibleBy,
    Escaped,
    Even,
    False,
    Float,
    Integer,
    Iterable,
    Lower,
    Mapping,
    None,
    Number,
    Odd,
    SameAs,
    Sequence,
    String,
    True,
    Undefined,
    Upper,
}

impl Predicate {
    pub fn named(name: &str) -> Option<Self> {
        Some(match name {
            "boolean" => Self::Boolean,
            "callable" => Self::Callable,
            "==" | "eq" | "equalto" => Self::Compares(Comparison::Equal),
            "!=" | "ne" => Self::Compares(Comparison::NotEqual),
            ">" | "gt" | "greaterthan" => Self::Compares(Comparison::Greater),
            ">=" | "ge" => Self::Compares(Comparison::GreaterOrEqual),
            "<" | "lt" | "lessthan" => Self::Compares(Comparison::Less),
            "<=" | "le" => Self::Compares(Comparison::LessOrEqual),
            "in" => Self::Compares(Comparison::In),
            "defined" => Self::Defined,
            "divisibleby" => Self::DivisibleBy,
            "escaped" => Self::Escaped,
            "even" => Self::Even,
            "false" => Self::False,
            "float" => Self::Float,
            "integer" => Self::Integer,
            "iterable" => Self::Iterable,
            "lower" => Self::Lower,
            "mapping" => Self::Mapping,
            "none" => Self::None,
            "number" => Self::Number,
            "odd" => Self::Odd,
            "sameas" => Self::SameAs,
            "sequence" => Self::Sequence,
            "string" => Self::String,
            "true" => Self::True,
            "undefined" => Self::Undefined,
            "upper" => Self::Upper,
            _ => return None,
        })
    }

    /// `value is predicate(arguments)`
    pub fn holds<'a>(self, value: &Value<'a>, arguments: &[Value<'a>]) -> Eval<bool> {
        let num_arguments = usize::from(matches!(self, Self::Compares(_) | Self::DivisibleBy | Self::SameAs));
        if arguments.len() != num_arguments {
            return impossible(format!("the test takes {num_arguments} arguments, found {}", arguments.len()));
        }
        Ok(match self {
            Self::Defined => !value.is_undefined(),
            Self::Undefined => value.is_undefined(),
            Self::None => matches!(value, Value::None),
            Self::Boolean => matches!(value, Value::Bool(_)),
            Self::True => matches!(value, Value::Bool(true)),
            Self::False => matches!(value, Value::Bool(false)),
            Self::Integer => matches!(value, Value::Int(_)),
            Self::Float => matches!(value, Value::Float(_)),
            Self::Number => matches!(value, Value::Bool(_) | Value::Int(_) | Value::Float(_)),
            Self::String => value.is_text(),
            Self::Escaped => matches!(value, Value::Safe(_)),
            Self::Mapping => matches!(value, Value::Dict(_)),
            // Python asks for a length and for items; something undefined has both.
            Self::Sequence => match value {
                Value::Sequence(kind, _) => *kind != SequenceKind::View,
                Value::Undefined(_) | Value::Text(_) | Value::Safe(_) | Value::Dict(_) => true,
                _ => false,
            },
            Self::Iterable => matches!(
                value,
                Value::Undefined(_)
                    | Value::Text(_)
                    | Value::Safe(_)
                    | Value::Sequence(..)
                    | Value::Dict(_)
                    | Value::Generator(_)
                    | Value::Loop(_)
            ),
            Self::Callable => matches!(
                value,
                Value::Undefined(_) | Value::Macro(_) | Value::Function(_) | Value::Method | Value::Loop(_)
            ),
            Self::Odd => remainder(value, &Value::Int(2))? == 1,
            Self::Even => remainder(value, &Value::Int(2))? == 0,
            Self::DivisibleBy => remainder(value, &arguments[0])? == 0,
            Self::Compares(Comparison::Equal) => equal(value, &arguments[0]),
            Self::Compares(comparison) => holds(comparison, value, &arguments[0])?,
            Self::SameAs => match (value, &arguments[0]) {
                (Value::None, other) => matches!(other, Value::None),
                (Value::Bool(flag), other) => matches!(other, Value::Bool(other) if flag == other),
                (_, Value::None | Value::Bool(_)) => false,
                _ => return impossible("'is sameas' of anything but none, true and false is not supported"),
            },
            Self::Lower => is_all(&value.to_text()?, char::is_lowercase, char::is_uppercase),
            Self::Upper => is_all(&value.to_text()?, char::is_uppercase, char::is_lowercase),
        })
    }
}

/// Is there a letter of the wanted case and none of the other?
fn is_all(text: &Text<'_>, wanted: fn(char) -> bool, other: fn(char) -> bool) -> bool {
    text.as_str().chars().any(wanted) && !text.as_str().chars().any(other)
}

fn remainder(value: &Value<'_>, divisor: &Value<'_>) -> Eval<i128> {
    match (value.as_int(), divisor.as_int()) {
        (Some(value), Some(divisor)) => {
            let rest = binary(super::ast::Operator::Modulo, &Value::Int(value), &Value::Int(divisor))?;
            Ok(rest.as_int().unwrap_or_default())
        }
        _ => impossible(format!("a {} has no remainder", value.type_name())),
    }
}
