//! Pre-tokenising in stages: several simple expressions, each cutting the pieces that the one before left.
//!
//! DeepSeek LLM, Coder and V2 are built so: newlines, words, punctuation, CJK, digits. Every expression is a run of one class,
//! perhaps led by one whitespace character, and both matches and gaps go on to the next stage ("Isolated").

use super::classes::{decode, hir_ranges};
use regex_syntax::hir::HirKind;

/// One stage.
pub enum Stage {
    /// `[set]`, `[set]+` or `\s?[set]+`.
    Run { set: Vec<(u32, u32)>, led: bool, repeated: bool },
    /// `\s+$`: the whitespace at the end of a piece.
    TrailingSpace,
}

impl Stage {
    /// Reads an expression; `None` if it is not one of the kinds above.
    pub fn parse(pattern: &str) -> Option<Self> {
        if pattern == r"\s+$" {
            return Some(Self::TrailingSpace);
        }
        let hir = regex_syntax::parse(pattern).ok()?;
        let run = |kind: &HirKind, led: bool| match kind {
            HirKind::Repetition(r) if r.min == 1 && r.max.is_none() && r.greedy => {
                Some(Self::Run { set: hir_ranges(r.sub.kind())?, led, repeated: true })
            }
            _ if !led => Some(Self::Run { set: hir_ranges(kind)?, led, repeated: false }),
            _ => None,
        };
        match hir.kind() {
            HirKind::Concat(parts) if parts.len() == 2 && parts[0] == regex_syntax::parse(r"\s?").ok()? => {
                run(parts[1].kind(), true)
            }
            kind => run(kind, false),
        }
    }

    /// The pre-tokenizer `Digits`: numeric characters, one at a time (`individual`) or in runs.
    pub fn digits(individual: bool) -> Self {
        let mut set: Vec<(u32, u32)> = Vec::new();
        for c in (0..=char::MAX as u32).filter_map(char::from_u32).filter(|c| c.is_numeric()) {
            match set.last_mut() {
                Some((_, end)) if *end + 1 == c as u32 => *end += 1,
                _ => set.push((c as u32, c as u32)),
            }
        }
        Self::Run { set, led: false, repeated: !individual }
    }

    /// The end of the first piece of `text`, be it a match or the gap before one.
    fn next(&self, text: &[u8]) -> usize {
        match self {
            Self::TrailingSpace => {
                let mut trailing = text.len();
                let mut i = text.len();
                while i > 0 {
                    i -= 1;
                    if text[i] & 0xc0 != 0x80 {
                        if !is_space(decode(text, i).0) {
                            break;
                        }
                        trailing = i;
                    }
                }
                if trailing == 0 { text.len() } else { trailing }
            }
            Self::Run { .. } => {
                let mut i = 0;
                while i < text.len() {
                    if let Some(end) = self.match_at(text, i) {
                        return if i == 0 { end } else { i };
                    }
                    i += decode(text, i).1;
                }
                text.len()
            }
        }
    }

    fn match_at(&self, text: &[u8], start: usize) -> Option<usize> {
        let Self::Run { set, led, repeated } = self else { return None };
        let has = |i: usize| {
            (i < text.len()).then(|| decode(text, i)).filter(|(c, _)| contains(set, *c)).map(|(_, width)| i + width)
        };
        let (first, width) = decode(text, start);
        let mut end = match (*led && is_space(first)).then(|| has(start + width)).flatten() {
            Some(end) => end,
            None => has(start)?,
        };
        while let Some(next) = has(end).filter(|_| *repeated) {
            end = next;
        }
        Some(end)
    }
}

fn contains(set: &[(u32, u32)], code_point: u32) -> bool {
    let after = set.partition_point(|(start, _)| *start <= code_point);
    after > 0 && code_point <= set[after - 1].1
}

fn is_space(code_point: u32) -> bool {
    char::from_u32(code_point).is_some_and(char::is_whitespace)
}

/// The pieces that each stage is in the middle of: `ends[k]` is the end of the current piece of stage `k`.
#[derive(Default)]
pub struct StageCuts {
    ends: Vec<usize>,
}

impl StageCuts {
    /// Starts a new text.
    pub fn reset(&mut self) {
        self.ends.clear();
    }

    /// The end of the pretoken that starts at `start`, where the one before ended.
    pub fn next(&mut self, stages: &[Stage], text: &[u8], start: usize) -> usize {
        self.ends.resize(stages.len(), start);
        let mut limit = text.len();
        for (stage, end) in stages.iter().zip(&mut self.ends) {
            if *end == start {
                *end = start + stage.next(&text[start..limit]);
            }
            limit = *end;
        }
        limit
    }
}
