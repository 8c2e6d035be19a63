//! Pre-tokenising: where the regular expressions of the known tokenizer families cut a text.
//!
//! Each family is a hand-written matcher of its expression, alternative by alternative in the order of the expression, because
//! the first alternative that matches wins (leftmost-first, as in Oniguruma). The expression stands above each matcher. A
//! family's `next` takes the start of a pretoken and returns its end; it never looks behind, so cutting can begin anywhere that
//! a pretoken begins.
//!
//! Sources: the GPT-2 expression (Radford et al. 2019), cl100k and o200k (tiktoken), and the tokenizer.json files of Qwen,
//! Llama-3, GLM, MiniMax and DeepSeek.

use super::classes::{
    CJK, ClassTable, Flags, LETTER, LOWER, MARK, NUMBER, PUNCTUATION, SPACE, STOP, SYMBOL, UNCASED, UPPER,
};
use super::cuts::Cuts;
use super::stages::{Stage, StageCuts};
use super::windows::{Level, Shape};

/// One family's way to cut, its options included.
pub enum Rules {
    /// Qwen, Llama-3, GLM and whoever follows cl100k.
    Cl100k { letters: Flags, max_digits: usize },
    /// GPT-2; SmolLM2 splits off each digit first.
    Gpt2 { digits_apart: bool },
    /// MiniMax and whoever follows o200k.
    O200k,
    /// DeepSeek-V3, R1 and V4.
    DeepSeek3,
    /// DeepSeek LLM, Coder and V2: several simple expressions one after the other.
    Stages(Vec<Stage>),
}

impl Rules {
    /// How windows of ASCII are cut, if they can be.
    fn shape(&self) -> Option<Shape> {
        match self {
            Self::Cl100k { max_digits, .. } => Some(Shape::Cl100k { max_digits: *max_digits as u32 }),
            Self::Gpt2 { digits_apart } => Some(Shape::Gpt2 { digits_apart: *digits_apart }),
            Self::O200k => Some(Shape::O200k),
            Self::DeepSeek3 => Some(Shape::DeepSeek3),
            Self::Stages(_) => None,
        }
    }
}

/// Cuts text into pretokens, and long ones of CJK into pieces.
pub struct PreTokenizer {
    rules: Rules,
    table: ClassTable,
    shape: Option<Shape>,
    level: Level,
    cuts: Cuts,
}

/// Where a text is being cut.
#[derive(Default)]
pub struct Cursor {
    /// Where the next piece starts.
    start: usize,
    /// End of the pretoken that is being cut into pieces, if that is beyond `start`.
    pretoken_end: usize,
    stages: StageCuts,
}

/// Pretokens, or pieces of them, in a row: each starts where the one before ends.
pub struct Batch {
    ends: [usize; Self::CAPACITY],
    len: usize,
}

impl Default for Batch {
    fn default() -> Self {
        Self { ends: [0; Self::CAPACITY], len: 0 }
    }
}

impl Batch {
    /// A batch is full when a window might not fit any more.
    pub const CAPACITY: usize = 128;
    const FULL: usize = Self::CAPACITY - 64;

    fn push(&mut self, end: usize, is_piece: bool) {
        self.ends[self.len] = end << 1 | is_piece as usize;
        self.len += 1;
    }

    /// Twice the ends, and one more for that of a piece, not of a whole pretoken.
    pub fn ends(&self) -> &[usize] {
        &self.ends[..self.len]
    }
}

impl Cursor {
    /// Begins a new text.
    pub fn reset(&mut self) {
        (self.start, self.pretoken_end) = (0, 0);
        self.stages.reset();
    }
}

/// Shorter pretokens are not cut: two characters of three bytes that no token joins are few tokens anyway.
const MIN_CUT: usize = 7;

impl PreTokenizer {
    pub fn new(rules: Rules, table: ClassTable, cuts: Cuts) -> Self {
        let shape = rules.shape();
        Self { rules, table, shape, level: Level::detect(), cuts }
    }

    /// Fills the batch with the next pieces of `text`; it stays empty at the end.
    pub fn fill(&self, text: &[u8], cursor: &mut Cursor, batch: &mut Batch) {
        batch.len = 0;
        let mut start = cursor.start;
        while batch.len < Batch::FULL && start < text.len() {
            if start < cursor.pretoken_end {
                start = self.cuts.next(text, start, cursor.pretoken_end);
                batch.push(start, true);
                continue;
            }
            if let Some(shape) = self.shape.filter(|_| text[start] < 0x80) {
                let found = self.window(text, start, shape);
                let mut rest = found & !1;
                while rest != 0 {
                    batch.push(start + rest.trailing_zeros() as usize, false);
                    rest &= rest - 1;
                }
                if found != 1 {
                    start += 63 - found.leading_zeros() as usize;
                    continue;
                }
            }
            let end = self.next(text, start, &mut cursor.stages);
            if end - start >= MIN_CUT && text[end - 1] >= 0x80 {
                let cut = self.cuts.next(text, start, end);
                batch.push(cut, cut < end);
                (start, cursor.pretoken_end) = (cut, end);
            } else {
                batch.push(end, false);
                start = end;
            }
        }
        cursor.start = start;
    }

    /// The sure starts of pretokens in the window at `start`.
    #[inline]
    fn window(&self, text: &[u8], start: usize, shape: Shape) -> u64 {
        match text.get(start..start + 64) {
            Some(window) => self.level.starts(window.try_into().expect("the slice has 64 bytes"), 64, shape),
            None => {
                let mut window = [0; 64];
                let rest = &text[start..];
                window[..rest.len()].copy_from_slice(rest);
                self.level.starts(&window, rest.len(), shape)
            }
        }
    }

    /// The end of the pretoken that starts at `start < text.len()`.
    fn next(&self, text: &[u8], start: usize, stage_cuts: &mut StageCuts) -> usize {
        let scan = Scan { text, table: &self.table, stop: 0, stop_unless: 0 };
        match &self.rules {
            Rules::Cl100k { letters, max_digits } => scan.cl100k(start, *letters, *max_digits),
            Rules::Gpt2 { digits_apart } => scan.gpt2(start, *digits_apart),
            Rules::O200k => scan.o200k(start),
            Rules::DeepSeek3 => scan.deepseek3(start),
            Rules::Stages(stages) => stage_cuts.next(stages, text, start),
        }
    }
}

/// A text with its classes.
///
/// Some tokenizers split off digits or CJK before the main expression sees the rest. To the main expression a text then ends
/// where such a character stands: it is STOP, as the end of the text is.
#[derive(Clone, Copy)]
struct Scan<'a> {
    text: &'a [u8],
    table: &'a ClassTable,
    /// A character of these classes is a STOP,
    stop: Flags,
    /// and so is one that lacks one of these.
    stop_unless: Flags,
}

impl Scan<'_> {
    fn at(&self, i: usize) -> (Flags, usize) {
        let (flags, width) = self.table.at(self.text, i);
        if flags & self.stop != 0 || !flags & self.stop_unless != 0 { (STOP, width) } else { (flags, width) }
    }

    fn is_newline(&self, i: usize) -> bool {
        matches!(self.text.get(i), Some(b'\r' | b'\n'))
    }

    /// `[set]*` from `i`: the end of the run.
    fn run(&self, mut i: usize, set: Flags) -> usize {
        loop {
            let (flags, width) = self.at(i);
            if flags & set == 0 {
                return i;
            }
            i += width;
        }
    }

    /// `[^set]*` from `i`: the end of the run.
    fn run_outside(&self, mut i: usize, set: Flags) -> usize {
        loop {
            let (flags, width) = self.at(i);
            if flags & (set | STOP) != 0 {
                return i;
            }
            i += width;
        }
    }

    /// `[\r\n]*` from `i`.
    fn newlines(&self, mut i: usize) -> usize {
        while self.is_newline(i) {
            i += 1;
        }
        i
    }

    /// `\p{N}{1,max}` from `i`.
    fn digits(&self, mut i: usize, max: usize) -> usize {
        for _ in 0..max {
            let (flags, width) = self.at(i);
            if flags & NUMBER == 0 {
                break;
            }
            i += width;
        }
        i
    }

    /// `'s|'t|'re|'ve|'m|'ll|'d` at `i`: its end.
    fn contraction(&self, i: usize) -> Option<usize> {
        match *self.text.get(i..)? {
            [b'\'', b's' | b't' | b'm' | b'd', ..] => Some(i + 2),
            [b'\'', b'r' | b'v', b'e', ..] | [b'\'', b'l', b'l', ..] => Some(i + 3),
            _ => None,
        }
    }

    /// `(?i:'s|'t|'re|'ve|'m|'ll|'d)` at `i`: its end. Ignoring case, `s` is also U+017F (long s).
    fn contraction_ignoring_case(&self, i: usize) -> Option<usize> {
        let rest = self.text.get(i..)?.strip_prefix(b"'")?;
        let low = |k: usize| rest.get(k).map(u8::to_ascii_lowercase);
        match (low(0)?, low(1)) {
            (b's' | b't' | b'm' | b'd', _) => Some(i + 2),
            (b'r' | b'v', Some(b'e')) | (b'l', Some(b'l')) => Some(i + 3),
            _ => rest.starts_with("ſ".as_bytes()).then_some(i + 3),
        }
    }

    /// `\s*[\r\n]+|\s+(?!\S)|\s+` at whitespace.
    fn whitespace(&self, start: usize) -> usize {
        let (mut i, mut last, mut newline_end) = (start, start, None);
        loop {
            let (flags, width) = self.at(i);
            if flags & SPACE == 0 {
                break;
            }
            last = i;
            i += width;
            if self.is_newline(last) {
                newline_end = Some(i);
            }
        }
        newline_end.unwrap_or_else(|| self.before_last(start, last, i))
    }

    /// `\s+(?!\S)|\s+` for the run of whitespace `start..end` whose last character begins at `last`: it stays behind, if it is
    /// not the only one and something follows, to lead the next pretoken.
    fn before_last(&self, start: usize, last: usize, end: usize) -> usize {
        let at_end = self.at(end).0 & STOP != 0;
        if at_end || last == start { end } else { last }
    }

    /// `(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+`
    ///
    /// Qwen2 has `\p{N}` (one digit); Qwen3.5 also has `[\p{L}\p{M}]` for `\p{L}` (but in the lead).
    fn cl100k(&self, start: usize, letters: Flags, max_digits: usize) -> usize {
        if let Some(end) = self.contraction_ignoring_case(start) {
            return end;
        }
        let (first, width) = self.at(start);
        let second = start + width;
        let (next, _) = self.at(second);
        if first & letters != 0 || (first & NUMBER == 0 && !self.is_newline(start) && next & letters != 0) {
            return self.run(second, letters);
        }
        if first & NUMBER != 0 {
            return self.digits(start, max_digits);
        }
        self.punctuation(start, first, next, SPACE | NUMBER | letters).unwrap_or_else(|| self.whitespace(start))
    }

    /// ` ?[^set]+[\r\n]*`
    fn punctuation(&self, start: usize, first: Flags, next: Flags, set: Flags) -> Option<usize> {
        let led = self.text[start] == b' ' && next & (set | STOP) == 0;
        (led || first & set == 0).then(|| self.newlines(self.run_outside(start + led as usize, set)))
    }

    /// `'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`
    fn gpt2(mut self, start: usize, digits_apart: bool) -> usize {
        if let Some(end) = self.contraction(start) {
            return end;
        }
        let (mut first, width) = self.at(start);
        if digits_apart && first & NUMBER != 0 {
            return start + width;
        }
        self.stop = if digits_apart { NUMBER } else { 0 };
        let mut body = start;
        if self.text[start] == b' ' {
            let (next, _) = self.at(start + 1);
            if next & (SPACE | STOP) == 0 {
                (first, body) = (next, start + 1);
            }
        }
        if first & SPACE != 0 {
            let end = self.run(start, SPACE);
            let last =
                (start..end).rev().find(|i| self.text[*i] & 0xc0 != 0x80).expect("a run of whitespace is not empty");
            return self.before_last(start, last, end);
        }
        match first {
            f if f & LETTER != 0 => self.run(body, LETTER),
            f if f & NUMBER != 0 => self.run(body, NUMBER),
            _ => self.run_outside(body, SPACE | LETTER | NUMBER),
        }
    }

    /// ```text
    /// [^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?
    /// |[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?
    /// |\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+
    /// ```
    fn o200k(&self, start: usize) -> usize {
        let (first, width) = self.at(start);
        let can_lead = first & (LETTER | NUMBER) == 0 && !self.is_newline(start);
        let leads = [can_lead.then_some(start + width), Some(start)];
        let upper = UPPER | UNCASED | MARK;
        let lower = LOWER | UNCASED | MARK;
        for word in leads.into_iter().flatten() {
            let uppers = self.run(word, upper);
            let mut end = self.run(uppers, lower);
            if end == uppers {
                // No lower-case run after the upper-case one: it gives back characters until one of them can stand for it.
                end = word;
                let mut i = word;
                while i < uppers {
                    let (flags, width) = self.at(i);
                    i += width;
                    if flags & lower != 0 {
                        end = i;
                    }
                }
            }
            if end > word {
                return self.contraction_ignoring_case(end).unwrap_or(end);
            }
        }
        for word in leads.into_iter().flatten() {
            let end = self.run(word, upper);
            if end > word {
                return self.contraction_ignoring_case(end).unwrap_or(end);
            }
        }
        if first & NUMBER != 0 {
            return self.digits(start, 3);
        }
        let (next, _) = self.at(start + width);
        let Some(mut end) = self.punctuation(start, first, next, SPACE | LETTER | NUMBER) else {
            return self.whitespace(start);
        };
        while matches!(self.text.get(end), Some(b'\r' | b'\n' | b'/')) {
            end += 1;
        }
        end
    }

    /// First `\p{N}{1,3}` and `[一-龥぀-ゟ゠-ヿ]+` are split off, then these and what lies between are cut by
    ///
    /// ```text
    /// [!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*
    /// |\s*[\r\n]+|\s+(?!\S)|\s+
    /// ```
    ///
    /// Characters that no alternative takes (controls, unassigned) make pretokens of their own, up to the next match.
    fn deepseek3(mut self, start: usize) -> usize {
        let (first, _) = self.at(start);
        if first & NUMBER != 0 {
            return self.digits(start, 3);
        }
        (self.stop, self.stop_unless) = if first & CJK != 0 { (0, CJK) } else { (NUMBER | CJK, 0) };
        if let Some(end) = self.deepseek3_match(start) {
            return end;
        }
        let mut i = start;
        loop {
            i += self.at(i).1;
            if self.at(i).0 & STOP != 0 || self.deepseek3_match(i).is_some() {
                return i;
            }
        }
    }

    fn deepseek3_match(&self, start: usize) -> Option<usize> {
        let byte = self.text[start];
        let letter_at = |i: usize| self.text.get(i).is_some_and(u8::is_ascii_alphabetic);
        if byte.is_ascii_punctuation() && letter_at(start + 1) {
            let len = self.text[start + 1..].iter().take_while(|b| b.is_ascii_alphabetic()).count();
            return Some(start + 1 + len);
        }
        let (first, width) = self.at(start);
        let (next, _) = self.at(start + width);
        let word = LETTER | MARK;
        if first & word != 0 {
            return Some(self.run(start, word));
        }
        if first & (PUNCTUATION | SYMBOL) == 0 && !self.is_newline(start) && next & word != 0 {
            return Some(self.run(start + width, word));
        }
        let signs = PUNCTUATION | SYMBOL;
        let led = byte == b' ' && next & signs != 0;
        if led || first & signs != 0 {
            return Some(self.newlines(self.run(start + led as usize, signs)));
        }
        (first & SPACE != 0).then(|| self.whitespace(start))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::sync::LazyLock;

    /// Six families at each level, the matchers alone last.
    static PRETOKENIZERS: LazyLock<Vec<PreTokenizer>> = LazyLock::new(|| {
        let rules = || {
            [
                Rules::Cl100k { letters: LETTER, max_digits: 1 },
                Rules::Cl100k { letters: LETTER | MARK, max_digits: 3 },
                Rules::Gpt2 { digits_apart: false },
                Rules::Gpt2 { digits_apart: true },
                Rules::O200k,
                Rules::DeepSeek3,
            ]
        };
        let levels = Level::all().into_iter().map(Some).chain([None]);
        let of_level = |level: Option<Level>| {
            rules().into_iter().map(move |rules| {
                let mut pretokenizer = PreTokenizer::new(rules, ClassTable::new(), Cuts::new([].into_iter()));
                match level {
                    Some(level) => pretokenizer.level = level,
                    None => pretokenizer.shape = None,
                }
                pretokenizer
            })
        };
        levels.flat_map(of_level).collect()
    });

    fn ends(pretokenizer: &PreTokenizer, text: &str) -> Vec<usize> {
        let (mut cursor, mut batch, mut ends) = (Cursor::default(), Batch::default(), Vec::new());
        loop {
            pretokenizer.fill(text.as_bytes(), &mut cursor, &mut batch);
            if batch.len == 0 {
                return ends;
            }
            ends.extend(batch.ends().iter().map(|end| end >> 1));
        }
    }

    proptest! {
        /// Windows, made in any way, cut where the matchers cut.
        #[test]
        fn windows_equal_matchers(
            text in "([a-c]{1,3}|[A-Z]{1,2}|[srvltedm]|'[srvltedmSRVLTEDM]{0,3}|[0-9]{1,5}| {1,3}|[\r\n]{1,3}|[\t\x0b\x0c]|[/.(]{1,2}|\x01|\x7f|é|好|ſ| {60,70}|[a-z]{60,80}|[!/]{62}\n){0,60}"
        ) {
            let num_families = 6;
            for family in 0..num_families {
                let mut same_family = PRETOKENIZERS.iter().skip(family).step_by(num_families);
                let expected = ends(same_family.next_back().unwrap(), &text);
                prop_assert_eq!(text.len(), expected.last().copied().unwrap_or(0));
                for pretokenizer in same_family {
                    prop_assert_eq!(&expected, &ends(pretokenizer, &text), "{:?} {:?}", pretokenizer.shape, pretokenizer.level);
                }
            }
        }
    }
}
