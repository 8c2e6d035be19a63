//! Attributes: the methods of Python's strings, lists and dicts, and what `loop` and namespaces have.

use std::rc::Rc;

use super::failure::{Eval, impossible};
use super::format::format;
use super::operators::{dict_get, equal, text_contains, undefined_operation};
use super::origin::Origin;
use super::python::{capitalize, is_space, split_lines, title};
use super::trace::{Question, Strip};
use super::value::{Loop, SequenceKind, Text, Value};

/// Everything a call is given.
#[derive(Debug, Default)]
pub(super) struct Arguments<'a> {
    pub positional: Vec<Value<'a>>,
    pub named: Vec<(&'a str, Value<'a>)>,
}

impl<'a> Arguments<'a> {
    /// The arguments under their names, in order; at least `required` of them are there.
    pub fn bind<const N: usize>(self, names: [&str; N], required: usize) -> Eval<[Option<Value<'a>>; N]> {
        let mut bound = [const { None }; N];
        if self.positional.len() > N {
            return impossible(format!("expected at most {N} arguments, found {}", self.positional.len()));
        }
        for (slot, value) in bound.iter_mut().zip(self.positional) {
            *slot = Some(value);
        }
        for (name, value) in self.named {
            match names.iter().position(|known| *known == name) {
                Some(index) if bound[index].is_none() => bound[index] = Some(value),
                Some(_) => return impossible(format!("the argument '{name}' is given twice")),
                None => return impossible(format!("unknown argument '{name}'")),
            }
        }
        match bound[..required].iter().position(Option::is_none) {
            Some(missing) => impossible(format!("the argument '{}' is missing", names[missing])),
            None => Ok(bound),
        }
    }

    /// Positional arguments only, as Python's built-in methods take them.
    fn positional<const N: usize>(self, required: usize) -> Eval<[Option<Value<'a>>; N]> {
        match self.named.first() {
            Some((name, _)) => impossible(format!("the method takes no argument '{name}'")),
            None => self.bind([""; N], required),
        }
    }
}

/// Which types have an attribute, and whether we can call it; see [`Attribute`].
mod owner {
    pub const STR: u8 = 1;
    pub const LIST: u8 = 2;
    pub const TUPLE: u8 = 4;
    pub const DICT: u8 = 8;
    pub const NUMBER: u8 = 16;
    /// Changes a list or a dict: the sandbox hides it.
    pub const HIDDEN: u8 = 32;
    /// We know what a call of it does.
    pub const CALL: u8 = 64;
}

macro_rules! attributes {
    ($($owners:expr => $($variant:ident $name:literal),*;)*) => {
        /// The attribute names that mean something to Python, and all the others.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(super) enum Attribute {
            $($($variant,)*)*
            Other,
        }

        impl Attribute {
            pub fn named(name: &str) -> Self {
                match name {
                    $($($name => Self::$variant,)*)*
                    _ => Self::Other,
                }
            }

            fn name(self) -> &'static str {
                match self {
                    $($(Self::$variant => $name,)*)*
                    Self::Other => "",
                }
            }

            fn owners(self) -> u8 {
                match self {
                    $($(Self::$variant)|* => $owners,)*
                    Self::Other => 0,
                }
            }
        }
    };
}

attributes! {
    owner::STR | owner::CALL =>
        Capitalize "capitalize", EndsWith "endswith", Find "find", Format "format", IsAlpha "isalpha",
        IsDigit "isdigit", IsSpace "isspace", Join "join", LeftStrip "lstrip", Lower "lower", Partition "partition",
        RemovePrefix "removeprefix", RemoveSuffix "removesuffix", Replace "replace", RightFind "rfind",
        RightPartition "rpartition", RightSplit "rsplit", RightStrip "rstrip", Split "split", SplitLines "splitlines",
        StartsWith "startswith", Strip "strip", Title "title", Upper "upper";
    owner::STR | owner::LIST | owner::TUPLE | owner::CALL => Count "count", Index "index";
    owner::LIST | owner::DICT | owner::CALL => Copy "copy";
    owner::DICT | owner::CALL => Get "get", Items "items", Keys "keys", Values "values";
    owner::CALL => Cycle "cycle";
    owner::DICT => FromKeys "fromkeys";
    owner::LIST | owner::DICT | owner::HIDDEN => Clear "clear", Pop "pop";
    owner::DICT | owner::HIDDEN => PopItem "popitem", SetDefault "setdefault", Update "update";
    owner::LIST | owner::HIDDEN =>
        Append "append", Extend "extend", Insert "insert", Remove "remove", Reverse "reverse", Sort "sort";
    owner::STR =>
        CaseFold "casefold", Center "center", Encode "encode", ExpandTabs "expandtabs", FormatMap "format_map",
        IsAlnum "isalnum", IsAscii "isascii", IsDecimal "isdecimal", IsIdentifier "isidentifier", IsLower "islower",
        IsNumeric "isnumeric", IsPrintable "isprintable", IsTitle "istitle", IsUpper "isupper", LeftJust "ljust",
        MakeTrans "maketrans", RightIndex "rindex", RightJust "rjust", SwapCase "swapcase", Translate "translate",
        ZeroFill "zfill";
    owner::NUMBER =>
        Real "real", Imaginary "imag", Numerator "numerator", Denominator "denominator", BitLength "bit_length",
        BitCount "bit_count", Conjugate "conjugate", ToBytes "to_bytes", FromBytes "from_bytes",
        IsInteger "is_integer", AsIntegerRatio "as_integer_ratio", Hex "hex", FromHex "fromhex";
}

use Attribute as A;

impl Attribute {
    /// Is this a method that we can call on some value?
    pub fn is_callable(self) -> bool {
        self.owners() & owner::CALL != 0
    }
}

/// What Python's `getattr` finds; `None` where it finds nothing.
pub(super) fn attribute_of<'a>(value: &Value<'a>, attribute: Attribute, name: &str) -> Eval<Option<Value<'a>>> {
    let owner = match value {
        Value::Undefined(undefined) => return undefined_operation(undefined),
        Value::Namespace(attributes) => {
            let attributes = attributes.borrow();
            return Ok(attributes.iter().find(|(key, _)| key.as_str() == name).map(|(_, value)| value.clone()));
        }
        Value::Loop(state) => return loop_attribute(state, name).map(Some),
        Value::Text(_) | Value::Safe(_) => owner::STR,
        Value::Dict(_) => owner::DICT,
        Value::Sequence(SequenceKind::List, _) => owner::LIST,
        Value::Sequence(SequenceKind::Tuple | SequenceKind::Range, _) => owner::TUPLE,
        Value::Bool(_) | Value::Int(_) | Value::Float(_) => owner::NUMBER,
        Value::None => return Ok(None),
        _ => return impossible(format!("the attribute '{name}' of a {} is not supported", value.type_name())),
    };
    if attribute.owners() & owner == 0 {
        return Ok(None);
    }
    if owner == owner::NUMBER {
        return impossible(format!("the attribute '{name}' of a number is not supported"));
    }
    // The sandbox answers with something undefined, even where a dict has such a key.
    let is_hidden = attribute.owners() & owner::HIDDEN != 0;
    Ok(Some(if is_hidden { Value::Undefined(attribute.name()) } else { Value::Method }))
}

fn loop_attribute<'a>(state: &Loop<'a>, name: &str) -> Eval<Value<'a>> {
    let index = state.index.get();
    let length = || state.items.len();
    Ok(match name {
        "index" => Value::Int(index as i128 + 1),
        "index0" => Value::Int(index as i128),
        "revindex" => Value::Int((length() - index) as i128),
        "revindex0" => Value::Int((length() - index) as i128 - 1),
        "first" => Value::Bool(index == 0),
        "last" => Value::Bool(index + 1 == state.items.len_beyond(index + 2)),
        "length" => Value::Int(length() as i128),
        "previtem" => {
            index.checked_sub(1).and_then(|before| state.items.get(before)).unwrap_or(Value::Undefined("previtem"))
        }
        "nextitem" => state.items.get(index + 1).unwrap_or(Value::Undefined("nextitem")),
        "depth" => Value::Int(1),
        "depth0" => Value::Int(0),
        "cycle" => Value::Method,
        _ => return impossible(format!("'loop.{name}' is not supported")),
    })
}

/// `value.method(arguments)`
pub(super) fn call_method<'a>(value: &Value<'a>, method: Attribute, arguments: Arguments<'a>) -> Eval<Value<'a>> {
    match value {
        Value::Text(text) => string_method(text, method, arguments),
        Value::Dict(dict) => match method {
            A::Get => {
                let [key, default] = arguments.positional(1)?;
                let key = key.unwrap_or(Value::None);
                super::operators::hashable(&key)?;
                Ok(dict_get(dict, &key).or(default).unwrap_or(Value::None))
            }
            A::Copy => arguments.positional::<0>(0).map(|_| value.clone()),
            A::Items | A::Keys | A::Values => {
                arguments.positional::<0>(0)?;
                let part = |(key, item): (Value<'a>, Value<'a>)| match method {
                    A::Items => Value::tuple(vec![key, item]),
                    A::Keys => Ok(key),
                    _ => Ok(item),
                };
                Value::sequence(SequenceKind::View, dict.pairs().map(part).collect::<Eval<_>>()?)
            }
            _ => unsupported(value, method),
        },
        Value::Sequence(_, items) => match method {
            A::Copy => arguments.positional::<0>(0).map(|_| value.clone()),
            A::Count | A::Index => {
                let [wanted] = arguments.positional(1)?;
                let wanted = wanted.unwrap_or(Value::None);
                let mut found = items.iter().enumerate().filter(|(_, item)| equal(item, &wanted));
                if method == A::Count {
                    return Ok(Value::Int(found.count() as i128));
                }
                match found.next() {
                    Some((index, _)) => Ok(Value::Int(index as i128)),
                    None => impossible("the value is not in the list"),
                }
            }
            _ => unsupported(value, method),
        },
        Value::Loop(state) if !arguments.positional.is_empty() && arguments.named.is_empty() => {
            let values = arguments.positional;
            Ok(values[state.index.get() % values.len()].clone())
        }
        _ => unsupported(value, method),
    }
}

fn unsupported<T>(value: &Value<'_>, method: Attribute) -> Eval<T> {
    impossible(format!("the method '{}' of a {} is not supported", method.name(), value.type_name()))
}

fn string_method<'a>(text: &Text<'a>, method: Attribute, arguments: Arguments<'a>) -> Eval<Value<'a>> {
    match method {
        A::Strip | A::LeftStrip | A::RightStrip => {
            let [characters] = arguments.positional(0)?;
            strip(text, method, characters.as_ref()).map(Value::Text)
        }
        A::Split | A::RightSplit => {
            let [separator, limit] = arguments.bind(["sep", "maxsplit"], 0)?;
            split(text, method == A::RightSplit, separator, limit)
        }
        A::StartsWith | A::EndsWith => {
            let [affix] = arguments.positional(1)?;
            let is_start = method == A::StartsWith;
            let matches = |affix: &Value<'a>| match affix {
                Value::Text(affix) => Ok(has_affix(text, affix.as_str(), is_start)),
                affix => impossible(format!("expected a str or a tuple of them, found a {}", affix.type_name())),
            };
            match affix.unwrap_or(Value::None) {
                Value::Sequence(SequenceKind::Tuple, items) => {
                    for item in items.iter() {
                        if matches(&item)? {
                            return Ok(Value::Bool(true));
                        }
                    }
                    Ok(Value::Bool(false))
                }
                affix => Ok(Value::Bool(matches(&affix)?)),
            }
        }
        A::Replace => {
            let [old, new, count] = arguments.positional(2)?;
            let count = match count {
                None => -1,
                Some(count) => match count.as_int() {
                    Some(count) => count,
                    None => return impossible("expected an int as the number of replacements"),
                },
            };
            Ok(Value::Text(replace(text, string_argument(old)?.as_str(), &string_argument(new)?, count)))
        }
        _ => look_at(text, method, arguments),
    }
}

/// Does the text start, or end, with `affix`?
fn has_affix(text: &Text<'_>, affix: &str, is_start: bool) -> bool {
    let question = || if is_start { Question::StartsWith(affix.into()) } else { Question::EndsWith(affix.into()) };
    text.ask(question).unwrap_or_else(|| {
        let text = text.as_str();
        if is_start { text.starts_with(affix) } else { text.ends_with(affix) }
    })
}

/// The methods whose result depends on the text in ways that no trace can follow.
fn look_at<'a>(text: &Text<'a>, method: Attribute, arguments: Arguments<'a>) -> Eval<Value<'a>> {
    let string = text.as_str();
    match method {
        A::SplitLines => {
            let [keep_ends] = arguments.bind(["keepends"], 0)?;
            let lines = split_lines(string, keep_ends.is_some_and(|keep| keep.is_true()));
            Value::list(lines.into_iter().map(|line| Value::Text(part(text, line))).collect())
        }
        A::RemovePrefix | A::RemoveSuffix => {
            let [affix] = arguments.positional(1)?;
            let affix = string_argument(affix)?;
            let affix = affix.as_str();
            Ok(Value::Text(if method == A::RemovePrefix {
                text.cut(|text| text.strip_prefix(affix).unwrap_or(text))
            } else {
                text.cut(|text| text.strip_suffix(affix).unwrap_or(text))
            }))
        }
        A::Find | A::RightFind | A::Index | A::Count => {
            let [wanted] = arguments.positional(1)?;
            let wanted = string_argument(wanted)?;
            let wanted = wanted.as_str();
            if method == A::Count {
                return Ok(Value::Int(string.matches(wanted).count() as i128));
            }
            let offset = if method == A::RightFind { string.rfind(wanted) } else { string.find(wanted) };
            match offset {
                Some(offset) => Ok(Value::Int(string[..offset].chars().count() as i128)),
                None if method == A::Index => impossible("the text was not found"),
                None => Ok(Value::Int(-1)),
            }
        }
        A::Partition | A::RightPartition => {
            let [separator] = arguments.positional(1)?;
            let separator = string_argument(separator)?;
            if separator.as_str().is_empty() {
                return impossible("an empty separator");
            }
            let is_right = method == A::RightPartition;
            let found =
                if is_right { string.rsplit_once(separator.as_str()) } else { string.split_once(separator.as_str()) };
            let empty = || Value::text("");
            Value::tuple(match found {
                Some((before, after)) => {
                    vec![Value::Text(part(text, before)), Value::Text(separator), Value::Text(part(text, after))]
                }
                None if is_right => vec![empty(), empty(), Value::Text(text.clone())],
                None => vec![Value::Text(text.clone()), empty(), empty()],
            })
        }
        A::Join => {
            let [parts] = arguments.positional(1)?;
            let mut joined = Vec::new();
            for (index, part) in parts.unwrap_or(Value::None).iterate()?.iter().enumerate() {
                if index > 0 {
                    joined.push(text.clone());
                }
                match part {
                    Value::Text(part) => joined.push(part),
                    part => return impossible(format!("can't join a {}", part.type_name())),
                }
            }
            Ok(Value::Text(Text::join(joined)))
        }
        A::Format => format(text, &arguments.positional, &arguments.named),
        _ => {
            arguments.positional::<0>(0)?;
            let marked = |made: String| Value::Text(Origin::of_text(text).mark(made));
            Ok(match method {
                A::Upper => marked(string.to_uppercase()),
                A::Lower => marked(string.to_lowercase()),
                A::Capitalize => marked(capitalize(string)?),
                A::Title => marked(title(string)?),
                A::IsSpace => Value::Bool(!string.is_empty() && string.chars().all(is_space)),
                A::IsDigit | A::IsAlpha if !string.is_ascii() => {
                    return impossible("the class of a character outside of ASCII is not supported");
                }
                A::IsDigit => Value::Bool(!string.is_empty() && string.bytes().all(|byte| byte.is_ascii_digit())),
                A::IsAlpha => Value::Bool(!string.is_empty() && string.bytes().all(|byte| byte.is_ascii_alphabetic())),
                _ => return unsupported(&Value::Text(text.clone()), method),
            })
        }
    }
}

fn string_argument<'a>(argument: Option<Value<'a>>) -> Eval<Text<'a>> {
    match argument {
        Some(Value::Text(text)) => Ok(text),
        argument => impossible(format!("expected a str, found a {}", argument.unwrap_or(Value::None).type_name())),
    }
}

/// The text of `part`, a slice of `whole`.
pub(super) fn part<'a>(whole: &Text<'a>, part: &str) -> Text<'a> {
    let start = part.as_ptr() as usize - whole.as_str().as_ptr() as usize;
    whole.cut(|text| &text[start..start + part.len()])
}

/// `str.strip`, `str.lstrip`, `str.rstrip`
pub(super) fn strip<'a>(text: &Text<'a>, side: Attribute, characters: Option<&Value<'_>>) -> Eval<Text<'a>> {
    let characters = match characters {
        None | Some(Value::None) => None,
        Some(Value::Text(characters)) => Some(characters.as_str().into()),
        Some(other) => return impossible(format!("expected the characters to strip, found a {}", other.type_name())),
    };
    let strip = Strip { left: side != A::RightStrip, right: side != A::LeftStrip, characters };
    Ok(match text {
        Text::Traced(traced) => Text::Traced(Rc::new(traced.strip(strip))),
        text => text.cut(|text| strip.apply(text)),
    })
}

/// `str.replace`
pub(super) fn replace<'a>(text: &Text<'a>, old: &str, new: &Text<'a>, count: i128) -> Text<'a> {
    let limit = usize::try_from(count).unwrap_or(usize::MAX);
    if !text_contains(text, old) {
        return text.clone();
    }
    if let (Text::Borrowed(_) | Text::Shared(_), Text::Borrowed(_) | Text::Shared(_)) = (text, new) {
        return Text::Shared(text.as_str().replacen(old, new.as_str(), limit).into());
    }
    let kept = text.as_str().splitn(limit.saturating_add(1), old).map(|piece| part(text, piece));
    Text::join(kept.flat_map(|piece| [new.clone(), piece]).skip(1).collect())
}

fn split<'a>(
    text: &Text<'a>,
    from_right: bool,
    separator: Option<Value<'a>>,
    limit: Option<Value<'a>>,
) -> Eval<Value<'a>> {
    let limit = match limit {
        None => usize::MAX,
        Some(limit) => match limit.as_int() {
            Some(limit) => usize::try_from(limit).unwrap_or(usize::MAX),
            None => return impossible("expected an int as the number of splits"),
        },
    };
    if let (Text::Traced(_), Some(Value::Text(separator))) = (text, &separator)
        && let Some(part) = separator.plain()
        && !part.is_empty()
        && !text_contains(text, part)
    {
        return Value::list(vec![Value::Text(text.clone())]);
    }
    let string = text.as_str();
    let most = limit.saturating_add(1);
    let mut parts: Vec<&str> = match &separator {
        None | Some(Value::None) => split_spaces(string, from_right, limit),
        Some(separator) => match separator.as_str() {
            Some("") => return impossible("an empty separator"),
            Some(separator) if from_right => string.rsplitn(most, separator).collect(),
            Some(separator) => string.splitn(most, separator).collect(),
            None => return impossible(format!("expected a separator, found a {}", separator.type_name())),
        },
    };
    if from_right {
        parts.reverse();
    }
    Value::list(parts.into_iter().map(|piece| Value::Text(part(text, piece))).collect())
}

/// The words between white space; from the right they come in reverse.
fn split_spaces(text: &str, from_right: bool, limit: usize) -> Vec<&str> {
    let mut words = Vec::new();
    let mut rest = text;
    loop {
        rest = if from_right { rest.trim_end_matches(is_space) } else { rest.trim_start_matches(is_space) };
        if rest.is_empty() {
            return words;
        }
        let cut = if from_right { rest.rfind(is_space) } else { rest.find(is_space) };
        match cut {
            Some(cut) if words.len() < limit => {
                if from_right {
                    let word = cut + rest[cut..].chars().next().map_or(0, char::len_utf8);
                    words.push(&rest[word..]);
                    rest = &rest[..cut];
                } else {
                    words.push(&rest[..cut]);
                    rest = &rest[cut..];
                }
            }
            _ => {
                words.push(rest);
                return words;
            }
        }
    }
}
