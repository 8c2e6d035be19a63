//! Where no token can cross: cutting long words of CJK (and other three-byte scripts) into pieces that repeat.
//!
//! Languages that write without spaces make pretokens as long as a clause, which hardly ever repeat, so a cache does not help.
//! But merges only ever make tokens of the vocabulary: between two characters that no token of the vocabulary has side by side
//! (be it in whole or in part: tokens may begin or end inside a character) nothing merges, and the two sides can be encoded
//! apart. Exactly: a merge across the place would make a token that holds the last byte of the one and the first of the other.
//!
//! The answer may err on the side of "may cross", which costs a longer piece and nothing else. So pairs of characters go into a
//! bit filter by hash. A token that ends (begins) within a character stands for all characters that begin (end) so; where both
//! sides are partial, which is rare, a small table by the bytes next to the place has it.

use super::classes::decode;

const FILTER_BITS: u32 = 20;

/// Knows between which characters of three bytes (U+0800 to U+FFFF) a token may lie.
pub struct Cuts {
    /// Pairs of characters, by hash.
    pairs: Box<[u64]>,
    /// Six bits of the last byte before the place and four of the first after it, then six of the second after it.
    partial: Box<[u64]>,
}

impl Cuts {
    /// `tokens` are the byte strings of the whole vocabulary.
    pub fn new<'a>(tokens: impl Iterator<Item = &'a [u8]>) -> Self {
        let mut cuts = Self { pairs: vec![0; 1 << (FILTER_BITS - 6)].into(), partial: vec![0; 1 << 10].into() };
        for token in tokens {
            for place in 1..token.len() {
                if token[place - 1] & 0xc0 == 0x80 && token[place] & 0xf0 == 0xe0 {
                    cuts.add(&token[..place], &token[place..]);
                }
            }
        }
        cuts
    }

    /// A token holds `before` and `after` side by side; `before` ends with a character's last byte, `after` starts with a first.
    fn add(&mut self, before: &[u8], after: &[u8]) {
        let tail = before.iter().rev().take_while(|byte| *byte & 0xc0 == 0x80).count();
        let lead = before.len().checked_sub(tail + 1).map(|at| before[at]);
        // All characters that end as `before` does: those of other lengths than three bytes are never asked for.
        let fixed = |k: usize| (before[before.len() - k] & 0x3f) as u32;
        let lefts: Vec<u32> = match (lead, tail) {
            (Some(lead @ 0xe0..0xf0), 2) => vec![(lead as u32 & 0x0f) << 12 | fixed(2) << 6 | fixed(1)],
            (None, 2) => (0..16).map(|high| high << 12 | fixed(2) << 6 | fixed(1)).collect(),
            (None, 1) => (0..1024).map(|high| high << 6 | fixed(1)).collect(),
            _ => return,
        };
        let bits = |k: usize| (after[k] & 0x3f) as u32;
        let high = (after[0] as u32 & 0x0f) << 12;
        let rights: Vec<u32> = match after.len() {
            1 => (high..high + 4096).collect(),
            2 => (high | bits(1) << 6..(high | bits(1) << 6) + 64).collect(),
            _ => vec![high | bits(1) << 6 | bits(2)],
        };
        if lefts.len() == 1024 && rights.len() > 1 {
            rights.iter().for_each(|right| {
                let (word, bit) = partial_place(lefts[0], *right);
                self.partial[word] |= 1 << bit;
            });
            return;
        }
        for left in &lefts {
            for right in &rights {
                let (word, bit) = pair_place(*left, *right);
                self.pairs[word] |= 1 << bit;
            }
        }
    }

    /// Whether a token may hold the end of `left` and the start of `right`, characters of three bytes.
    #[inline]
    fn may_cross(&self, left: u32, right: u32) -> bool {
        let (word, bit) = pair_place(left, right);
        let (partial_word, partial_bit) = partial_place(left, right);
        (self.pairs[word] >> bit | self.partial[partial_word] >> partial_bit) & 1 == 1
    }

    /// The first place after `start` where `text[start..end]`, a pretoken or the rest of one, can be cut; `end` if there is none.
    pub fn next(&self, text: &[u8], start: usize, end: usize) -> usize {
        let mut i = start;
        let mut left = None;
        while i < end {
            let (code_point, width) = decode(text, i);
            if width == 3 {
                if left.is_some_and(|left| !self.may_cross(left, code_point)) {
                    return i;
                }
                left = Some(code_point);
            } else {
                left = None;
            }
            i += width;
        }
        end
    }
}

#[inline]
fn pair_place(left: u32, right: u32) -> (usize, u32) {
    let hash = (left << 16 | right).wrapping_mul(0x9e37_79b1) >> (32 - FILTER_BITS);
    ((hash >> 6) as usize, hash & 63)
}

#[inline]
fn partial_place(left: u32, right: u32) -> (usize, u32) {
    (((left & 0x3f) << 4 | right >> 12) as usize, right >> 6 & 0x3f)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// No token of the vocabulary lies across a cut.
        #[test]
        fn no_token_crosses(
            tokens in proptest::collection::vec(("[你好世界가각かナ]{1,4}", 0..3usize, 0..3usize), 0..12),
            text in "[a你好世界가각かナé]{0,30}",
        ) {
            let tokens: Vec<Vec<u8>> =
                tokens.iter().map(|(token, from, to)| token.as_bytes().get(*from..token.len() - to).unwrap_or_default().to_vec()).collect();
            let cuts = Cuts::new(tokens.iter().map(|token| &token[..]));
            let text = text.as_bytes();
            let mut start = 0;
            while start < text.len() {
                let cut = cuts.next(text, start, text.len());
                prop_assert!(cut > start);
                for token in tokens.iter().filter(|token| !token.is_empty() && cut < text.len()) {
                    for at in (cut + 1).saturating_sub(token.len())..cut {
                        prop_assert!(!text[at..].starts_with(token), "{token:?} at {at} across {cut}");
                    }
                }
                start = cut;
            }
        }
    }

    /// Characters that no token joins are cut apart, those that one joins are not.
    #[test]
    fn cuts_where_it_can() {
        let cuts = Cuts::new(["你好".as_bytes(), "世界".as_bytes()].into_iter());
        let text = "你好世界".as_bytes();
        assert_eq!(6, cuts.next(text, 0, 12));
        assert_eq!(12, cuts.next(text, 6, 12));
    }
}
