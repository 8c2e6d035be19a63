//! Character classes: what the pre-tokenizer asks of a code point, in one table lookup.
//!
//! The reference engine splits with Oniguruma, whose `\p{..}` and `\s` follow Unicode 16. `regex-syntax` carries the same tables
//! (a test compares every code point), so the classes are read from there once, when a tokenizer is loaded. The table has two
//! stages: 4,352 blocks of 256 code points, equal blocks stored once. Almost all of Han, Hangul and the unassigned planes share
//! a block each, so what a text really touches stays in the first-level cache.

use regex_syntax::hir::{Class, HirKind};

/// A set of classes, one bit each.
pub type Flags = u16;

pub const UPPER: Flags = 1; // Lu, Lt
pub const LOWER: Flags = 2; // Ll
pub const UNCASED: Flags = 4; // Lm, Lo
pub const MARK: Flags = 8;
pub const NUMBER: Flags = 16;
pub const SPACE: Flags = 32; // White_Space, as in \s
pub const PUNCTUATION: Flags = 64;
pub const SYMBOL: Flags = 128;
/// No class of its own: the end of the text, or of the part of it that an expression sees.
pub const STOP: Flags = 256;
/// Member of the set of CJK characters that DeepSeek splits off.
pub const CJK: Flags = 512;

pub const LETTER: Flags = UPPER | LOWER | UNCASED;

const PROPERTIES: [(&str, Flags); 9] = [
    (r"[\p{Lu}\p{Lt}]", UPPER),
    (r"\p{Ll}", LOWER),
    (r"[\p{Lm}\p{Lo}]", UNCASED),
    (r"\p{M}", MARK),
    (r"\p{N}", NUMBER),
    (r"\s", SPACE),
    (r"\p{P}", PUNCTUATION),
    (r"\p{S}", SYMBOL),
    // Written as DeepSeek writes it: Han, Hiragana, Katakana with their marks and signs.
    ("[一-龥\u{3040}-ゟ゠-ヿ]", CJK),
];

const NUM_CODE_POINTS: usize = 0x110000;
const BLOCK: usize = 256;

/// Classes of every code point.
pub struct ClassTable {
    block_of: Box<[u16]>,
    blocks: Vec<[Flags; BLOCK]>,
}

impl ClassTable {
    pub fn new() -> Self {
        Self::build(|_| false)
    }

    /// The table for tokenizers that split with `Digits`, which asks the standard library what is numeric.
    pub fn with_numeric_chars() -> Self {
        Self::build(char::is_numeric)
    }

    fn build(is_number: impl Fn(char) -> bool) -> Self {
        let mut flat = vec![0; NUM_CODE_POINTS];
        for (pattern, flag) in PROPERTIES {
            for (start, end) in class_ranges(pattern).expect("the patterns above are classes") {
                flat[start as usize..=end as usize].iter_mut().for_each(|flags| *flags |= flag);
            }
        }
        for c in ('\0'..=char::MAX).filter(|c| is_number(*c)) {
            flat[c as usize] |= NUMBER;
        }
        let mut blocks: Vec<[Flags; BLOCK]> = Vec::new();
        let mut block_of = Vec::with_capacity(NUM_CODE_POINTS / BLOCK);
        for chunk in flat.chunks_exact(BLOCK) {
            let found = blocks.iter().position(|block| block[..] == *chunk);
            block_of.push(found.unwrap_or(blocks.len()) as u16);
            if found.is_none() {
                blocks.push(chunk.try_into().expect("chunks have the size of a block"));
            }
        }
        Self { block_of: block_of.into(), blocks }
    }

    pub fn of(&self, code_point: u32) -> Flags {
        self.blocks[self.block_of[code_point as usize >> 8] as usize][code_point as usize & 255]
    }

    /// The classes and width in bytes of the character at `text[i]`; `(STOP, 0)` at the end of the text.
    ///
    /// `text` is valid UTF-8 and `i` a character boundary or past the end.
    #[inline]
    pub fn at(&self, text: &[u8], i: usize) -> (Flags, usize) {
        match text.get(i) {
            None => (STOP, 0),
            Some(&byte) if byte < 0x80 => (self.blocks[self.block_of[0] as usize][byte as usize], 1),
            Some(_) => {
                let (code_point, width) = decode(text, i);
                (self.of(code_point), width)
            }
        }
    }
}

/// The code point at `text[i]` and its width in bytes; `text` is valid UTF-8 and `i` a character boundary.
#[inline(always)]
pub fn decode(text: &[u8], i: usize) -> (u32, usize) {
    let tail = |byte: u8| (byte & 0x3f) as u32;
    match text[i..] {
        [lead @ 0..0x80, ..] => (lead as u32, 1),
        [lead @ 0x80..0xe0, a, ..] => ((lead as u32 & 0x1f) << 6 | tail(a), 2),
        [lead @ 0xe0..0xf0, a, b, ..] => ((lead as u32 & 0x0f) << 12 | tail(a) << 6 | tail(b), 3),
        [lead, a, b, c, ..] => ((lead as u32 & 0x07) << 18 | tail(a) << 12 | tail(b) << 6 | tail(c), 4),
        _ => unreachable!("the text is UTF-8, and a character begins here"),
    }
}

/// The ranges of a regular expression that is one character class (or one character); `None` if it is anything else.
pub fn class_ranges(pattern: &str) -> Option<Vec<(u32, u32)>> {
    hir_ranges(regex_syntax::parse(pattern).ok()?.kind())
}

/// The same for a parsed expression.
pub fn hir_ranges(kind: &HirKind) -> Option<Vec<(u32, u32)>> {
    match kind {
        HirKind::Class(Class::Unicode(class)) => {
            Some(class.ranges().iter().map(|r| (r.start() as u32, r.end() as u32)).collect())
        }
        HirKind::Class(Class::Bytes(class)) => {
            class.is_ascii().then(|| class.ranges().iter().map(|r| (r.start() as u32, r.end() as u32)).collect())
        }
        HirKind::Literal(literal) => {
            let mut chars = std::str::from_utf8(&literal.0).ok()?.chars();
            let c = chars.next()? as u32;
            chars.next().is_none().then(|| vec![(c, c)])
        }
        _ => None,
    }
}
