//! Jinja's filters, as `transformers` has them.

use std::cmp::Ordering;

use super::ast::Expr;
use super::failure::{Eval, impossible};
use super::format::{JsonStyle, percent};
use super::methods::{Arguments, Attribute, replace, strip};
use super::operators::{binary, compare, equal, item};
use super::origin::Origin;
use super::predicates::Predicate;
use super::python::{capitalize, is_space, split_lines};
use super::value::{Text, Value};

/// A filter that we know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Filter {
    Abs,
    Attr,
    Capitalize,
    Default,
    DictSort,
    First,
    Float,
    Format,
    Indent,
    Int,
    Items,
    Join,
    Last,
    Length,
    List,
    Lower,
    Map,
    Max,
    Min,
    Reject,
    RejectAttr,
    Replace,
    Reverse,
    Round,
    Safe,
    Select,
    SelectAttr,
    Sort,
    String,
    Sum,
    Title,
    ToJson,
    Trim,
    Unique,
    Upper,
}

const NAMES: [(&str, Filter); 37] = [
    ("abs", Filter::Abs),
    ("attr", Filter::Attr),
    ("capitalize", Filter::Capitalize),
    ("count", Filter::Length),
    ("d", Filter::Default),
    ("default", Filter::Default),
    ("dictsort", Filter::DictSort),
    ("first", Filter::First),
    ("float", Filter::Float),
    ("format", Filter::Format),
    ("indent", Filter::Indent),
    ("int", Filter::Int),
    ("items", Filter::Items),
    ("join", Filter::Join),
    ("last", Filter::Last),
    ("length", Filter::Length),
    ("list", Filter::List),
    ("lower", Filter::Lower),
    ("map", Filter::Map),
    ("max", Filter::Max),
    ("min", Filter::Min),
    ("reject", Filter::Reject),
    ("rejectattr", Filter::RejectAttr),
    ("replace", Filter::Replace),
    ("reverse", Filter::Reverse),
    ("round", Filter::Round),
    ("safe", Filter::Safe),
    ("select", Filter::Select),
    ("selectattr", Filter::SelectAttr),
    ("sort", Filter::Sort),
    ("string", Filter::String),
    ("sum", Filter::Sum),
    ("title", Filter::Title),
    ("tojson", Filter::ToJson),
    ("trim", Filter::Trim),
    ("unique", Filter::Unique),
    ("upper", Filter::Upper),
];

impl Filter {
    pub fn named(name: &str) -> Option<Self> {
        NAMES.iter().find(|(known, _)| *known == name).map(|(_, filter)| *filter)
    }

    /// Refuses names of filters and tests in `arguments` that are written out and that nobody knows.
    pub fn check_names(self, arguments: &[Expr]) -> Result<(), String> {
        let name_at = |index: usize| match arguments.get(index) {
            Some(Expr::Text(name)) => Some(name),
            _ => None,
        };
        let (kind, name) = match self {
            Self::Map => ("filter", name_at(0).filter(|name| Self::named(name).is_none())),
            Self::Select | Self::Reject => ("test", name_at(0).filter(|name| Predicate::named(name).is_none())),
            Self::SelectAttr | Self::RejectAttr => ("test", name_at(1).filter(|name| Predicate::named(name).is_none())),
            _ => return Ok(()),
        };
        match name {
            Some(name) => Err(format!("unknown or unsupported {kind} '{name}'")),
            None => Ok(()),
        }
    }

    /// `value | filter(arguments)`
    pub fn apply<'a>(self, value: Value<'a>, arguments: Arguments<'a>) -> Eval<Value<'a>> {
        match self {
            Self::Default => {
                let [default, boolean] = arguments.bind(["default_value", "boolean"], 0)?;
                let replaces = value.is_undefined() || (boolean.is_some_and(|flag| flag.is_true()) && !value.is_true());
                Ok(if replaces { default.unwrap_or(Value::text("")) } else { value })
            }
            Self::ToJson => to_json(&value, arguments),
            Self::Map => map(&value, arguments),
            Self::Select => choose(&value, arguments, false, true),
            Self::Reject => choose(&value, arguments, false, false),
            Self::SelectAttr => choose(&value, arguments, true, true),
            Self::RejectAttr => choose(&value, arguments, true, false),
            Self::Format => {
                if !arguments.named.is_empty() {
                    return impossible("the filter 'format' with named values is not supported");
                }
                let values = Value::tuple(arguments.positional)?;
                percent(&soft_text(&value)?, &values)
            }
            Self::Trim | Self::Replace | Self::Indent => text_with_arguments(self, &value, arguments),
            Self::Sort | Self::Unique | Self::Min | Self::Max | Self::Join | Self::Sum => {
                collection_with_arguments(self, &value, arguments)
            }
            Self::DictSort => dict_sort(&value, arguments),
            Self::Int | Self::Float | Self::Round => number(self, &value, arguments),
            Self::Attr => {
                let [name] = arguments.bind(["name"], 1)?;
                match name.as_ref().and_then(Value::as_str) {
                    Some(name) if !name.starts_with('_') => {
                        let found = super::methods::attribute_of(&value, Attribute::named(name), name)?;
                        Ok(found.unwrap_or(Value::Undefined("attr")))
                    }
                    _ => impossible("the filter 'attr' takes the name of an attribute"),
                }
            }
            _ => {
                let [] = arguments.bind([], 0)?;
                plain(self, value)
            }
        }
    }
}

/// Jinja's `soft_str`: a text as it is, anything else printed.
fn soft_text<'a>(value: &Value<'a>) -> Eval<Text<'a>> {
    match value {
        Value::Safe(_) => impossible("changing a text marked 'safe' is not supported"),
        _ => value.to_text(),
    }
}

/// A text made of `value`.
fn marked<'a>(value: &Value<'a>, made: String) -> Value<'a> {
    Value::Text(Origin::of(value).mark(made))
}

fn plain<'a>(filter: Filter, value: Value<'a>) -> Eval<Value<'a>> {
    Ok(match filter {
        Filter::String => match value {
            Value::Text(_) | Value::Safe(_) => value,
            _ => Value::Text(value.to_text()?),
        },
        Filter::Safe => Value::Safe(value.to_text()?),
        Filter::Length => Value::Int(value.len()? as i128),
        Filter::Upper => marked(&value, soft_text(&value)?.as_str().to_uppercase()),
        Filter::Lower => marked(&value, soft_text(&value)?.as_str().to_lowercase()),
        Filter::Capitalize => marked(&value, capitalize(soft_text(&value)?.as_str())?),
        Filter::Title => marked(&value, title_words(soft_text(&value)?.as_str())?),
        Filter::List => Value::list(value.iterate()?.iter().collect())?,
        Filter::First => match &value {
            Value::Generator(values) => values.borrow_mut().pop_front(),
            value => value.iterate()?.get(0),
        }
        .unwrap_or(Value::Undefined("first")),
        Filter::Last => match &value {
            Value::Generator(_) => return impossible("a generator has no last item"),
            value => {
                let items = value.iterate()?;
                items.len().checked_sub(1).and_then(|last| items.get(last)).unwrap_or(Value::Undefined("last"))
            }
        },
        Filter::Reverse => match &value {
            Value::Text(text) => marked(&value, text.as_str().chars().rev().collect()),
            Value::Safe(_) => return impossible("changing a text marked 'safe' is not supported"),
            value => {
                let mut values: Vec<_> = value.iterate()?.iter().collect();
                values.reverse();
                Value::generator(values)?
            }
        },
        Filter::Items => match &value {
            Value::Undefined(_) => Value::generator(Vec::new())?,
            Value::Dict(dict) => {
                let pairs = dict.pairs().map(|(key, item)| Value::tuple(vec![key, item])).collect::<Eval<_>>()?;
                Value::generator(pairs)?
            }
            value => return impossible(format!("a {} has no items", value.type_name())),
        },
        Filter::Abs => match &value {
            Value::Float(number) => Value::Float(number.abs()),
            value => match value.as_int().and_then(i128::checked_abs) {
                Some(number) => Value::Int(number),
                None => return impossible(format!("a {} has no absolute value", value.type_name())),
            },
        },
        _ => unreachable!("the filters with arguments are applied elsewhere"),
    })
}

/// Jinja's filter `title`, which is not `str.title`: words begin after white space and opening brackets.
fn title_words(text: &str) -> Eval<String> {
    let mut result = String::with_capacity(text.len());
    let is_break = |letter: char| is_space(letter) || matches!(letter, '-' | '(' | '{' | '[' | '<');
    for piece in text.split_inclusive(is_break) {
        let word = piece.trim_end_matches(is_break);
        let mut letters = word.chars();
        if let Some(first) = letters.next() {
            result.extend(first.to_uppercase());
            result.push_str(&letters.as_str().to_lowercase());
        }
        result.push_str(&piece[word.len()..]);
    }
    Ok(result)
}

fn text_with_arguments<'a>(filter: Filter, value: &Value<'a>, arguments: Arguments<'a>) -> Eval<Value<'a>> {
    match filter {
        Filter::Trim => {
            let [characters] = arguments.bind(["chars"], 0)?;
            Ok(Value::Text(strip(&soft_text(value)?, Attribute::Strip, characters.as_ref())?))
        }
        Filter::Replace => {
            let [old, new, count] = arguments.bind(["old", "new", "count"], 2)?;
            let printed = |value: Option<Value<'a>>| value.unwrap_or(Value::None).to_text();
            let count = match count {
                None | Some(Value::None) => -1,
                Some(count) => match count.as_int() {
                    Some(count) => count,
                    None => return impossible("expected an int as the number of replacements"),
                },
            };
            Ok(Value::Text(replace(&value.to_text()?, printed(old)?.as_str(), &printed(new)?, count)))
        }
        _ => {
            let [width, first, blank] = arguments.bind(["width", "first", "blank"], 0)?;
            let Value::Text(text) = value else {
                return impossible(format!("can't indent a {}", value.type_name()));
            };
            let indent = match &width {
                None => " ".repeat(4),
                Some(Value::Text(indent)) => indent.as_str().to_owned(),
                Some(width) => match width.as_int() {
                    Some(width @ ..=1000) => " ".repeat(width.max(0) as usize),
                    _ => return impossible("expected a width or a text to indent by"),
                },
            };
            let is_set = |flag: Option<Value<'a>>| flag.is_some_and(|flag| flag.is_true());
            let (first, blank) = (is_set(first), is_set(blank));
            let with_end = format!("{}\n", text.as_str());
            let mut result = String::new();
            for (index, line) in split_lines(&with_end, false).into_iter().enumerate() {
                if index > 0 {
                    result.push('\n');
                }
                if if index == 0 { first } else { blank || !line.is_empty() } {
                    result.push_str(&indent);
                }
                result.push_str(line);
            }
            Ok(marked(value, result))
        }
    }
}

fn to_json<'a>(value: &Value<'a>, arguments: Arguments<'a>) -> Eval<Value<'a>> {
    let [ensure_ascii, indent, separators, sort_keys] =
        arguments.bind(["ensure_ascii", "indent", "separators", "sort_keys"], 0)?;
    let is_set = |flag: Option<Value<'a>>| flag.is_some_and(|flag| flag.is_true());
    let indent = match indent {
        None | Some(Value::None) => None,
        Some(Value::Text(indent)) => Some(indent.as_str().to_owned()),
        Some(width) => match width.as_int() {
            Some(width @ ..=1000) => Some(" ".repeat(width.max(0) as usize)),
            _ => return impossible("expected an indentation of at most 1000"),
        },
    };
    let (item_separator, key_separator) = match separators {
        None | Some(Value::None) => ((if indent.is_some() { "," } else { ", " }).to_owned(), ": ".to_owned()),
        Some(separators) => {
            let pair: Vec<_> = separators.iterate()?.iter().collect();
            match pair.as_slice() {
                [Value::Text(item), Value::Text(key)] => (item.as_str().to_owned(), key.as_str().to_owned()),
                _ => return impossible("expected two separators"),
            }
        }
    };
    let style = JsonStyle {
        ensure_ascii: is_set(ensure_ascii),
        indent,
        item_separator,
        key_separator,
        sort_keys: is_set(sort_keys),
    };
    let mut out = String::new();
    style.write(value, &mut out)?;
    Ok(marked(value, out))
}

/// What Jinja's attribute arguments find in an item: `a.0.b`; `None` finds the item itself.
fn path<'a>(value: &Value<'a>, attribute: Option<&Value<'a>>, default: Option<&Value<'a>>) -> Eval<Value<'a>> {
    let mut found = value.clone();
    let step = |found: &Value<'a>, key: Value<'a>| -> Eval<Value<'a>> {
        let next = item(found, &key)?;
        Ok(match default {
            Some(default) if next.is_undefined() && !matches!(default, Value::None) => default.clone(),
            _ => next,
        })
    };
    match attribute {
        None | Some(Value::None) => Ok(found),
        Some(Value::Text(names)) => {
            for name in names.as_str().split('.') {
                let is_index = !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_digit());
                let key = match name.parse() {
                    Ok(index) if is_index => Value::Int(index),
                    _ => Value::owned(name.to_owned()),
                };
                found = step(&found, key)?;
            }
            Ok(found)
        }
        Some(key) => step(&found, key.clone()),
    }
}

fn map<'a>(value: &Value<'a>, mut arguments: Arguments<'a>) -> Eval<Value<'a>> {
    let items = value.iterate()?;
    if arguments.positional.is_empty() {
        let [attribute, default] = arguments.bind(["attribute", "default"], 1)?;
        return Value::generator(
            items.iter().map(|item| path(&item, attribute.as_ref(), default.as_ref())).collect::<Eval<_>>()?,
        );
    }
    let name = arguments.positional.remove(0);
    let Some(filter) = name.as_str().and_then(Filter::named) else {
        return impossible("the filter 'map' was given the name of an unknown filter");
    };
    let apply = |item: Value<'a>| {
        let (positional, named) = (arguments.positional.clone(), arguments.named.clone());
        filter.apply(item, Arguments { positional, named })
    };
    Value::generator(items.iter().map(apply).collect::<Eval<_>>()?)
}

/// `select`, `reject`, `selectattr`, `rejectattr`
fn choose<'a>(value: &Value<'a>, mut arguments: Arguments<'a>, by_attribute: bool, keep: bool) -> Eval<Value<'a>> {
    if let Some((name, _)) = arguments.named.first() {
        return impossible(format!("unknown argument '{name}'"));
    }
    let items = value.iterate()?;
    let attribute = match (by_attribute, arguments.positional.is_empty()) {
        (true, true) => return impossible("the name of the attribute is missing"),
        (true, false) => Some(arguments.positional.remove(0)),
        (false, _) => None,
    };
    let test = match arguments.positional.is_empty() {
        true => None,
        false => match arguments.positional.remove(0).as_str().and_then(Predicate::named) {
            Some(test) => Some(test),
            None => return impossible("the name of an unknown test"),
        },
    };
    let mut kept = Vec::new();
    for item in items.iter() {
        let subject = path(&item, attribute.as_ref(), None)?;
        let holds = match test {
            None => subject.is_true(),
            Some(test) => test.holds(&subject, &arguments.positional)?,
        };
        if holds == keep {
            kept.push(item);
        }
    }
    Value::generator(kept)
}

/// The value that sorting compares: strings in lower case, unless case matters.
fn sort_key<'a>(value: Value<'a>, case_sensitive: bool) -> Value<'a> {
    match value.as_str() {
        Some(text) if !case_sensitive => Value::owned(text.to_lowercase()),
        _ => value,
    }
}

/// Sorts by `key`, stably; the reverse order keeps equal items in place, as Python does.
fn sort_by_key<'a>(mut keyed: Vec<(Value<'a>, Value<'a>)>, reverse: bool) -> Eval<Vec<Value<'a>>> {
    let mut failure = None;
    keyed.sort_by(|(left, _), (right, _)| {
        let order = match compare(left, right) {
            Ok(Some(order)) => order,
            Ok(None) => Ordering::Equal,
            Err(error) => {
                failure.get_or_insert(error);
                Ordering::Equal
            }
        };
        if reverse { order.reverse() } else { order }
    });
    match failure {
        Some(failure) => Err(failure),
        None => Ok(keyed.into_iter().map(|(_, value)| value).collect()),
    }
}

fn collection_with_arguments<'a>(filter: Filter, value: &Value<'a>, arguments: Arguments<'a>) -> Eval<Value<'a>> {
    let items = value.iterate()?;
    let is_set = |flag: &Option<Value<'a>>| flag.as_ref().is_some_and(Value::is_true);
    match filter {
        Filter::Join => {
            let [separator, attribute] = arguments.bind(["d", "attribute"], 0)?;
            let separator = separator.unwrap_or(Value::text("")).to_text()?;
            let mut joined = Vec::new();
            for (index, item) in items.iter().enumerate() {
                if index > 0 {
                    joined.push(separator.clone());
                }
                joined.push(path(&item, attribute.as_ref(), None)?.to_text()?);
            }
            Ok(Value::Text(Text::join(joined)))
        }
        Filter::Sum => {
            let [attribute, start] = arguments.bind(["attribute", "start"], 0)?;
            let mut sum = start.unwrap_or(Value::Int(0));
            if sum.as_str().is_some() {
                return impossible("can't sum texts");
            }
            for item in items.iter() {
                sum = binary(super::ast::Operator::Add, &sum, &path(&item, attribute.as_ref(), None)?)?;
            }
            Ok(sum)
        }
        Filter::Sort => {
            let [reverse, case_sensitive, attribute] = arguments.bind(["reverse", "case_sensitive", "attribute"], 0)?;
            let mut keyed = Vec::with_capacity(items.len());
            for item in items.iter() {
                let key = match attribute.as_ref().and_then(Value::as_str) {
                    Some(names) => names
                        .split(',')
                        .map(|name| {
                            let found = path(&item, Some(&Value::owned(name.to_owned())), None)?;
                            Ok(sort_key(found, is_set(&case_sensitive)))
                        })
                        .collect::<Eval<_>>()?,
                    None => vec![sort_key(path(&item, attribute.as_ref(), None)?, is_set(&case_sensitive))],
                };
                keyed.push((Value::list(key)?, item));
            }
            Value::list(sort_by_key(keyed, is_set(&reverse))?)
        }
        _ => {
            let [case_sensitive, attribute] = arguments.bind(["case_sensitive", "attribute"], 0)?;
            let key = |item: &Value<'a>| Ok(sort_key(path(item, attribute.as_ref(), None)?, is_set(&case_sensitive)));
            if filter == Filter::Unique {
                let (mut seen, mut unique) = (Vec::new(), Vec::new());
                for item in items.iter() {
                    let key = key(&item)?;
                    super::operators::hashable(&key)?;
                    if !seen.iter().any(|earlier| equal(earlier, &key)) {
                        seen.push(key);
                        unique.push(item);
                    }
                }
                return Value::generator(unique);
            }
            let wanted = if filter == Filter::Min { Ordering::Less } else { Ordering::Greater };
            let mut best: Option<(Value<'a>, Value<'a>)> = None;
            for item in items.iter() {
                let key = key(&item)?;
                let is_better = match &best {
                    None => true,
                    Some((best, _)) => compare(&key, best)? == Some(wanted),
                };
                if is_better {
                    best = Some((key, item));
                }
            }
            Ok(best.map_or(Value::Undefined("item"), |(_, item)| item))
        }
    }
}

fn dict_sort<'a>(value: &Value<'a>, arguments: Arguments<'a>) -> Eval<Value<'a>> {
    let [case_sensitive, by, reverse] = arguments.bind(["case_sensitive", "by", "reverse"], 0)?;
    let Value::Dict(dict) = value else {
        return impossible(format!("can't sort the items of a {}", value.type_name()));
    };
    let by_value = match by.as_ref().map(Value::as_str) {
        None | Some(Some("key")) => false,
        Some(Some("value")) => true,
        _ => return impossible("a dict is sorted by 'key' or by 'value'"),
    };
    let case_sensitive = case_sensitive.is_some_and(|flag| flag.is_true());
    let mut keyed = Vec::with_capacity(dict.len());
    for (key, item) in dict.pairs() {
        let subject = if by_value { item.clone() } else { key.clone() };
        keyed.push((sort_key(subject, case_sensitive), Value::tuple(vec![key, item])?));
    }
    Value::list(sort_by_key(keyed, reverse.is_some_and(|flag| flag.is_true()))?)
}

fn number<'a>(filter: Filter, value: &Value<'a>, arguments: Arguments<'a>) -> Eval<Value<'a>> {
    // Python reads numbers from texts in more ways than plain digits; those are refused, not guessed.
    let parsed = |text: &str| -> Eval<Option<f64>> {
        let trimmed = text.trim_matches(is_space);
        let is_plain = trimmed.bytes().all(|byte| byte.is_ascii_digit() || matches!(byte, b'+' | b'-' | b'.'));
        if trimmed.contains(['_', 'e', 'E']) && trimmed.contains(|letter: char| letter.is_ascii_digit())
            || !trimmed.is_ascii()
        {
            return impossible("reading a number that is not plain digits is not supported");
        }
        if matches!(trimmed.to_ascii_lowercase().trim_start_matches(['+', '-']), "nan" | "inf" | "infinity") {
            return impossible("reading a number that is not finite is not supported");
        }
        Ok(if is_plain { trimmed.parse().ok() } else { None })
    };
    match filter {
        Filter::Float => {
            let [default] = arguments.bind(["default"], 0)?;
            let default = default.unwrap_or(Value::Float(0.0));
            match value {
                Value::Float(_) => Ok(value.clone()),
                Value::Text(text) => Ok(parsed(text.as_str())?.map_or(default, Value::Float)),
                Value::Undefined(name) => super::operators::undefined_operation(name),
                value => match value.as_int() {
                    Some(number) if number.unsigned_abs() <= 1 << 53 => Ok(Value::Float(number as f64)),
                    Some(_) => impossible("a float of an integer beyond 53 bits is not supported"),
                    None => Ok(default),
                },
            }
        }
        Filter::Int => {
            let [default] = arguments.bind(["default"], 0)?;
            let default = default.unwrap_or(Value::Int(0));
            let truncated = |number: f64| match number.abs() < 1e30 {
                true => Ok(Value::Int(number.trunc() as i128)),
                false => impossible("an integer of a float that large is not supported"),
            };
            match value {
                Value::Float(number) => truncated(*number),
                Value::Text(text) => match text.as_str().trim_matches(is_space).parse() {
                    Ok(number) => Ok(Value::Int(number)),
                    Err(_) => parsed(text.as_str())?.map_or(Ok(default), truncated),
                },
                Value::Undefined(name) => super::operators::undefined_operation(name),
                value => Ok(value.as_int().map_or(default, Value::Int)),
            }
        }
        _ => {
            let [precision, method] = arguments.bind(["precision", "method"], 0)?;
            if method.is_some_and(|method| method.as_str() != Some("common")) {
                return impossible("rounding up or down is not supported");
            }
            match (value, precision.as_ref().map_or(Some(0), Value::as_int)) {
                (Value::Float(number), Some(precision @ 0..=20)) => {
                    let rounded = format!("{number:.*}", precision as usize);
                    Ok(Value::Float(rounded.parse().expect("a formatted float reads back")))
                }
                (value, Some(0..)) if value.as_int().is_some() => Ok(Value::Int(value.as_int().unwrap_or_default())),
                _ => impossible(format!("can't round a {}", value.type_name())),
            }
        }
    }
}
