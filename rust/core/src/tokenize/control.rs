//! Control tokens: what frames a conversation, such as `<|im_end|>`, and what the text of a record must not become.
//!
//! A control token is an added token that `tokenizer.json` calls special, or one between bars, `<|…|>` or `<｜…｜>`: some
//! models list the marks of their roles as ordinary added tokens. The other added tokens, such as `<think>` and
//! `<tool_call>`, are markup that models write themselves; they are tokens wherever they stand.

use std::ops::Range;

use super::fast::added::{AddedToken, AddedTokens};
use crate::error::{Error, ErrorKind, Result};

/// A stretch of a rendered text that is not the template's alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stretch {
    /// Bytes of the text.
    pub range: Range<usize>,
    /// Whether some of it may be the template's after all.
    pub is_mixed: bool,
}

/// What becomes of text of a record that spells a control token.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ControlPolicy {
    /// Its characters are encoded as ordinary text.
    #[default]
    Plain,
    /// The record is left out, and counted.
    Reject,
    /// It becomes that token, as with `transformers`.
    Allow,
}

impl ControlPolicy {
    /// The policy of this name.
    pub fn named(name: &str) -> Option<Self> {
        [Self::Plain, Self::Reject, Self::Allow].into_iter().find(|policy| policy.as_str() == name)
    }

    /// Its name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Reject => "reject",
            Self::Allow => "allow",
        }
    }
}

/// Is the added token `content` a control token?
pub fn is_control(content: &str, is_special: bool) -> bool {
    let is_barred = |left: &str, right: &str| {
        content.strip_prefix(left).is_some_and(|rest| rest.len() > right.len() && rest.ends_with(right))
    };
    !content.is_empty() && (is_special || is_barred("<|", "|>") || is_barred("<｜", "｜>"))
}

/// The control tokens of a tokenizer, and where text spells them.
pub struct ControlTokens {
    finder: AddedTokens,
}

impl ControlTokens {
    /// The tokens of these texts.
    pub fn new<'t>(contents: impl Iterator<Item = &'t str>) -> Self {
        let mut contents: Vec<_> = contents.map(str::to_owned).collect();
        contents.sort();
        contents.dedup();
        let token = |(content, id)| AddedToken { content, id, single_word: false, lstrip: false, rstrip: false };
        Self { finder: AddedTokens::new(contents.into_iter().zip(0..).map(token).collect()) }
    }

    /// Does `text` spell a control token?
    pub fn is_in(&self, text: &str) -> bool {
        self.finder.find(text.as_bytes(), 0, &[]).is_some()
    }

    /// Finds where the record spells a control token: each place of `text` where one stands that is not of the template
    /// alone. `stretches` are what the record wrote.
    ///
    /// # Errors
    /// [`ErrorKind::ControlText`] where one is put together from the record and the template, or may be.
    pub fn find(&self, text: &str, stretches: &[Stretch], found: &mut Vec<Range<usize>>) -> Result<()> {
        found.clear();
        let mut stretches = stretches.iter().peekable();
        let mut at = 0;
        while let Some((range, _)) = self.finder.find(text.as_bytes(), at, &[]) {
            at = range.start + 1;
            while stretches.next_if(|stretch| stretch.range.end <= range.start).is_some() {}
            let Some(stretch) = stretches.peek() else { return Ok(()) };
            if stretch.range.start >= range.end {
                continue;
            }
            let is_whole = stretch.range.start <= range.start && range.end <= stretch.range.end;
            if stretch.is_mixed || !is_whole {
                let message = format!(
                    "expected the control token '{}' to be the template's or the record's, found one made of both",
                    &text[range]
                );
                return Err(Error::new(ErrorKind::ControlText, message)
                    .with_hint("control_tokens=allow encodes it as transformers does"));
            }
            match found.last_mut() {
                Some(last) if last.end >= range.start => last.end = last.end.max(range.end),
                _ => found.push(range),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    // Special tokens and those between bars are control tokens; markup that models write is not.
    #[test]
    fn control_tokens_are_told_from_markup() {
        for (content, is_special, expected) in [
            ("<|im_end|>", false, true),
            ("</s>", true, true),
            ("<｜User｜>", false, true),
            ("<think>", false, false),
            ("</tool_call>", false, false),
            ("<|>", false, false),
            ("/nothink", false, false),
            ("", true, false),
        ] {
            assert_eq!(expected, is_control(content, is_special), "{content}");
        }
    }

    proptest! {
        // What is found is what the slow definition says: the places of control tokens that have a byte of the record.
        #[test]
        fn finding_is_exact(text in "[ab<|>]{0,24}", cuts in prop::collection::btree_set(0usize..25, 0..6)) {
            let tokens = ["<|a|>", "<|a", "|>b", "a"];
            let control = ControlTokens::new(tokens.into_iter());
            let cuts: Vec<usize> = cuts.into_iter().filter(|cut| *cut <= text.len()).collect();
            let stretches: Vec<Stretch> =
                cuts.chunks_exact(2).map(|pair| Stretch { range: pair[0]..pair[1], is_mixed: false }).collect();

            let is_of_record = |at: usize| stretches.iter().any(|stretch| stretch.range.contains(&at));
            let (mut bytes, mut is_split) = (vec![false; text.len()], false);
            for start in 0..text.len() {
                let longest = tokens.iter().filter(|token| text[start..].starts_with(**token)).map(|token| token.len()).max();
                let Some(length) = longest else { continue };
                if (start..start + length).any(is_of_record) {
                    bytes[start..start + length].fill(true);
                    let is_inside = |stretch: &Stretch| stretch.range.start <= start && start + length <= stretch.range.end;
                    is_split |= !stretches.iter().any(is_inside);
                }
            }
            let mut found = Vec::new();
            let result = control.find(&text, &stretches, &mut found);
            prop_assert_eq!(is_split, result.is_err());
            if !is_split {
                let covered = (0..text.len()).map(|at| found.iter().any(|range| range.contains(&at)));
                prop_assert_eq!(bytes, covered.collect::<Vec<_>>());
            }
        }
    }
}
