//! Where text comes from: the template or the record. What the record says must not become a control token.
//!
//! Texts of the record are told from those of the template from the moment they are read. Cutting, joining and printing
//! keep the border between them to the byte; what makes a new text out of both at once, such as `tojson` over a dict of the
//! template, leaves a text of which nobody can say more than that it is mixed.

use std::ops::Range;
use std::rc::Rc;

use super::value::{Dict, Items, Text, Value};
use crate::tokenize::control::Stretch;

/// A text made of others, and which stretches of it are not the template's: in order, disjoint, none empty.
#[derive(Clone, Debug, Default)]
pub(super) struct Made {
    pub text: String,
    pub stretches: Vec<Stretch>,
}

/// Appends a stretch, to the last one where it can.
pub(super) fn push_stretch(stretches: &mut Vec<Stretch>, range: Range<usize>, is_mixed: bool) {
    match stretches.last_mut() {
        _ if range.is_empty() => {}
        Some(last) if last.range.end == range.start && last.is_mixed == is_mixed => last.range.end = range.end,
        _ => stretches.push(Stretch { range, is_mixed }),
    }
}

impl Made {
    /// Appends a text.
    pub fn push(&mut self, text: &Text<'_>) {
        let start = self.text.len();
        self.text.push_str(text.as_str());
        match text {
            Text::Borrowed(_) | Text::Shared(_) => {}
            Text::Made(made) => made.stretches.iter().for_each(|Stretch { range, is_mixed }| {
                push_stretch(&mut self.stretches, start + range.start..start + range.end, *is_mixed);
            }),
            Text::Record(_) | Text::Traced(_) | Text::Joined(_) => {
                push_stretch(&mut self.stretches, start..self.text.len(), false);
            }
        }
    }

    /// This as a text.
    pub fn into_text<'a>(self) -> Text<'a> {
        match self.stretches.is_empty() {
            true => Text::Shared(self.text.into()),
            false => Text::Made(Rc::new(self)),
        }
    }

    /// The text of `part`, a slice of this one.
    pub fn part<'a>(&self, part: &str) -> Text<'a> {
        let start = part.as_ptr() as usize - self.text.as_ptr() as usize;
        let mut made = Self { text: part.to_owned(), stretches: Vec::new() };
        for Stretch { range, is_mixed } in &self.stretches {
            let (first, end) = (range.start.max(start) - start, range.end.saturating_sub(start).min(part.len()));
            push_stretch(&mut made.stretches, first..end.max(first), *is_mixed);
        }
        made.into_text()
    }
}

/// Whose texts went into something, where it can't be told byte by byte.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Origin {
    has_record: bool,
    /// Letters, digits, spaces, `_` and `-` do not count: no control token is made of them alone.
    has_template: bool,
}

impl Origin {
    /// The origin of one text.
    pub fn of_text(text: &Text<'_>) -> Self {
        let is_inert = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b' ' | b'_' | b'-');
        match text {
            Text::Borrowed(text) => Self { has_record: false, has_template: !text.bytes().all(is_inert) },
            Text::Shared(text) => Self { has_record: false, has_template: !text.bytes().all(is_inert) },
            Text::Record(_) | Text::Traced(_) => Self { has_record: true, has_template: false },
            Text::Made(made) => match &made.stretches[..] {
                [Stretch { range, is_mixed: false }] if *range == (0..made.text.len()) => {
                    Self { has_record: true, has_template: false }
                }
                _ => Self { has_record: true, has_template: true },
            },
            Text::Joined(_) => Self { has_record: true, has_template: true },
        }
    }

    /// The origin of all that `value` holds.
    pub fn of(value: &Value<'_>) -> Self {
        match value {
            Value::Text(text) | Value::Safe(text) => Self::of_text(text),
            Value::Sequence(_, Items::Json(_)) | Value::Dict(Dict::Json(_)) => {
                Self { has_record: true, has_template: false }
            }
            Value::Sequence(_, items) => items.iter().fold(Self::default(), |all, item| all.and(Self::of(&item))),
            Value::Dict(dict) => {
                dict.pairs().fold(Self::default(), |all, (key, item)| all.and(Self::of(&key)).and(Self::of(&item)))
            }
            _ => Self::default(),
        }
    }

    fn and(self, other: Self) -> Self {
        Self { has_record: self.has_record || other.has_record, has_template: self.has_template || other.has_template }
    }

    /// The text `made`, of this origin.
    pub fn mark<'a>(self, made: String) -> Text<'a> {
        if !self.has_record || made.is_empty() {
            return Text::Shared(made.into());
        }
        let stretches = vec![Stretch { range: 0..made.len(), is_mixed: self.has_template }];
        Text::Made(Rc::new(Made { text: made, stretches }))
    }
}
