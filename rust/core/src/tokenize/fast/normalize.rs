//! NFC, and the proof that a text needs none.
//!
//! Almost every text is in NFC already. A code point is *settled* if it is a starter, is its own NFC and never composes with what
//! stands before it: NFC leaves a text of settled code points alone, and treats the stretches between them one by one. So a text
//! is scanned for unsettled code points, and only the stretch around one (from the settled code point before it to the next) is
//! normalised. The tables are those of the crate that `tokenizers` uses (Unicode 9): newer tables would give other ids.

use super::classes::decode;
use std::ops::Range;
use unicode_normalization_alignments::UnicodeNormalization;
use unicode_normalization_alignments::char::{canonical_combining_class, decompose_canonical};

/// Beyond this nothing is unsettled.
const LIMIT: usize = 0x30000;
/// Where code points that decompose, combine or compose can be; a test looks at all others.
const CANDIDATES: [Range<u32>; 7] = [
    0xc0..0x3400,
    0xa000..0xac00,
    0xd7a4..0xd800,
    0xf900..0x12000,
    0x16000..0x17000,
    0x1b000..0x1f000,
    0x2f800..0x2fa20,
];
/// Vowels and final consonants that compose with a Hangul syllable before them.
const HANGUL_FOLLOWERS: [Range<u32>; 2] = [0x1161..0x1176, 0x11a8..0x11c3];

/// Normalises to NFC.
pub struct Nfc {
    unsettled: Box<[u64]>,
    /// Bytes that do not lead an unsettled code point; continuation bytes are among them.
    settled_lead: [bool; 256],
}

/// A text that NFC changed.
#[derive(Debug, PartialEq)]
pub struct Normalized {
    pub text: String,
    /// Every stretch that changed, in order.
    pub changes: Vec<Change>,
}

/// A stretch of the original text and what became of it.
#[derive(Debug, PartialEq)]
pub struct Change {
    pub original: Range<usize>,
    pub normalized: Range<usize>,
    /// Where each character of the normalised stretch begins, and where the original character begins that `tokenizers`
    /// counts it to: of those composed into one the first, for those that one was decomposed into that one.
    characters: Vec<(usize, usize)>,
}

impl Nfc {
    pub fn new() -> Self {
        let mut unsettled = vec![0u64; LIMIT / 64].into_boxed_slice();
        let mut mark = |code_point: u32| unsettled[code_point as usize / 64] |= 1 << (code_point % 64);
        for c in CANDIDATES.into_iter().flatten().filter_map(char::from_u32) {
            if canonical_combining_class(c) != 0 || !std::iter::once(c).nfc().map(|(c, _)| c).eq([c]) {
                mark(c as u32);
            }
            let mut is_first = true;
            decompose_canonical(c, |part| {
                if !std::mem::take(&mut is_first) {
                    mark(part as u32);
                }
            });
        }
        HANGUL_FOLLOWERS.into_iter().flatten().for_each(mark);
        let mut settled_lead = [true; 256];
        for code_point in (0..LIMIT).filter(|c| unsettled[c / 64] >> (c % 64) & 1 == 1) {
            if let Some(c) = char::from_u32(code_point as u32) {
                settled_lead[c.encode_utf8(&mut [0; 4]).as_bytes()[0] as usize] = false;
            }
        }
        Self { unsettled, settled_lead }
    }

    fn is_settled(&self, code_point: u32) -> bool {
        self.unsettled.get(code_point as usize / 64).is_none_or(|word| word >> (code_point % 64) & 1 == 0)
    }

    /// The place of the first unsettled code point at or after `i`.
    fn find_unsettled(&self, text: &[u8], mut i: usize) -> Option<usize> {
        while i < text.len() {
            let end = text.len().min(i + 32);
            if text[i..end].is_ascii() {
                i = end;
                continue;
            }
            while i < end {
                if self.settled_lead[text[i] as usize] {
                    i += 1;
                    continue;
                }
                let (code_point, width) = decode(text, i);
                if !self.is_settled(code_point) {
                    return Some(i);
                }
                i += width;
            }
        }
        None
    }

    /// The NFC of `text`, or `None` if that is `text` itself.
    pub fn normalize(&self, text: &str) -> Option<Normalized> {
        let mut normalized = Normalized { text: String::new(), changes: Vec::new() };
        let (mut done, mut i) = (0, 0);
        while let Some(found) = self.find_unsettled(text.as_bytes(), i) {
            let start = text[i..found].char_indices().next_back().map_or(found, |(offset, _)| i + offset);
            let settled = text[found..].char_indices().find(|(_, c)| self.is_settled(*c as u32));
            let end = settled.map_or(text.len(), |(offset, _)| found + offset);
            let stretch = &text[start..end];
            if !stretch.nfc().map(|(c, _)| c).eq(stretch.chars()) {
                normalized.text.push_str(&text[done..start]);
                normalized.push(stretch, start);
                done = end;
            }
            i = end;
        }
        if normalized.changes.is_empty() {
            return None;
        }
        normalized.text.push_str(&text[done..]);
        Some(normalized)
    }
}

impl Normalized {
    /// Appends the NFC of `stretch`, which begins at `start` of the original text.
    fn push(&mut self, stretch: &str, start: usize) {
        let normalized_start = self.text.len();
        let mut characters = Vec::new();
        let mut originals = stretch.char_indices().map(|(at, _)| start + at).peekable();
        let mut last = start;
        for (c, num_added) in stretch.nfc() {
            // 1 for a character that was not there, else minus the number of characters that vanished behind it.
            let mut origin = last;
            if num_added <= 0 {
                origin = *originals.peek().unwrap_or(&last);
                last = originals.by_ref().take(1 + num_added.unsigned_abs()).last().unwrap_or(last);
            }
            characters.push((self.text.len(), origin));
            self.text.push(c);
        }
        let original = start..start + stretch.len();
        self.changes.push(Change { original, normalized: normalized_start..self.text.len(), characters });
    }

    /// Where the character at byte `at` of the original text went; what is no more counts to the character behind it.
    pub fn place(&self, at: usize) -> usize {
        let after = self.changes.partition_point(|change| change.original.start <= at);
        match after.checked_sub(1).map(|last| &self.changes[last]) {
            None => at,
            Some(change) if at < change.original.end => {
                let first = change.characters.iter().find(|(_, origin)| *origin >= at);
                first.map_or(change.normalized.end, |(place, _)| *place)
            }
            Some(change) => at - change.original.end + change.normalized.end,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A settled code point is a starter, its own NFC, and no part but the first of any decomposition.
    #[test]
    fn settled_code_points_stand_alone() {
        let nfc = Nfc::new();
        let mut num_unsettled = 0;
        for c in (0..=char::MAX as u32).filter_map(char::from_u32) {
            if nfc.is_settled(c as u32) {
                assert_eq!(0, canonical_combining_class(c), "{c:?}");
                assert!(std::iter::once(c).nfc().map(|(c, _)| c).eq([c]), "{c:?}");
            } else {
                num_unsettled += 1;
            }
            let mut parts = Vec::new();
            decompose_canonical(c, |part| parts.push(part));
            for part in &parts[1..] {
                assert!(!nfc.is_settled(*part as u32), "{part:?} in {c:?}");
            }
        }
        assert!((1000..3000).contains(&num_unsettled), "{num_unsettled}");
    }

    proptest! {
        /// Normalising stretch by stretch gives what normalising the whole gives, and places lead there.
        #[test]
        fn stretches_equal_the_whole(text in "[a>\u{300}\u{301}\u{323}\u{338}é\u{1e9b}\u{1100}\u{1161}\u{11a8}각가\u{2126}\u{958}\u{3099}か好\u{344} ]{0,24}|\\PC{0,12}") {
            let whole: String = text.nfc().map(|(c, _)| c).collect();
            match Nfc::new().normalize(&text) {
                None => prop_assert_eq!(&text, &whole),
                Some(normalized) => {
                    prop_assert_ne!(&text, &whole);
                    prop_assert_eq!(&normalized.text, &whole);
                    for change in &normalized.changes {
                        prop_assert_eq!(change.normalized.start, normalized.place(change.original.start));
                        prop_assert_eq!(change.normalized.end, normalized.place(change.original.end));
                    }
                    prop_assert_eq!(whole.len(), normalized.place(text.len()));
                }
            }
        }
    }
}
