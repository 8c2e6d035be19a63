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
    fn new(json: &[u8], has_all_bytes: bool) -> Self {
        let fast = FastTokenizer::from_json(json).unwrap_or_else(|reason| panic!("{reason}"));
        let reference = ReferenceTokenizer::from_json(json, Path::new("tokenizer.json"), String::new());
        Self { fast, reference: reference.expect("tokenizers reads what the fast engine reads"), has_all_bytes }
    }
}

static PAIRS: LazyLock<Vec<Pair>> = LazyLock::new(|| {
    let mut pairs = Vec::new();
    for (_, pre_tokenizer) in families::families() {
        for variant in families::VARIANTS {
            let json = families::tokenizer_json(&pre_tokenizer, variant);
            pairs.push(Pair::new(json.as_bytes(), !variant.without_some_bytes));
        }
    }
    for directory in std::env::var("SFT_FAST_FUZZ_TOKENIZERS").unwrap_or_default().split(':').filter(|s| !s.is_empty())
    {
        let json = std::fs::read(Path::new(directory).join("tokenizer.json")).expect("a model directory");
        pairs.push(Pair::new(&json, true));
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

fuzz_target!(|data: &[u8]| {
    let [number, form, bytes @ ..] = data else { return };
    let pair = &PAIRS[*number as usize % PAIRS.len()];
    let text = text(*form, bytes);
    let cut = |part: usize| (part * text.len() / 5..).find(|&at| text.is_char_boundary(at)).expect("the end is one");
    let spans = [cut(1)..cut(2), cut(3)..cut(4)];
    let (mut found, mut expected) = (Tokens::default(), Tokens::default());
    let input = Input { text: &text, spans: &spans, ..Input::default() };
    pair.reference.encoder().encode(input, &mut expected).expect("any text can be encoded");
    let mut encoder = pair.fast.encoder();
    for _ in 0..2 {
        // Once with an empty cache, once with a full one.
        encoder.encode(input, &mut found).expect("any text can be encoded");
        assert_eq!(expected.ids, found.ids, "tokenizer {number}, {text:?}");
        assert!(!pair.has_all_bytes || expected.runs == found.runs, "tokenizer {number}, {spans:?} of {text:?}");
    }
});
