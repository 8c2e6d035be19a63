//! Watching a template at work: what it asks about the texts of a conversation, and where it writes them.
//!
//! A traced text is a text of the record that remembers which field it is and how it was stripped. Operations that know
//! traced texts note what they asked (a [`Guard`]) and go on; every other use of its characters goes through
//! [`Text::as_str`](super::value::Text::as_str), which spoils the trace. So a trace that is not spoilt holds everything
//! that the output depends on, and new operations are safe before anybody has thought of traces.

use std::cell::{Cell, RefCell};

use super::python::is_space;

/// What one traced run has asked so far.
#[derive(Debug, Default)]
pub(super) struct Trace {
    guards: RefCell<Vec<Guard>>,
    is_spoilt: Cell<bool>,
}

/// A text of the record, or what is left of it after stripping.
#[derive(Debug)]
pub(super) struct Traced<'a> {
    pub view: View,
    pub text: &'a str,
    pub trace: &'a Trace,
}

/// A field of a conversation, stripped.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct View {
    /// Number of the message, and of the field in it.
    pub field: (usize, usize),
    strips: Vec<Strip>,
}

/// One `str.strip`, `str.lstrip` or `str.rstrip`.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Strip {
    pub left: bool,
    pub right: bool,
    /// The characters to strip; white space if there are none.
    pub characters: Option<Box<str>>,
}

/// Something a template asked about a text, and the answer.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Guard {
    view: View,
    question: Question,
    answer: bool,
}

#[derive(Clone, Debug, PartialEq)]
pub(super) enum Question {
    IsEmpty,
    Equals(Box<str>),
    Contains(Box<str>),
    StartsWith(Box<str>),
    EndsWith(Box<str>),
}

impl Trace {
    /// Notes that the output depends on a text in a way that no guard covers.
    pub fn spoil(&self) {
        self.is_spoilt.set(true);
    }

    /// Adds a guard, unless it is there.
    pub fn note(&self, guard: Guard) {
        let mut guards = self.guards.borrow_mut();
        if !guards.contains(&guard) {
            guards.push(guard);
        }
    }

    /// What was asked; `None` if that is not all that the output depends on.
    pub fn guards(&self) -> Option<Vec<Guard>> {
        (!self.is_spoilt.get()).then(|| self.guards.borrow().clone())
    }
}

impl<'a> Traced<'a> {
    /// The whole text of a field.
    pub fn new(field: (usize, usize), text: &'a str, trace: &'a Trace) -> Self {
        Self { view: View { field, strips: Vec::new() }, text, trace }
    }

    /// Asks about the text, and notes the answer.
    pub fn ask(&self, question: Question) -> bool {
        let answer = question.answer(self.text);
        self.trace.note(Guard { view: self.view.clone(), question, answer });
        answer
    }

    /// The text, stripped once more.
    pub fn strip(&self, strip: Strip) -> Self {
        let mut view = self.view.clone();
        let text = strip.apply(self.text);
        if view.strips.last() != Some(&strip) {
            view.strips.push(strip);
        }
        Self { view, text, trace: self.trace }
    }
}

impl View {
    /// What the view shows of the whole `text` of its field.
    pub fn of<'t>(&self, text: &'t str) -> &'t str {
        self.strips.iter().fold(text, |text, strip| strip.apply(text))
    }
}

impl Strip {
    /// The stripped text.
    pub fn apply<'t>(&self, text: &'t str) -> &'t str {
        let strip = |matches: &dyn Fn(char) -> bool| {
            let text = if self.left { text.trim_start_matches(matches) } else { text };
            if self.right { text.trim_end_matches(matches) } else { text }
        };
        match &self.characters {
            None => strip(&is_space),
            Some(characters) => strip(&|character| characters.contains(character)),
        }
    }
}

impl Question {
    fn answer(&self, text: &str) -> bool {
        match self {
            Self::IsEmpty => text.is_empty(),
            Self::Equals(other) => *text == **other,
            Self::Contains(part) => memchr::memmem::find(text.as_bytes(), part.as_bytes()).is_some(),
            Self::StartsWith(start) => text.starts_with(&**start),
            Self::EndsWith(end) => text.ends_with(&**end),
        }
    }
}

impl Guard {
    /// The field that was asked about.
    pub fn field(&self) -> (usize, usize) {
        self.view.field
    }

    /// Would the template get the same answer from `text`, the whole text of the field?
    pub fn holds(&self, text: &str) -> bool {
        self.question.answer(self.view.of(text)) == self.answer
    }
}
