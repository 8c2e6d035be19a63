//! The values of a running template: Python's types, borrowing from the conversation and from the template where they can.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::ops::Range;
use std::rc::Rc;

use super::ast::Function;
use super::failure::{Eval, impossible};
use super::origin::{Made, Origin};
use super::python::{write_float, write_repr};
use super::trace::{Question, Trace, Traced};
use crate::conversation::Role;
use crate::json::{self, Data, Member};

/// How deep lists and dicts made by a template may nest, on top of what JSON allows; bounds all recursion over values.
const MAX_DEPTH: u16 = 200;

/// A value. Lists and dicts can't change: the sandbox of `transformers` forbids it. Namespaces can.
#[derive(Clone, Debug)]
pub(super) enum Value<'a> {
    /// A name, attribute or item that is not there.
    Undefined(&'a str),
    None,
    Bool(bool),
    Int(i128),
    Float(f64),
    Text(Text<'a>),
    /// Text marked by the filter `safe`. Python escapes what is joined to it, so we only print, compare and test it.
    Safe(Text<'a>),
    Sequence(SequenceKind, Items<'a>),
    Dict(Dict<'a>),
    /// What is left of a generator.
    Generator(Rc<RefCell<VecDeque<Value<'a>>>>),
    Namespace(Rc<RefCell<Vec<(Text<'a>, Value<'a>)>>>),
    Loop(Rc<Loop<'a>>),
    Macro(usize),
    Function(Function),
    /// `value.method` that is not called: all we know of it is that it is there.
    Method,
}

/// Which Python type a sequence is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SequenceKind {
    List,
    Tuple,
    /// `range(…)`
    Range,
    /// `dict.keys()`, `dict.values()`, `dict.items()`
    View,
}

/// A string.
#[derive(Clone, Debug)]
pub(super) enum Text<'a> {
    /// A text of the template.
    Borrowed(&'a str),
    /// Made of the template's texts alone.
    Shared(Rc<str>),
    /// A text of the record, or a part of one.
    Record(&'a str),
    /// Made of texts, some of them of the record.
    Made(Rc<Made>),
    /// A text of the record in a traced run.
    Traced(Rc<Traced<'a>>),
    /// Texts joined in a traced run, some of them traced.
    Joined(Rc<Joined<'a>>),
}

/// See [`Text::Joined`].
#[derive(Debug)]
pub(super) struct Joined<'a> {
    pub parts: Vec<Text<'a>>,
    whole: String,
    trace: &'a Trace,
}

/// The elements of a sequence.
#[derive(Clone, Debug)]
pub(super) enum Items<'a> {
    /// An array of the record.
    Json(&'a [json::Value<'a>]),
    /// A window of elements that the template made, or of the messages.
    Shared(Rc<List<'a>>, usize, usize),
}

/// Elements, how deep they nest, and how many of them have been looked at: see [`Items::horizon`].
#[derive(Debug)]
pub(super) struct List<'a> {
    depth: u16,
    values: Vec<Value<'a>>,
    horizon: Cell<usize>,
}

/// The pairs of a dict made by the template, and how deep it nests.
#[derive(Debug)]
pub(super) struct Pairs<'a> {
    depth: u16,
    pairs: Vec<(Value<'a>, Value<'a>)>,
}

/// A dict: keys are texts where it comes from the record.
#[derive(Clone, Debug)]
pub(super) enum Dict<'a> {
    /// An object of the record.
    Json(&'a [Member<'a>]),
    Shared(Rc<Pairs<'a>>),
}

/// The variable `loop`.
#[derive(Debug)]
pub(super) struct Loop<'a> {
    pub items: Items<'a>,
    pub index: Cell<usize>,
}

impl<'a> Text<'a> {
    /// The characters; to look at those of a traced text spoils its trace.
    pub fn as_str(&self) -> &str {
        match self {
            Self::Borrowed(text) | Self::Record(text) => text,
            Self::Shared(text) => text,
            Self::Made(made) => &made.text,
            Self::Traced(traced) => {
                traced.trace.spoil();
                traced.text
            }
            Self::Joined(joined) => {
                joined.trace.spoil();
                &joined.whole
            }
        }
    }

    /// The characters, if they are not traced.
    pub fn plain(&self) -> Option<&str> {
        match self {
            Self::Borrowed(text) | Self::Record(text) => Some(text),
            Self::Shared(text) => Some(text),
            Self::Made(made) => Some(&made.text),
            Self::Traced(_) | Self::Joined(_) => None,
        }
    }

    /// Asks a traced text; `None` for other texts.
    pub fn ask(&self, question: impl FnOnce() -> Question) -> Option<bool> {
        match self {
            Self::Traced(traced) => Some(traced.ask(question())),
            _ => None,
        }
    }

    /// Is there no character in it?
    pub fn is_empty(&self) -> bool {
        match self {
            Self::Traced(traced) => traced.ask(Question::IsEmpty),
            Self::Joined(joined)
                if joined.parts.iter().any(|part| part.plain().is_some_and(|text| !text.is_empty())) =>
            {
                false
            }
            _ => self.as_str().is_empty(),
        }
    }

    /// The texts one behind the other.
    pub fn join(mut parts: Vec<Self>) -> Self {
        parts.retain(|part| part.plain() != Some(""));
        if parts.len() == 1 {
            return parts.remove(0);
        }
        let trace = parts.iter().find_map(|part| match part {
            Self::Traced(traced) => Some(traced.trace),
            Self::Joined(joined) => Some(joined.trace),
            _ => None,
        });
        let Some(trace) = trace else {
            let mut made = Made::default();
            parts.iter().for_each(|part| made.push(part));
            return made.into_text();
        };
        let whole = parts.iter().map(|part| match part {
            Self::Traced(traced) => traced.text,
            Self::Joined(joined) => &joined.whole,
            part => part.as_str(),
        });
        let whole = whole.collect::<String>();
        Self::Joined(Rc::new(Joined { parts, whole, trace }))
    }

    /// The part that `cut` chooses; copies only what the template made.
    pub fn cut(&self, cut: impl for<'t> FnOnce(&'t str) -> &'t str) -> Self {
        match self {
            Self::Borrowed(text) => Self::Borrowed(cut(text)),
            Self::Record(text) => Self::Record(cut(text)),
            Self::Made(made) => made.part(cut(&made.text)),
            _ => {
                let text = self.as_str();
                let part = cut(text);
                if part.len() == text.len() { self.clone() } else { Self::Shared(part.into()) }
            }
        }
    }
}

impl<'a> Items<'a> {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.len_beyond(usize::MAX)
    }

    /// How many there are, for who only asks whether they are at least `bound`.
    pub fn len_beyond(&self, bound: usize) -> usize {
        let held = self.held();
        if let Self::Shared(list, start, end) = self {
            if bound <= held {
                list.look(start + bound);
            } else if *end == list.values.len() {
                list.look(usize::MAX);
            }
        }
        held
    }

    /// How many there are, for who does not let the output depend on it.
    pub fn held(&self) -> usize {
        match self {
            Self::Json(values) => values.len(),
            Self::Shared(_, start, end) => end - start,
        }
    }

    /// Notes that it was seen that there are no more.
    pub fn look_at_end(&self) {
        self.len();
    }

    pub fn get(&self, index: usize) -> Option<Value<'a>> {
        match self {
            Self::Json(values) => values.get(index).map(Value::from_json),
            Self::Shared(list, start, _) => {
                (index < self.len_beyond(index.saturating_add(1))).then(|| list.values[start + index].clone())
            }
        }
    }

    /// How many elements of the list behind this window have been looked at: what was done so far would be the same for any
    /// list that begins with these. `usize::MAX` once something has asked where the list ends.
    pub fn horizon(&self) -> usize {
        match self {
            Self::Json(_) => usize::MAX,
            Self::Shared(list, ..) => list.horizon.get(),
        }
    }

    /// Forgets what was looked at since the horizon was `earlier`.
    pub fn restore_horizon(&self, earlier: usize) {
        if let Self::Shared(list, ..) = self {
            list.horizon.set(earlier);
        }
    }

    pub fn iter(&self) -> impl Iterator<Item = Value<'a>> {
        (0..self.len()).map(|index| self.get(index).expect("the index is below the length"))
    }

    /// Where the window `part` begins in this window of the same elements.
    pub fn offset_of(&self, part: &Self) -> Option<usize> {
        match (self, part) {
            (Self::Shared(list, start, end), Self::Shared(other, first, last)) if Rc::ptr_eq(list, other) => {
                (*start <= *first && *last <= *end).then(|| first - start)
            }
            _ => None,
        }
    }

    /// The elements in `range`, without copying them.
    pub fn window(&self, range: Range<usize>) -> Self {
        match self {
            Self::Json(values) => Self::Json(&values[range]),
            Self::Shared(list, start, _) => Self::Shared(list.clone(), start + range.start, start + range.end),
        }
    }
}

impl List<'_> {
    fn look(&self, count: usize) {
        self.horizon.set(self.horizon.get().max(count));
    }
}

impl<'a> Dict<'a> {
    pub fn len(&self) -> usize {
        match self {
            Self::Json(members) => members.len(),
            Self::Shared(dict) => dict.pairs.len(),
        }
    }

    /// The value under a text.
    pub fn get(&self, key: &str) -> Option<Value<'a>> {
        match self {
            Self::Json(members) => members.iter().find(|member| member.key == key).map(Value::of_member),
            Self::Shared(dict) => {
                dict.pairs.iter().find(|(found, _)| found.as_str() == Some(key)).map(|(_, value)| value.clone())
            }
        }
    }

    pub fn pairs(&self) -> impl Iterator<Item = (Value<'a>, Value<'a>)> {
        (0..self.len()).map(|index| match self {
            Self::Json(members) => {
                let member = &members[index];
                (Value::record(&member.key), Value::of_member(member))
            }
            Self::Shared(dict) => dict.pairs[index].clone(),
        })
    }
}

impl<'a> Value<'a> {
    /// A value of the record. Its integers are known to fit: see [`input`](super::input).
    pub fn from_json(value: &'a json::Value<'a>) -> Self {
        match &value.data {
            Data::Null => Self::None,
            Data::Bool(flag) => Self::Bool(*flag),
            Data::Number(text) if text.contains(['.', 'e', 'E']) => Self::Float(text.parse().unwrap_or(f64::NAN)),
            Data::Number(text) => Self::Int(text.parse().unwrap_or_default()),
            Data::String(text) => Self::record(text),
            Data::Array(values) => Self::Sequence(SequenceKind::List, Items::Json(values)),
            Data::Object(members) => Self::Dict(Dict::Json(members)),
        }
    }

    /// The value of a member of the record. The name of a role under the key `role` is the template's word, not the
    /// record's: there are five of them.
    pub fn of_member(member: &'a Member<'a>) -> Self {
        match &member.value.data {
            Data::String(text) if member.key == "role" && Role::named(text).is_some() => Self::text(text),
            _ => Self::from_json(&member.value),
        }
    }

    /// A text of the record.
    pub fn record(text: &'a str) -> Self {
        Self::Text(Text::Record(text))
    }

    /// A text of the template.
    pub fn text(text: &'a str) -> Self {
        Self::Text(Text::Borrowed(text))
    }

    /// A text made of the template's texts alone; see [`Origin::mark`] for others.
    pub fn owned(text: String) -> Self {
        Self::Text(Text::Shared(text.into()))
    }

    pub fn sequence(kind: SequenceKind, values: Vec<Self>) -> Eval<Self> {
        let depth = nesting(values.iter())?;
        let length = values.len();
        Ok(Self::Sequence(kind, Items::Shared(Rc::new(List { depth, values, horizon: Cell::new(0) }), 0, length)))
    }

    pub fn list(values: Vec<Self>) -> Eval<Self> {
        Self::sequence(SequenceKind::List, values)
    }

    pub fn tuple(values: Vec<Self>) -> Eval<Self> {
        Self::sequence(SequenceKind::Tuple, values)
    }

    /// A dict whose keys differ.
    pub fn dict(pairs: Vec<(Self, Self)>) -> Eval<Self> {
        let depth = nesting(pairs.iter().flat_map(|(key, value)| [key, value]))?;
        Ok(Self::Dict(Dict::Shared(Rc::new(Pairs { depth, pairs }))))
    }

    pub fn generator(values: Vec<Self>) -> Eval<Self> {
        nesting(values.iter())?;
        Ok(Self::Generator(Rc::new(RefCell::new(values.into()))))
    }

    /// Is it a string, marked safe or not?
    pub fn is_text(&self) -> bool {
        matches!(self, Self::Text(_) | Self::Safe(_))
    }

    /// The text of a string, marked safe or not.
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Self::Text(text) | Self::Safe(text) => Some(text.as_str()),
            _ => None,
        }
    }

    /// The integer of an int or a bool.
    pub fn as_int(&self) -> Option<i128> {
        match self {
            Self::Int(number) => Some(*number),
            Self::Bool(flag) => Some(i128::from(*flag)),
            _ => None,
        }
    }

    pub fn is_undefined(&self) -> bool {
        matches!(self, Self::Undefined(_))
    }

    /// Python's name of the type, for messages.
    pub fn type_name(&self) -> &'static str {
        match self {
            Self::Undefined(_) => "undefined",
            Self::None => "None",
            Self::Bool(_) => "bool",
            Self::Int(_) => "int",
            Self::Float(_) => "float",
            Self::Text(_) => "str",
            Self::Safe(_) => "safe str",
            Self::Sequence(SequenceKind::List, _) => "list",
            Self::Sequence(SequenceKind::Tuple, _) => "tuple",
            Self::Sequence(SequenceKind::Range, _) => "range",
            Self::Sequence(SequenceKind::View, _) => "view of a dict",
            Self::Dict(_) => "dict",
            Self::Generator(_) => "generator",
            Self::Namespace(_) => "namespace",
            Self::Loop(_) => "loop",
            Self::Macro(_) => "macro",
            Self::Function(_) => "function",
            Self::Method => "method",
        }
    }

    pub fn is_true(&self) -> bool {
        match self {
            Self::Undefined(_) | Self::None => false,
            Self::Bool(flag) => *flag,
            Self::Int(number) => *number != 0,
            Self::Float(number) => *number != 0.0,
            Self::Text(text) | Self::Safe(text) => !text.is_empty(),
            Self::Sequence(_, items) => items.len_beyond(1) > 0,
            Self::Dict(dict) => dict.len() > 0,
            Self::Loop(state) => state.items.len_beyond(1) > 0,
            Self::Generator(_) | Self::Namespace(_) | Self::Macro(_) | Self::Function(_) | Self::Method => true,
        }
    }

    /// `len(value)`
    pub fn len(&self) -> Eval<usize> {
        Ok(match self {
            Self::Undefined(_) => 0,
            Self::Text(text) | Self::Safe(text) => text.as_str().chars().count(),
            Self::Sequence(_, items) => items.len(),
            Self::Dict(dict) => dict.len(),
            Self::Loop(state) => state.items.len(),
            _ => return impossible(format!("a {} has no length", self.type_name())),
        })
    }

    /// What a loop over the value sees; takes what is left of a generator.
    pub fn iterate(&self) -> Eval<Items<'a>> {
        let values = match self {
            Self::Sequence(_, items) => return Ok(items.clone()),
            Self::Undefined(_) => Vec::new(),
            Self::Text(text) => {
                let letters = text.as_str().char_indices();
                letters.map(|(at, letter)| Self::Text(text.cut(|text| &text[at..at + letter.len_utf8()]))).collect()
            }
            Self::Dict(dict) => dict.pairs().map(|(key, _)| key).collect(),
            Self::Generator(values) => values.borrow_mut().drain(..).collect(),
            _ => return impossible(format!("can't iterate over a {}", self.type_name())),
        };
        match Self::list(values)? {
            Self::Sequence(_, items) => Ok(items),
            _ => unreachable!("a list is a sequence"),
        }
    }

    /// Appends `str(value)`, as printing does.
    pub fn write(&self, out: &mut String) -> Eval<()> {
        match self {
            Self::Undefined(_) => Ok(()),
            Self::Text(text) | Self::Safe(text) => {
                out.push_str(text.as_str());
                Ok(())
            }
            _ => self.write_repr(out),
        }
    }

    /// `str(value)`
    pub fn to_text(&self) -> Eval<Text<'a>> {
        match self {
            Self::Text(text) | Self::Safe(text) => Ok(text.clone()),
            _ => {
                let mut out = String::new();
                self.write(&mut out)?;
                Ok(Origin::of(self).mark(out))
            }
        }
    }

    /// Appends `repr(value)`.
    fn write_repr(&self, out: &mut String) -> Eval<()> {
        match self {
            Self::Undefined(_) => out.push_str("Undefined"),
            Self::None => out.push_str("None"),
            Self::Bool(true) => out.push_str("True"),
            Self::Bool(false) => out.push_str("False"),
            Self::Int(number) => out.push_str(&number.to_string()),
            Self::Float(number) => write_float(*number, out),
            Self::Text(text) => write_repr(text.as_str(), out),
            Self::Sequence(kind @ (SequenceKind::List | SequenceKind::Tuple), items) => {
                let is_list = *kind == SequenceKind::List;
                out.push(if is_list { '[' } else { '(' });
                for (index, item) in items.iter().enumerate() {
                    if index > 0 {
                        out.push_str(", ");
                    }
                    item.write_repr(out)?;
                }
                if !is_list && items.len() == 1 {
                    out.push(',');
                }
                out.push(if is_list { ']' } else { ')' });
            }
            Self::Dict(dict) => {
                out.push('{');
                for (index, (key, value)) in dict.pairs().enumerate() {
                    if index > 0 {
                        out.push_str(", ");
                    }
                    key.write_repr(out)?;
                    out.push_str(": ");
                    value.write_repr(out)?;
                }
                out.push('}');
            }
            _ => return impossible(format!("a {} can't be printed", self.type_name())),
        }
        Ok(())
    }
}

/// How deep something nests that holds `values`.
fn nesting<'v, 'a: 'v>(values: impl Iterator<Item = &'v Value<'a>>) -> Eval<u16> {
    let mut depth = 0;
    for value in values {
        depth = depth.max(match value {
            Value::Sequence(_, Items::Shared(list, ..)) => list.depth,
            Value::Dict(Dict::Shared(dict)) => dict.depth,
            Value::Generator(_) | Value::Namespace(_) | Value::Loop(_) | Value::Method => {
                return impossible(format!("a {} inside another value is not supported", value.type_name()));
            }
            _ => 0,
        });
    }
    if depth == MAX_DEPTH {
        return impossible(format!("values nested deeper than {MAX_DEPTH} levels"));
    }
    Ok(depth + 1)
}
