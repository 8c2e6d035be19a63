//! Small tokenizers of every family that the fast engine knows, and texts made to be hard for them: for its tests and for
//! fuzzing, which includes this file.

use serde_json::{Value, json};
use std::collections::HashMap;

/// What the small tokenizers learn from.
pub const SAMPLE: &str = "The cat's hat isn't hers; they'll say we've 12 or 1234567 reasons.\n\n    if (x == 0x1F) { return foo_bar(\"a/b\"); }\r\n\
    Привет, мир! Ça va déjà très bien. ἀγάπη 안녕하세요 반갑습니다 こんにちは世界 カタカナ・テスト 你好，世界。今天天气很好，我们去公园吧。\
    नमस्ते दुनिया 𝔘𝔫𝔦 👨‍👩‍👧‍👦 HTTPServer getElementById ÀÉÎ ǅ ʰ // --- ... $$$ \t\t x\u{3000}y <|im_start|>user\n<|im_end|> \
    the then there these other mother another thing nothing anything in on an and at it is as to of or for from\n";

/// Hard pieces of text: what the families' expressions treat in their own ways, and where Unicode bites.
pub const FRAGMENTS: &[&str] = &[
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
pub fn families() -> Vec<(&'static str, Value)> {
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

/// The letter of each byte.
pub fn alphabet() -> Vec<char> {
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
pub struct Variant {
    pub nfc: bool,
    pub ignore_merges: bool,
    pub merges_as_pairs: bool,
    /// Merges in another order than learnt: tokens that no merge reaches, pairs of several ranks for one token.
    pub shuffled: bool,
    pub without_some_bytes: bool,
}

/// Together they have everything that varies.
pub const VARIANTS: [Variant; 4] = [
    Variant { nfc: true, ignore_merges: false, merges_as_pairs: true, shuffled: false, without_some_bytes: false },
    Variant { nfc: false, ignore_merges: true, merges_as_pairs: false, shuffled: true, without_some_bytes: false },
    Variant { nfc: true, ignore_merges: true, merges_as_pairs: true, shuffled: true, without_some_bytes: true },
    Variant { nfc: false, ignore_merges: false, merges_as_pairs: false, shuffled: true, without_some_bytes: true },
];

/// A tokenizer.json.
pub fn tokenizer_json(pre_tokenizer: &Value, variant: Variant) -> String {
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
