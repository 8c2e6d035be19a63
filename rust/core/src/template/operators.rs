//! Python's operators on values: equality, order, membership, arithmetic, subscripts.

use std::cmp::Ordering;

use super::ast::{Comparison, Operator};
use super::failure::{Eval, impossible};
use super::format::percent;
use super::methods::{Attribute, attribute_of};
use super::origin::Origin;
use super::trace::Question;
use super::value::{Dict, SequenceKind, Text, Value};

/// The longest text that `text * number` may make.
const MAX_REPEATED_BYTES: usize = 1 << 20;

/// `left == right`
pub(super) fn equal<'a>(left: &Value<'a>, right: &Value<'a>) -> bool {
    match (left, right) {
        (Value::Undefined(_), Value::Undefined(_)) | (Value::None, Value::None) => true,
        (Value::Text(left) | Value::Safe(left), Value::Text(right) | Value::Safe(right)) => {
            let ask = |text: &Text<'a>, other: &str| text.ask(|| Question::Equals(other.into()));
            let asked = match (left.plain(), right.plain()) {
                (None, Some(right)) => ask(left, right),
                (Some(left), None) => ask(right, left),
                _ => None,
            };
            asked.unwrap_or_else(|| left.as_str() == right.as_str())
        }
        (Value::Sequence(kind, left), Value::Sequence(other, right)) => {
            kind == other
                && *kind != SequenceKind::View
                && left.len() == right.len()
                && left.iter().zip(right.iter()).all(|(left, right)| equal(&left, &right))
        }
        (Value::Dict(left), Value::Dict(right)) => {
            left.len() == right.len()
                && left.pairs().all(|(key, value)| dict_get(right, &key).is_some_and(|other| equal(&value, &other)))
        }
        (Value::Macro(left), Value::Macro(right)) => left == right,
        (Value::Function(left), Value::Function(right)) => left == right,
        _ => numbers(left, right).is_some_and(|order| order == Some(Ordering::Equal)),
    }
}

/// The order of two numbers: `None` if one is no number, `Some(None)` if one is not a number in the sense of IEEE 754.
fn numbers(left: &Value<'_>, right: &Value<'_>) -> Option<Option<Ordering>> {
    match (left, right) {
        (Value::Float(left), Value::Float(right)) => Some(left.partial_cmp(right)),
        (Value::Float(left), right) => Some(int_and_float(right.as_int()?, *left).map(Ordering::reverse)),
        (left, Value::Float(right)) => Some(int_and_float(left.as_int()?, *right)),
        (left, right) => Some(Some(left.as_int()?.cmp(&right.as_int()?))),
    }
}

/// The exact order of an integer and a float, as Python compares them.
fn int_and_float(int: i128, float: f64) -> Option<Ordering> {
    if float.is_nan() {
        return None;
    }
    if float.abs() >= 2f64.powi(127) {
        return 0.0.partial_cmp(&float);
    }
    let whole = float.trunc();
    Some(int.cmp(&(whole as i128)).then_with(|| whole.partial_cmp(&float).unwrap_or(Ordering::Equal)))
}

/// The order of two values, where Python has one.
pub(super) fn compare<'a>(left: &Value<'a>, right: &Value<'a>) -> Eval<Option<Ordering>> {
    if let (Some(left), Some(right)) = (left.as_str(), right.as_str()) {
        return Ok(Some(left.cmp(right)));
    }
    if let Some(order) = numbers(left, right) {
        return Ok(order);
    }
    match (left, right) {
        (Value::Sequence(kind @ (SequenceKind::List | SequenceKind::Tuple), left), Value::Sequence(other, right))
            if kind == other =>
        {
            for (left, right) in left.iter().zip(right.iter()) {
                if !equal(&left, &right) {
                    return compare(&left, &right);
                }
            }
            Ok(Some(left.len().cmp(&right.len())))
        }
        _ => impossible(format!("can't order a {} and a {}", left.type_name(), right.type_name())),
    }
}

/// `left <comparison> right`
pub(super) fn holds<'a>(comparison: Comparison, left: &Value<'a>, right: &Value<'a>) -> Eval<bool> {
    Ok(match comparison {
        Comparison::Equal => equal(left, right),
        Comparison::NotEqual => !equal(left, right),
        Comparison::In => contains(right, left)?,
        Comparison::NotIn => !contains(right, left)?,
        Comparison::Less => compare(left, right)? == Some(Ordering::Less),
        Comparison::Greater => compare(left, right)? == Some(Ordering::Greater),
        Comparison::LessOrEqual => matches!(compare(left, right)?, Some(Ordering::Less | Ordering::Equal)),
        Comparison::GreaterOrEqual => matches!(compare(left, right)?, Some(Ordering::Greater | Ordering::Equal)),
    })
}

/// `item in container`
fn contains<'a>(container: &Value<'a>, item: &Value<'a>) -> Eval<bool> {
    match container {
        Value::Text(text) | Value::Safe(text) => match item.as_str() {
            Some(item) => Ok(text_contains(text, item)),
            None => impossible(format!("can't look for a {} in a str", item.type_name())),
        },
        Value::Dict(dict) => {
            hashable(item)?;
            Ok(dict_get(dict, item).is_some())
        }
        _ => Ok(container.iterate()?.iter().any(|found| equal(&found, item))),
    }
}

/// `part in text`
pub(super) fn text_contains(text: &Text<'_>, part: &str) -> bool {
    let contains = || memchr::memmem::find(text.as_str().as_bytes(), part.as_bytes()).is_some();
    text.ask(|| Question::Contains(part.into())).unwrap_or_else(contains)
}

/// Refuses what can't be a key of a dict.
pub(super) fn hashable(key: &Value<'_>) -> Eval<()> {
    match key {
        Value::Sequence(SequenceKind::Tuple, items) => items.iter().try_for_each(|item| hashable(&item)),
        Value::Sequence(SequenceKind::List | SequenceKind::View, _) | Value::Dict(_) => {
            impossible(format!("a {} can't be a key", key.type_name()))
        }
        _ => Ok(()),
    }
}

/// `dict.get(key)`
pub(super) fn dict_get<'a>(dict: &Dict<'a>, key: &Value<'a>) -> Option<Value<'a>> {
    match (key.as_str(), dict) {
        (Some(key), _) => dict.get(key),
        (None, Dict::Json(_)) => None,
        (None, Dict::Shared(_)) => dict.pairs().find(|(found, _)| equal(found, key)).map(|(_, value)| value),
    }
}

/// A dict of pairs in order; a later value replaces an earlier one in its place.
pub(super) fn dict_from_pairs<'a>(pairs: impl IntoIterator<Item = (Value<'a>, Value<'a>)>) -> Eval<Value<'a>> {
    let mut unique: Vec<(Value<'a>, Value<'a>)> = Vec::new();
    for (key, value) in pairs {
        hashable(&key)?;
        match unique.iter_mut().find(|(found, _)| equal(found, &key)) {
            Some((_, earlier)) => *earlier = value,
            None => unique.push((key, value)),
        }
    }
    Value::dict(unique)
}

/// `left <operator> right`
pub(super) fn binary<'a>(operator: Operator, left: &Value<'a>, right: &Value<'a>) -> Eval<Value<'a>> {
    let unsupported = || {
        let (left, right) = (left.type_name(), right.type_name());
        impossible(format!("can't compute {left} {} {right}", sign(operator)))
    };
    if let (Some(left), Some(right)) = (left.as_int(), right.as_int()) {
        return integers(operator, left, right);
    }
    match (operator, left, right) {
        (Operator::Add, Value::Text(left), Value::Text(right)) => {
            Ok(Value::Text(Text::join(vec![left.clone(), right.clone()])))
        }
        (
            Operator::Add,
            Value::Sequence(kind @ (SequenceKind::List | SequenceKind::Tuple), left),
            Value::Sequence(other, right),
        ) if kind == other => Value::sequence(*kind, left.iter().chain(right.iter()).collect()),
        (Operator::Modulo, Value::Text(text), arguments) => percent(text, arguments),
        (Operator::Multiply, Value::Text(text), times) | (Operator::Multiply, times, Value::Text(text)) => {
            let Some(times) = times.as_int() else { return unsupported() };
            let times = usize::try_from(times.max(0)).unwrap_or(usize::MAX);
            match text.as_str().len().checked_mul(times) {
                Some(length) if length <= MAX_REPEATED_BYTES => Ok(Value::Text(Text::join(vec![text.clone(); times]))),
                _ => impossible(format!("a text repeated to more than {MAX_REPEATED_BYTES} bytes")),
            }
        }
        _ => match (as_float(left), as_float(right)) {
            (Some(left), Some(right)) => floats(operator, left, right),
            _ => unsupported(),
        },
    }
}

fn sign(operator: Operator) -> &'static str {
    match operator {
        Operator::Add => "+",
        Operator::Subtract => "-",
        Operator::Multiply => "*",
        Operator::Divide => "/",
        Operator::FloorDivide => "//",
        Operator::Modulo => "%",
        Operator::Power => "**",
    }
}

/// The number as a float, where it is one exactly.
fn as_float(value: &Value<'_>) -> Option<f64> {
    match value {
        Value::Float(number) => Some(*number),
        value => value.as_int().filter(|number| number.unsigned_abs() <= 1 << 53).map(|number| number as f64),
    }
}

fn integers<'a>(operator: Operator, left: i128, right: i128) -> Eval<Value<'a>> {
    let result = match operator {
        Operator::Add => left.checked_add(right),
        Operator::Subtract => left.checked_sub(right),
        Operator::Multiply => left.checked_mul(right),
        Operator::Divide | Operator::FloorDivide | Operator::Modulo if right == 0 => {
            return impossible("division by zero");
        }
        Operator::Divide => {
            return match (as_float(&Value::Int(left)), as_float(&Value::Int(right))) {
                (Some(left), Some(right)) => Ok(Value::Float(left / right)),
                _ => impossible("division of integers beyond 53 bits is not supported"),
            };
        }
        Operator::FloorDivide => left.checked_div_euclid(right).map(|quotient| {
            // Euclid rounds so that the remainder is positive; Python so that it has the sign of the divisor.
            if right < 0 && left.rem_euclid(right) != 0 { quotient - 1 } else { quotient }
        }),
        Operator::Modulo => {
            left.checked_rem(right).map(|rest| if rest != 0 && (rest < 0) != (right < 0) { rest + right } else { rest })
        }
        Operator::Power => match u32::try_from(right) {
            Ok(exponent) => left.checked_pow(exponent),
            Err(_) => return impossible(format!("the power {left} ** {right} is not supported")),
        },
    };
    match result {
        Some(number) => Ok(Value::Int(number)),
        None => impossible("an integer beyond 128 bits is not supported"),
    }
}

fn floats<'a>(operator: Operator, left: f64, right: f64) -> Eval<Value<'a>> {
    Ok(Value::Float(match operator {
        Operator::Add => left + right,
        Operator::Subtract => left - right,
        Operator::Multiply => left * right,
        Operator::Divide if right != 0.0 => left / right,
        // Python's rules for the last bits of these are not worth having in a chat template.
        _ => return impossible(format!("can't compute float {} float", sign(operator))),
    }))
}

/// `-value`
pub(super) fn negate<'a>(value: &Value<'a>) -> Eval<Value<'a>> {
    match value {
        Value::Float(number) => Ok(Value::Float(-number)),
        value => match value.as_int().and_then(i128::checked_neg) {
            Some(number) => Ok(Value::Int(number)),
            None => impossible(format!("can't negate a {}", value.type_name())),
        },
    }
}

/// `value[key]` as Jinja looks it up: the item, else the attribute of that name, else undefined.
pub(super) fn item<'a>(value: &Value<'a>, key: &Value<'a>) -> Eval<Value<'a>> {
    let found = match value {
        Value::Undefined(name) => return undefined_operation(name),
        Value::Dict(dict) => {
            // An unhashable key is a TypeError in Python, which Jinja turns into undefined.
            dict_get(dict, key)
        }
        Value::Sequence(SequenceKind::View, _) => None,
        Value::Sequence(_, items) => {
            let place = |index: i128| usize::try_from(index).ok().or_else(|| at(index, items.len()));
            key.as_int().and_then(place).and_then(|index| items.get(index))
        }
        Value::Text(text) => key.as_int().and_then(|index| character(text, index)),
        Value::Safe(_) => return impossible("a character of a text marked 'safe' is not supported"),
        _ => None,
    };
    if let Some(found) = found {
        return Ok(found);
    }
    let name = match key {
        Value::Text(Text::Borrowed(name) | Text::Record(name)) => name,
        _ => "item",
    };
    let attribute = match key.as_str() {
        Some(key) => attribute_of(value, Attribute::named(key), key)?,
        None => None,
    };
    Ok(attribute.unwrap_or(Value::Undefined(name)))
}

/// What Python says to an operation on something undefined.
pub(super) fn undefined_operation<T>(name: &str) -> Eval<T> {
    impossible(format!("'{name}' is undefined"))
}

/// The place of Python's `index` in a sequence of `length`.
fn at(index: i128, length: usize) -> Option<usize> {
    let length = length as i128;
    let index = if index < 0 { index + length } else { index };
    (0..length).contains(&index).then_some(index as usize)
}

fn character<'a>(text: &Text<'a>, index: i128) -> Option<Value<'a>> {
    let string = text.as_str();
    let (start, letter) = if index >= 0 {
        string.char_indices().nth(usize::try_from(index).ok()?)?
    } else {
        string.char_indices().nth_back(usize::try_from(-(index + 1)).ok()?)?
    };
    Some(Value::Text(text.cut(|text| &text[start..start + letter.len_utf8()])))
}

/// `value[start:stop:step]`
pub(super) fn slice<'a>(value: &Value<'a>, bounds: [Option<Value<'a>>; 3]) -> Eval<Value<'a>> {
    let mut numbers = [None; 3];
    for (number, bound) in numbers.iter_mut().zip(&bounds) {
        *number = match bound {
            None | Some(Value::None) => None,
            Some(bound) => match bound.as_int() {
                Some(bound) => Some(bound),
                None => return impossible(format!("a slice can't begin or end at a {}", bound.type_name())),
            },
        };
    }
    let [start, stop, step] = numbers;
    let step = step.unwrap_or(1);
    if step == 0 {
        return impossible("a slice can't have the step 0");
    }
    match value {
        Value::Text(text) => {
            let string = text.as_str();
            let (first, last) = resolve(start, stop, step, string.chars().count());
            if step == 1 {
                let offset = |index: i128| string.char_indices().nth(index as usize).map_or(string.len(), |(at, _)| at);
                let (from, to) = (offset(first), offset(last.max(first)));
                return Ok(Value::Text(text.cut(|text| &text[from..to])));
            }
            let letters: Vec<char> = string.chars().collect();
            let chosen = indices(first, last, step).map(|index| letters[index]).collect();
            Ok(Value::Text(Origin::of_text(text).mark(chosen)))
        }
        Value::Sequence(kind, items) if *kind != SequenceKind::View => {
            // A part that is counted from the beginning needs the length only as far as it reaches.
            let is_forward = step == 1 && [start, stop].into_iter().flatten().all(|bound| bound >= 0);
            let reach = if is_forward { start.max(stop).unwrap_or(0) } else { i128::MAX };
            let length = items.len_beyond(usize::try_from(reach).unwrap_or(usize::MAX));
            let (first, last) = resolve(start, stop, step, length);
            if step == 1 {
                return Ok(Value::Sequence(*kind, items.window(first as usize..last.max(first) as usize)));
            }
            Value::sequence(*kind, indices(first, last, step).filter_map(|index| items.get(index)).collect())
        }
        Value::Undefined(name) => undefined_operation(name),
        Value::Safe(_) => impossible("a part of a text marked 'safe' is not supported"),
        // Jinja slices without asking whether that is possible.
        _ => impossible(format!("a {} can't be sliced", value.type_name())),
    }
}

/// Where a slice begins and what it does not reach, as `slice.indices` of Python.
fn resolve(start: Option<i128>, stop: Option<i128>, step: i128, length: usize) -> (i128, i128) {
    let length = length as i128;
    let (lower, upper) = if step > 0 { (0, length) } else { (-1, length - 1) };
    let clamp = |bound: i128| (if bound < 0 { bound + length } else { bound }).clamp(lower, upper);
    let (first, last) = if step > 0 { (lower, upper) } else { (upper, lower) };
    (start.map_or(first, clamp), stop.map_or(last, clamp))
}

fn indices(first: i128, last: i128, step: i128) -> impl Iterator<Item = usize> {
    std::iter::successors(Some(first), move |index| index.checked_add(step))
        .take_while(move |index| if step > 0 { *index < last } else { *index > last })
        .map(|index| index as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    // Integer arithmetic rounds and takes signs as Python does.
    #[test]
    fn integers_are_pythons() {
        let cases = [(7, 2, 3, 1), (-7, 2, -4, 1), (7, -2, -4, -1), (-7, -2, 3, -1), (6, -3, -2, 0), (-6, -3, 2, 0)];
        for (left, right, quotient, rest) in cases {
            let compute = |operator| integers(operator, left, right).unwrap().as_int().unwrap();
            assert_eq!((quotient, rest), (compute(Operator::FloorDivide), compute(Operator::Modulo)), "{left} {right}");
        }
        assert!(integers(Operator::Modulo, 1, 0).is_err());
        assert!(integers(Operator::Multiply, i128::MAX, 2).is_err());
    }

    // Numbers compare by value across types, exactly; True is 1.
    #[test]
    fn numbers_compare_exactly() {
        assert!(equal(&Value::Bool(true), &Value::Float(1.0)));
        assert!(!equal(&Value::Int((1 << 53) + 1), &Value::Float(9_007_199_254_740_992.0)));
        assert_eq!(Some(Ordering::Less), compare(&Value::Int(1), &Value::Float(1.5)).unwrap());
        assert_eq!(Some(Ordering::Greater), compare(&Value::Float(1e300), &Value::Int(i128::MAX)).unwrap());
        assert!(compare(&Value::Int(1), &Value::text("1")).is_err());
    }

    // A slice takes what Python's takes, of any sign, in characters.
    #[test]
    fn slices_are_pythons() {
        let part = |start: Option<i128>, stop: Option<i128>, step: Option<i128>| {
            let bounds = [start, stop, step].map(|bound| bound.map(Value::Int));
            slice(&Value::text("aéc😀e"), bounds).unwrap().as_str().unwrap().to_owned()
        };
        assert_eq!("éc😀", part(Some(1), Some(-1), None));
        assert_eq!("e😀céa", part(None, None, Some(-1)));
        assert_eq!("ec", part(None, Some(0), Some(-2)));
        assert_eq!("", part(Some(3), Some(1), None));
        assert_eq!("aéc😀e", part(Some(-99), Some(99), None));
        assert_eq!("éd".len(), part(Some(1), Some(2), None).len() + 1);
    }
}
