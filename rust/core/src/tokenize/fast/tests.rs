//! The fast engine against `tokenizers`: the small tokenizers of [`families`](super::families), and hard texts.

use super::families::{FRAGMENTS, SAMPLE, VARIANTS, families, tokenizer_json};
use super::{FastTokenizer, Scratch};
use crate::tokenize::control::{Stretch, is_control};
use crate::tokenize::reference::{ReferenceTokenizer, label_runs};
use crate::tokenize::{Input, Tokenizer as _, Tokens};
use proptest::prelude::*;
use serde_json::{Value, json};
use std::path::Path;
use std::sync::LazyLock;
use tokenizers::Tokenizer;

struct Pair {
    name: String,
    fast: FastTokenizer,
    reference: Tokenizer,
    /// The other engine.
    slow: ReferenceTokenizer,
}

static PAIRS: LazyLock<Vec<Pair>> = LazyLock::new(|| {
    let mut pairs = Vec::new();
    for (family, pre_tokenizer) in families() {
        for variant in VARIANTS {
            let json = tokenizer_json(&pre_tokenizer, variant);
            let fast = FastTokenizer::from_json(json.as_bytes()).unwrap_or_else(|reason| panic!("{family}: {reason}"));
            let reference = Tokenizer::from_bytes(json.as_bytes()).unwrap();
            let slow = ReferenceTokenizer::from_json(json.as_bytes(), Path::new(""), String::new()).unwrap();
            pairs.push(Pair { name: format!("{family} {variant:?}"), fast, reference, slow });
        }
    }
    pairs
});

fn text() -> impl Strategy<Value = String> {
    let fragment = prop_oneof![
        8 => proptest::sample::select(FRAGMENTS).prop_map(str::to_owned),
        1 => any::<char>().prop_map(String::from),
        1 => proptest::sample::select(SAMPLE.split_inclusive(' ').collect::<Vec<_>>()).prop_map(str::to_owned),
        1 => (proptest::sample::select(FRAGMENTS), 1..70usize).prop_map(|(fragment, num)| fragment.repeat(num)),
    ];
    proptest::collection::vec(fragment, 0..24).prop_map(|fragments| fragments.concat())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: num_cases(), ..Default::default() })]

    /// Ids are those of `tokenizers`, whatever the text, the family and what the cache has seen before.
    #[test]
    fn ids_equal_the_reference(texts in proptest::collection::vec(text(), 1..4)) {
        for Pair { name, fast, reference, .. } in PAIRS.iter() {
            let mut scratch = Scratch::with_cache_bytes(4096);
            for text in &texts {
                let mut ids = Vec::new();
                fast.encode(text, &mut scratch, &mut ids);
                let expected = reference.encode_fast(text.as_str(), false).unwrap();
                prop_assert_eq!(expected.get_ids(), &ids[..], "{} {:?}", name, text);
            }
        }
    }

    /// The tokens that are trained on are those that `tokenizers` has bytes of the spans in. (Where a byte has no token, its
    /// offsets are wrong behind that byte.)
    #[test]
    fn label_runs_equal_the_reference(text in text(), cuts in proptest::collection::btree_set(0..200usize, 2..9)) {
        let cuts: Vec<usize> = cuts.into_iter().filter(|cut| text.is_char_boundary(*cut)).collect();
        let spans: Vec<_> = cuts.chunks_exact(2).map(|pair| pair[0]..pair[1]).collect();
        let is_whole = |pair: &&Pair| pair.name.contains("without_some_bytes: false");
        for Pair { name, fast, reference, .. } in PAIRS.iter().filter(is_whole) {
            let (mut tokens, mut expected) = (Tokens::default(), Vec::new());
            fast.encoder().encode(Input { text: &text, spans: &spans, ..Input::default() }, &mut tokens).unwrap();
            label_runs(reference.encode(text.as_str(), false).unwrap().get_offsets(), &spans, &mut expected);
            prop_assert_eq!(&expected, &tokens.runs, "{} {:?} {:?}", name, text, &spans);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: num_cases(), ..Default::default() })]

    /// Text that spells control tokens is encoded as ordinary text by both engines alike, wherever the record has it; the
    /// template's own control tokens stay, and no other comes to be.
    #[test]
    fn control_text_is_plain_with_both_engines(text in text(), cuts in proptest::collection::btree_set(0..200usize, 2..9)) {
        let cuts: Vec<usize> = cuts.into_iter().filter(|cut| text.is_char_boundary(*cut)).collect();
        let stretches: Vec<_> =
            cuts.chunks_exact(2).map(|pair| Stretch { range: pair[0]..pair[1], is_mixed: false }).collect();
        let spans: Vec<_> = stretches.iter().map(|stretch| stretch.range.clone()).collect();
        for Pair { name, fast, slow, reference } in PAIRS.iter() {
            let has_all_bytes = name.contains("without_some_bytes: false");
            let mut plain = Vec::new();
            if fast.control_tokens().find(&text, &stretches, &mut plain).is_err() {
                continue;
            }
            let input = Input { text: &text, spans: &spans, plain: &plain, stretches: &stretches };
            let (mut found, mut expected) = (Tokens::default(), Tokens::default());
            fast.encoder().encode(input, &mut found).unwrap();
            slow.encoder().encode(input, &mut expected).unwrap();
            prop_assert_eq!(&expected.ids, &found.ids, "{} {:?} {:?}", name, text, &plain);
            prop_assert!(!has_all_bytes || expected.runs == found.runs, "{} {:?} {:?}", name, text, &plain);

            let decoder = reference.get_added_tokens_decoder();
            let is_control = |id: &&u32| decoder.get(id).is_some_and(|token| is_control(&token.content, token.special));
            let num_kept = found.ids.iter().filter(is_control).count();
            let whole = reference.encode(text.as_str(), false).unwrap();
            let places = whole.get_ids().iter().zip(whole.get_offsets());
            let is_templates = |(_, place): &(&u32, &(usize, usize))| {
                !plain.iter().any(|range| range.start < place.1 && place.0 < range.end)
            };
            let expected = places.filter(|(id, _)| is_control(id)).filter(is_templates).count();
            prop_assert_eq!(expected, num_kept, "{} {:?} {:?}", name, text, &plain);
        }
    }
}

/// More cases where they are asked for.
fn num_cases() -> u32 {
    std::env::var("PROPTEST_CASES").ok().and_then(|num| num.parse().ok()).unwrap_or(40)
}

/// Each thing that the engine does not know is refused with its place in the file.
#[test]
fn refusals_name_the_part() {
    let (_, gpt2) = families().remove(0);
    let good: Value = serde_json::from_str(&tokenizer_json(&gpt2, VARIANTS[0])).unwrap();
    assert!(FastTokenizer::from_json(good.to_string().as_bytes()).is_ok());
    let mut old = good.clone();
    old["model"].as_object_mut().unwrap().remove("type");
    assert!(FastTokenizer::from_json(old.to_string().as_bytes()).is_ok(), "files without a type of model are BPE");
    let cases = [
        ("/normalizer", json!({"type": "NFKC"}), "normalizer.type = NFKC"),
        (
            "/normalizer",
            json!({"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}),
            "normalizer.normalizers[1].type = Lowercase",
        ),
        ("/pre_tokenizer", json!({"type": "Metaspace"}), "pre_tokenizer.type = Metaspace"),
        (
            "/pre_tokenizer",
            json!({"type": "Sequence", "pretokenizers": [{"type": "Digits"}, {"type": "Metaspace"}]}),
            "pre_tokenizer.pretokenizers[1].type = Metaspace",
        ),
        ("/pre_tokenizer/add_prefix_space", json!(true), "pre_tokenizer.add_prefix_space is not false"),
        ("/pre_tokenizer", json!({"type": "Digits"}), "pre_tokenizer does not end with ByteLevel"),
        ("/post_processor", json!({"type": "BertProcessing"}), "post_processor.type = BertProcessing"),
        ("/model/type", json!("Unigram"), "model.type = Unigram"),
        ("/model/dropout", json!(0.1), "model.dropout"),
        ("/model/byte_fallback", json!(true), "model.byte_fallback = true"),
        ("/model/end_of_word_suffix", json!("</w>"), "model.end_of_word_suffix = \"</w>\""),
        ("/model/merges/3", json!(["a", "qzq"]), "model.merges[3] names a token that the vocabulary lacks"),
    ];
    for (place, value, reason) in cases {
        let mut bad = good.clone();
        *bad.pointer_mut(place).unwrap() = value;
        let refusal =
            FastTokenizer::from_json(bad.to_string().as_bytes()).err().unwrap_or_else(|| panic!("{place} was taken"));
        assert_eq!(format!("not understood: {reason}"), refusal.to_string());
    }
}

/// Names and sizes are those of `tokenizers`.
#[test]
fn names_equal_the_reference() {
    for Pair { name, fast, reference, .. } in PAIRS.iter() {
        let largest = reference.get_vocab(true).into_values().max().unwrap();
        assert_eq!(largest + 1, fast.vocab_size(), "{name}");
        for (token, id) in reference.get_vocab(true) {
            assert_eq!(Some(id), fast.token_to_id(&token), "{name} {token}");
        }
        assert_eq!(None, fast.token_to_id("nothing of the kind"), "{name}");
    }
}

/// A scratch that served another tokenizer gives this one's ids.
#[test]
fn a_scratch_may_serve_several_tokenizers() {
    let mut scratch = Scratch::default();
    for Pair { name, fast, reference, .. } in PAIRS.iter().chain(PAIRS.iter()) {
        let mut ids = Vec::new();
        fast.encode(SAMPLE, &mut scratch, &mut ids);
        assert_eq!(reference.encode_fast(SAMPLE, false).unwrap().get_ids(), ids, "{name}");
    }
}

/// However much text is expected, and whenever that is said, the ids are the same.
#[test]
fn the_size_of_the_cache_changes_nothing() {
    let (_, pre_tokenizer) = families().into_iter().next().unwrap();
    let json = tokenizer_json(&pre_tokenizer, VARIANTS[0]);
    let (fast, Pair { reference, .. }) = (FastTokenizer::from_json(json.as_bytes()).unwrap(), &PAIRS[0]);
    for num_bytes in [0, 1 << 24, 100, u64::MAX] {
        fast.expect_bytes(num_bytes);
        let (mut scratch, mut ids) = (fast.scratch(), Vec::new());
        fast.encode(SAMPLE, &mut scratch, &mut ids);
        assert_eq!(reference.encode_fast(SAMPLE, false).unwrap().get_ids(), ids, "{num_bytes}");
    }
}

/// The ids of one endless pretoken are right, and come before a quadratic engine would be done with it.
#[test]
fn an_endless_pretoken_is_no_trap() {
    let Pair { fast, reference, .. } = &PAIRS[0];
    let word = "motherthing".repeat(30_000);
    let mut ids = Vec::new();
    fast.encode(&word, &mut Scratch::default(), &mut ids);
    assert_eq!(reference.encode_fast(word.as_str(), false).unwrap().get_ids(), ids);
}
