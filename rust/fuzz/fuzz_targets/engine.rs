//! The fast engine gives the ids and label tokens of `tokenizers`, for any text.
//!
//! The tokenizers are the small ones of the engine's own tests, one for each family and variant, and those in the
//! directories that `SFT_FAST_FUZZ_TOKENIZERS` names (separated by `:`).
//!
//! The first two bytes of the input choose the tokenizer and how the others become text: as UTF-8, as code points (three
//! bytes each), or as a list of hard fragments.

#![no_main]

use std::path::Path;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use sft_fast_core::tokenize::control::Stretch;
use sft_fast_core::tokenize::fast::FastTokenizer;
use sft_fast_core::tokenize::reference::ReferenceTokenizer;
use sft_fast_core::tokenize::{Input, Tokenizer, Tokens};

#[path = "../../core/src/tokenize/fast/families.rs"]
mod families;

struct Pair {
    fast: FastTokenizer,
    reference: ReferenceTokenizer,
    /// Where a byte has no token, the offsets of `tokenizers` are wrong behind it, and so are its label tokens.
    has_all_bytes: bool,
}

impl Pair {
    fn new(json: &[u8]) -> Self {
        let fast = FastTokenizer::from_json(json).unwrap_or_else(|reason| panic!("{reason}"));
        let reference = ReferenceTokenizer::from_json(json, Path::new("tokenizer.json"), String::new());
        let content: serde_json::Value = serde_json::from_slice(json).expect("it was read before");
        let letters = families::alphabet();
        // The others are in no UTF-8 text.
        let has_all_bytes = (0..=0xF4)
            .filter(|byte| !matches!(byte, 0xC0 | 0xC1))
            .all(|byte: usize| !content["model"]["vocab"][letters[byte].to_string()].is_null());
        Self { fast, reference: reference.expect("tokenizers reads what the fast engine reads"), has_all_bytes }
    }
}

static PAIRS: LazyLock<Vec<Pair>> = LazyLock::new(|| {
    let mut pairs = Vec::new();
    for (_, pre_tokenizer) in families::families() {
        for variant in families::VARIANTS {
            pairs.push(Pair::new(families::tokenizer_json(&pre_tokenizer, variant).as_bytes()));
        }
    }
    for directory in std::env::var("SFT_FAST_FUZZ_TOKENIZERS").unwrap_or_default().split(':').filter(|s| !s.is_empty())
    {
        let json = std::fs::read(Path::new(directory).join("tokenizer.json")).expect("a model directory");
        pairs.push(Pair::new(&json));
    }
    pairs
});

fn text(form: u8, bytes: &[u8]) -> String {
    match form % 3 {
        0 => String::from_utf8_lossy(bytes).into_owned(),
        1 => {
            let number = |three: &[u8]| u32::from_le_bytes([three[0], three[1], three[2], 0]) % 0x11_0000;
            bytes.chunks_exact(3).filter_map(|three| char::from_u32(number(three))).collect()
        }
        _ => bytes.iter().map(|&byte| families::FRAGMENTS[byte as usize % families::FRAGMENTS.len()]).collect(),
    }
}

fuzz_target!(init: { LazyLock::force(&PAIRS); }, |data: &[u8]| {
    let [number, form, bytes @ ..] = data else { return };
    let pair = &PAIRS[*number as usize % PAIRS.len()];
    let text = text(*form, bytes);
    let cut = |part: usize| (part * text.len() / 5..).find(|&at| text.is_char_boundary(at)).expect("the end is one");
    let spans = [cut(1)..cut(2), cut(3)..cut(4)];

    // In every other input, the spans are the record's own text too, and spell no control token.
    let (mut stretches, mut plain) = (Vec::new(), Vec::new());
    if form / 3 % 2 == 1 {
        let of_record = spans.iter().filter(|span| !span.is_empty()).cloned();
        stretches.extend(of_record.map(|range| Stretch { range, is_mixed: false }));
        if pair.fast.control_tokens().find(&text, &stretches, &mut plain).is_err() {
            return;
        }
    }
    let input = Input { text: &text, spans: &spans, plain: &plain, stretches: &stretches };

    let (mut found, mut expected) = (Tokens::default(), Tokens::default());
    let reference = pair.reference.encoder().encode(input, &mut expected);
    let mut encoder = pair.fast.encoder();
    for _ in 0..2 {
        // Once with an empty cache, once with a full one.
        let result = encoder.encode(input, &mut found);
        assert_eq!(reference.is_ok(), result.is_ok(), "tokenizer {number}, {input:?}: {reference:?}, {result:?}");
        if result.is_ok() {
            assert_eq!(expected.ids, found.ids, "tokenizer {number}, {input:?}");
            assert!(!pair.has_all_bytes || expected.runs == found.runs, "tokenizer {number}, {input:?}");
        }
    }
});
