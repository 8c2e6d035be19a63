//! The fast engine against `tokenizers`: small tokenizers of every family, made here, and texts made to be hard.

use super::{FastTokenizer, Mark, Request, Scratch};
use proptest::prelude::*;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::slice::from_ref;
use std::sync::LazyLock;
use tokenizers::Tokenizer;

const SAMPLE: &str = "The cat's hat isn't hers; they'll say we've 12 or 1234567 reasons.\n\n    if (x == 0x1F) { return foo_bar(\"a/b\"); }\r\n\
    Привет, мир! Ça va déjà très bien. ἀγάπη 안녕하세요 반갑습니다 こんにちは世界 カタカナ・テスト 你好，世界。今天天气很好，我们去公园吧。\
    नमस्ते दुनिया 𝔘𝔫𝔦 👨‍👩‍👧‍👦 HTTPServer getElementById ÀÉÎ ǅ ʰ // --- ... $$$ \t\t x\u{3000}y <|im_start|>user\n<|im_end|> \
    the then there these other mother another thing nothing anything in on an and at it is as to of or for from\n";

/// Hard pieces of text: what the families' expressions treat in their own ways, and where Unicode bites.
const FRAGMENTS: &[&str] = &[
    "'s",
    "'S",
    "'ſ",
    "'t",
    "'RE",
    "'ve",
    "'Ve",
    "'m",
    "'ll",
    "'lL",
    "'d",
    "'",
    "''",
    "'x",
    "’s",
    " ",
    "  ",
    "   ",
    "\t",
    "\n",
    "\r",
    "\r\n",
    "\n\n",
    " \n",
    "\n ",
    "\u{b}",
    "\u{c}",
    "\u{85}",
    "\u{a0}",
    "\u{2028}",
    "\u{3000}",
    "\u{200b}",
    "\u{feff}",
    "\0",
    "\u{1}",
    "\u{4}",
    "\u{7f}",
    "\u{ad}",
    "\u{e000}",
    "a",
    "A",
    "ab",
    "Ab",
    "aB",
    "AB",
    "é",
    "É",
    "e\u{301}",
    "\u{301}",
    "\u{338}",
    ">\u{338}",
    "ß",
    "ſ",
    "ǅ",
    "ʰ",
    "ª",
    "Ω",
    "\u{2126}",
    "Å",
    "\u{212b}",
    "\u{212a}",
    "ﬁ",
    "1",
    "12",
    "123",
    "1234",
    "٣",
    "Ⅷ",
    "½",
    "²",
    "一",
    "〇",
    "①",
    "𝟙",
    "\u{11de0}",
    ".",
    ",",
    "!",
    "/",
    "\\",
    "_",
    "-",
    "--",
    "...",
    "/\n",
    "\n/",
    "./\n",
    "()",
    "$",
    "+",
    "=",
    "^",
    "`",
    "|",
    "~",
    "<",
    "<|",
    "€",
    "©",
    "“",
    "—",
    "。",
    "，",
    "、",
    "・",
    "゠",
    "ー",
    "你",
    "好",
    "你好",
    "世界",
    "龥",
    "龦",
    "㐀",
    "𠀀",
    "か",
    "が",
    "か\u{3099}",
    "\u{3099}",
    "カ",
    "각",
    "\u{1100}\u{1161}\u{11a8}",
    "\u{1100}",
    "\u{1161}",
    "가\u{11a8}",
    "क",
    "क\u{93c}",
    "\u{958}",
    "\u{9c7}\u{9be}",
    "ि",
    "ا",
    "\u{64b}",
    "א",
    "\u{5b0}",
    "ก",
    "ำ",
    "😀",
    "👨\u{200d}👩\u{200d}👧",
    "🏽",
    "❤\u{fe0f}",
    "🇩🇪",
    "\u{1b06}",
    "\u{1b05}\u{1b35}",
    "\u{10ffff}",
    "\u{378}",
    "<|im_start|>",
    "<|im_end|>",
    "<|im_end|",
    "[SEP]",
    "word",
    "<strip>",
    " <strip> ",
    "\n<left>",
    "<right>\t",
    "é\u{327}tok",
    "ｅ",
    "the",
    "The",
    "mother",
];

/// Every way to cut that the engine knows, as it stands in a tokenizer.json.
fn families() -> Vec<(&'static str, Value)> {
    let split = |pattern: &str| json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    let gpt2 = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let sequence = |parts: Vec<Value>| json!({"type": "Sequence", "pretokenizers": parts});
    let qwen2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
    let qwen3_5 = qwen2.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]");
    let llama3 = qwen2.replace(r"|\p{N}|", r"|\p{N}{1,3}|");
    let upper = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]";
    let lower = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]";
    let short = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?";
    let rest = r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
    let o200k = format!("{upper}*{lower}+{short}|{upper}+{lower}*{short}|{rest}");
    let minimax = json!({"type": "Split", "pattern": {"Regex": o200k}, "behavior": "Removed", "invert": true});
    let deepseek3 = "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+";
    let digits = json!({"type": "Digits", "individual_digits": true});
    let cjk = "[一-龥ࠀ-一가-퟿]+";
    vec![
        ("gpt2", gpt2.clone()),
        ("smollm", sequence(vec![digits.clone(), gpt2])),
        ("qwen2", sequence(vec![split(qwen2), bytes.clone()])),
        ("qwen3.5", sequence(vec![split(&qwen3_5), bytes.clone()])),
        ("llama3", sequence(vec![split(&llama3), bytes.clone()])),
        ("minimax", sequence(vec![minimax, bytes.clone()])),
        ("o200k", sequence(vec![split(&o200k), bytes.clone()])),
        (
            "deepseek3",
            sequence(vec![split(r"\p{N}{1,3}"), split("[一-龥\u{3040}-ゟ゠-ヿ]+"), split(deepseek3), bytes.clone()]),
        ),
        (
            "deepseek_coder",
            sequence(vec![
                split("[\r\n]"),
                split(r"\s?\p{L}+"),
                split(r"\s?\p{P}+"),
                split(cjk),
                digits.clone(),
                bytes.clone(),
            ]),
        ),
        (
            "deepseek_llm",
            sequence(vec![
                split("[\r\n]"),
                split(r"\s?[A-Za-zµÀ-ÖØ-öø-ƺͰ-ͳΆА-яａ-ｚ𐐀-𐑏]+"),
                split(r"\s?[!-/:-~！-／：-～‘-‟　-。]+"),
                split(r"\s+$"),
                split(cjk),
                digits,
                bytes,
            ]),
        ),
    ]
}

fn alphabet() -> Vec<char> {
    let printable = |byte: &u32| matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let mut next = 0x100..;
    (0..256).map(|byte| char::from_u32(if printable(&byte) { byte } else { next.next().unwrap() }).unwrap()).collect()
}

/// Merges learnt from `SAMPLE` by the plain algorithm, as (left, right) in the order learnt.
fn learn(num_merges: usize) -> Vec<(String, String)> {
    let letters = alphabet();
    let mut words: Vec<Vec<String>> = SAMPLE
        .split_inclusive(' ')
        .map(|word| word.bytes().map(|byte| letters[byte as usize].to_string()).collect())
        .collect();
    let mut merges = Vec::new();
    for _ in 0..num_merges {
        let mut counts: HashMap<(&str, &str), usize> = HashMap::new();
        for word in &words {
            word.windows(2).for_each(|two| *counts.entry((&two[0], &two[1])).or_default() += 1);
        }
        let Some((pair, _)) = counts.iter().max_by_key(|(pair, count)| (**count, **pair)) else { break };
        let pair = (pair.0.to_owned(), pair.1.to_owned());
        for word in &mut words {
            let mut i = 0;
            while i + 1 < word.len() {
                if word[i] == pair.0 && word[i + 1] == pair.1 {
                    let right = word.remove(i + 1);
                    word[i].push_str(&right);
                }
                i += 1;
            }
        }
        merges.push(pair);
    }
    merges
}

/// What varies besides the family.
#[derive(Clone, Copy, Debug)]
struct Variant {
    nfc: bool,
    ignore_merges: bool,
    merges_as_pairs: bool,
    /// Merges in another order than learnt: tokens that no merge reaches, pairs of several ranks for one token.
    shuffled: bool,
    without_some_bytes: bool,
}

const VARIANTS: [Variant; 4] = [
    Variant { nfc: true, ignore_merges: false, merges_as_pairs: true, shuffled: false, without_some_bytes: false },
    Variant { nfc: false, ignore_merges: true, merges_as_pairs: false, shuffled: true, without_some_bytes: false },
    Variant { nfc: true, ignore_merges: true, merges_as_pairs: true, shuffled: true, without_some_bytes: true },
    Variant { nfc: false, ignore_merges: false, merges_as_pairs: false, shuffled: true, without_some_bytes: true },
];

fn tokenizer_json(pre_tokenizer: &Value, variant: Variant) -> String {
    let left_out = ['\u{104}', '\u{106}'];
    let mut vocab: Vec<String> = alphabet()
        .iter()
        .filter(|c| !(variant.without_some_bytes && left_out.contains(c)))
        .map(char::to_string)
        .collect();
    let mut merges = learn(600);
    let mut tokens: Vec<String> = merges.iter().map(|(a, b)| format!("{a}{b}")).collect();
    if variant.shuffled {
        // Every other way to split a token into two tokens is a merge as well, and the order is arbitrary but fixed.
        let known: std::collections::HashSet<String> = tokens.iter().chain(&vocab).cloned().collect();
        for token in &tokens {
            for (i, _) in token.char_indices().skip(1) {
                let pair = (token[..i].to_owned(), token[i..].to_owned());
                if known.contains(&pair.0) && known.contains(&pair.1) && !merges.contains(&pair) {
                    merges.push(pair);
                }
            }
        }
        merges.sort_by_key(|(a, b)| {
            format!("{a} {b}").bytes().fold(7u32, |sum, byte| sum.wrapping_mul(16777619) ^ byte as u32)
        });
        tokens.push("Ġreachednever".to_owned());
    }
    tokens.sort();
    tokens.dedup();
    vocab.extend(tokens);
    vocab.push("<|im_end|>".to_owned());
    let vocab: serde_json::Map<String, Value> =
        vocab.into_iter().enumerate().map(|(id, token)| (token, json!(id))).collect();
    let merges: Vec<Value> = merges
        .iter()
        .map(|(a, b)| if variant.merges_as_pairs { json!([a, b]) } else { json!(format!("{a} {b}")) })
        .collect();
    let flags = [
        ("<|im_start|>", "special"),
        ("<|im_end|>", "special"),
        ("<|im", ""),
        ("[SEP]", "normalized"),
        ("word", "single_word normalized"),
        ("<strip>", "lstrip rstrip"),
        ("<left>", "lstrip normalized"),
        ("<right>", "rstrip"),
        ("é\u{327}tok", "normalized"),
        ("你好", ""),
    ];
    let added: Vec<Value> = flags
        .iter()
        .enumerate()
        .map(|(i, (content, flags))| {
            let has = |flag: &str| flags.split(' ').any(|has| has == flag);
            json!({"id": 5000 + i, "content": content, "single_word": has("single_word"), "lstrip": has("lstrip"),
                "rstrip": has("rstrip"), "normalized": has("normalized"), "special": has("special")})
        })
        .collect();
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
        "normalizer": if variant.nfc { json!({"type": "NFC"}) } else { Value::Null },
        "pre_tokenizer": pre_tokenizer,
        "post_processor": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": false, "use_regex": true},
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": "", "end_of_word_suffix": null,
            "fuse_unk": false, "byte_fallback": false, "ignore_merges": variant.ignore_merges, "vocab": vocab, "merges": merges}
    })
    .to_string()
}

struct Pair {
    name: String,
    fast: FastTokenizer,
    reference: Tokenizer,
}

static PAIRS: LazyLock<Vec<Pair>> = LazyLock::new(|| {
    let mut pairs = Vec::new();
    for (family, pre_tokenizer) in families() {
        for variant in VARIANTS {
            let json = tokenizer_json(&pre_tokenizer, variant);
            let fast = FastTokenizer::from_json(json.as_bytes()).unwrap_or_else(|reason| panic!("{family}: {reason}"));
            let reference = Tokenizer::from_bytes(json.as_bytes()).unwrap();
            pairs.push(Pair { name: format!("{family} {variant:?}"), fast, reference });
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
        for Pair { name, fast, reference } in PAIRS.iter() {
            let mut scratch = Scratch::with_cache_bytes(4096);
            for text in &texts {
                let mut ids = Vec::new();
                fast.encode(text, &mut scratch, &mut ids);
                let expected = reference.encode_fast(text.as_str(), false).unwrap();
                prop_assert_eq!(expected.get_ids(), &ids[..], "{} {:?}", name, text);
            }
        }
    }

    /// Ends ascend to the end of the text, and a mark names the token between whose ends its place lies.
    #[test]
    fn marks_agree_with_ends(text in text(), places in proptest::collection::vec(0..200usize, 0..6)) {
        let mut places: Vec<usize> = places.into_iter().map(|place| place.min(text.len())).collect();
        places.sort();
        for Pair { name, fast, .. } in PAIRS.iter().filter(|pair| pair.name.contains("without_some_bytes: false")) {
            let mut scratch = Scratch::with_cache_bytes(4096);
            let (mut ids, mut ends, mut same_ids, mut marks) = (vec![7], vec![], vec![7], vec![]);
            fast.encode_ends(&text, &mut scratch, &mut ids, &mut ends);
            prop_assert_eq!(ids.len() - 1, ends.len());
            prop_assert!(ends.is_sorted(), "{} {:?} {:?}", name, &text, &ends);
            prop_assert_eq!(text.len(), ends.last().map_or(0, |end| *end as usize));
            fast.encode_request(&text, Request { marks: &places, plain: &[] }, &mut scratch, &mut same_ids, &mut marks);
            prop_assert_eq!(&ids, &same_ids);
            prop_assert_eq!(places.len(), marks.len());
            for (place, mark) in places.iter().zip(&marks) {
                let token = ends.partition_point(|end| *end as usize <= *place);
                let start = token.checked_sub(1).map_or(0, |before| ends[before] as usize);
                let inside = token < ends.len() && start < *place;
                // Inside a stretch that NFC changed ends say less than marks: only the stretch as a whole has a place.
                let changed = fast.is_nfc() && !unicode_normalization_alignments::is_nfc(&text);
                prop_assert!(changed || *mark == Mark { token: token + 1, inside }, "{} {:?} {} {:?} {:?}", name, &text, place, mark, &ends);
            }
        }
    }

    /// In plain ranges no added token is recognised, outside of them all are: as if the parts were looked at alone.
    #[test]
    fn plain_ranges_hide_added_tokens(before in text(), user in text(), after in text()) {
        for Pair { name, fast, .. } in PAIRS.iter().filter(|pair| pair.name.contains("gpt2") && pair.name.contains("nfc: false")) {
            let mut scratch = Scratch::default();
            let text = format!("{before}<|im_start|>{user}<|im_end|>{after}");
            let start = before.len() + "<|im_start|>".len();
            let (mut ids, mut parts) = (Vec::new(), Vec::new());
            let plain = start..start + user.len();
            fast.encode_request(&text, Request { marks: &[], plain: from_ref(&plain) }, &mut scratch, &mut ids, &mut Vec::new());
            fast.encode(&format!("{before}<|im_start|>"), &mut scratch, &mut parts);
            let whole = 0..user.len();
            fast.encode_request(&user, Request { marks: &[], plain: from_ref(&whole) }, &mut scratch, &mut parts, &mut Vec::new());
            fast.encode(&format!("<|im_end|>{after}"), &mut scratch, &mut parts);
            prop_assert_eq!(&parts, &ids, "{} {:?}", name, text);
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
    for Pair { name, fast, reference } in PAIRS.iter() {
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
    for Pair { name, fast, reference } in PAIRS.iter().chain(PAIRS.iter()) {
        let mut ids = Vec::new();
        fast.encode(SAMPLE, &mut scratch, &mut ids);
        assert_eq!(reference.encode_fast(SAMPLE, false).unwrap().get_ids(), ids, "{name}");
    }
}

/// Time stays near linear on one endless pretoken, and the ids stay right.
#[test]
fn an_endless_pretoken_is_no_trap() {
    let Pair { fast, reference, .. } = &PAIRS[0];
    let word = "motherthing".repeat(30_000);
    let mut ids = Vec::new();
    let start = std::time::Instant::now();
    fast.encode(&word, &mut Scratch::default(), &mut ids);
    assert!(start.elapsed().as_secs() < 5);
    assert_eq!(reference.encode_fast(word.as_str(), false).unwrap().get_ids(), ids);
}
