//! Reading a tokenizer.json, and refusing what the fast engine does not understand.
//!
//! Every part that can change the ids is checked; what is not known by name is refused with its place in the file, never guessed.
//! Left aside on purpose: the decoder, padding and truncation (no part in encoding a text), and a post-processor of the kinds that
//! only add special tokens or trim offsets (the engine adds none).

use super::super::control::{ControlTokens, is_control};
use super::added::{AddedToken, AddedTokens};
use super::bpe::{self, LEFT_OUT, Merges};
use super::classes::{ClassTable, Flags, LETTER, MARK};
use super::cuts::Cuts;
use super::normalize::Nfc;
use super::pretokenize::{PreTokenizer, Rules};
use super::stages::Stage;
use super::vocab::Vocab;
use foldhash::{HashMap, HashMapExt, HashSet, HashSetExt};
use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;
use std::borrow::Cow;
use std::fmt;

/// Why the fast engine does not take a tokenizer.
#[derive(Debug, Clone, PartialEq)]
pub struct NotUnderstood(pub String);

impl fmt::Display for NotUnderstood {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "not understood: {}", self.0)
    }
}

impl std::error::Error for NotUnderstood {}

type Result<T> = std::result::Result<T, NotUnderstood>;

fn refuse<T>(reason: impl Into<String>) -> Result<T> {
    Err(NotUnderstood(reason.into()))
}

/// The parts of an engine.
pub struct Parts {
    pub raw_added: AddedTokens,
    pub normalized_added: AddedTokens,
    pub control: ControlTokens,
    pub nfc: Option<Nfc>,
    pub pretokenizer: PreTokenizer,
    pub merges: Merges,
    /// The tokens of the model.
    pub vocab: Vocab,
    /// Whether a pretoken that is a token of the model is taken whole, merges or not.
    pub ignore_merges: bool,
    /// Length in bytes of each token of the model, by id; 0 where the model has none.
    pub lengths: Vec<u32>,
    /// Added tokens, and tokens of the model that no text can give, by name.
    pub named: HashMap<String, u32>,
    /// As it stands in the file: it has no part in encoding a text.
    pub post_processor: Value,
}

#[derive(Deserialize)]
struct File<'a> {
    #[serde(default)]
    added_tokens: Vec<JsonAddedToken>,
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    #[serde(default)]
    post_processor: Value,
    #[serde(borrow)]
    model: &'a RawValue,
}

#[derive(Deserialize)]
struct JsonAddedToken {
    content: String,
    single_word: bool,
    lstrip: bool,
    rstrip: bool,
    normalized: bool,
    #[serde(default)]
    special: bool,
}

/// Of a model of any type, only that.
#[derive(Deserialize)]
struct ModelKind<'a> {
    #[serde(default, rename = "type", borrow)]
    kind: Option<Cow<'a, str>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Bpe<'a> {
    #[serde(default, rename = "type", borrow)]
    kind: Option<Cow<'a, str>>,
    #[serde(default)]
    dropout: Option<f32>,
    #[serde(default)]
    unk_token: Option<String>,
    #[serde(default)]
    continuing_subword_prefix: Option<String>,
    #[serde(default)]
    end_of_word_suffix: Option<String>,
    #[serde(default)]
    fuse_unk: Option<bool>,
    #[serde(default)]
    byte_fallback: Option<bool>,
    #[serde(default)]
    ignore_merges: Option<bool>,
    #[serde(borrow, deserialize_with = "vocab_entries")]
    vocab: Vec<(Cow<'a, str>, u32)>,
    #[serde(borrow)]
    merges: Vec<Merge<'a>>,
}

/// A merge, as `"a b"` or as `["a", "b"]`.
enum Merge<'a> {
    Joined(Cow<'a, str>),
    Pair(Cow<'a, str>, Cow<'a, str>),
}

/// By hand, since `untagged` copies each into a tree of values first.
impl<'de: 'a, 'a> Deserialize<'de> for Merge<'a> {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Visitor;
        impl<'de> serde::de::Visitor<'de> for Visitor {
            type Value = Merge<'de>;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a merge, \"a b\" or [\"a\", \"b\"]")
            }
            fn visit_borrowed_str<E: serde::de::Error>(self, joined: &'de str) -> std::result::Result<Self::Value, E> {
                Ok(Merge::Joined(joined.into()))
            }
            fn visit_str<E: serde::de::Error>(self, joined: &str) -> std::result::Result<Self::Value, E> {
                Ok(Merge::Joined(joined.to_owned().into()))
            }
            fn visit_seq<A: serde::de::SeqAccess<'de>>(
                self,
                mut parts: A,
            ) -> std::result::Result<Self::Value, A::Error> {
                let mut next = || parts.next_element::<Text>().map(|text| text.map(|Text(text)| text));
                match (next()?, next()?, next()?) {
                    (Some(left), Some(right), None) => Ok(Merge::Pair(left, right)),
                    _ => Err(serde::de::Error::custom("expected two tokens in a merge")),
                }
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

/// Reads the bytes of a tokenizer.json.
pub fn load(json: &[u8]) -> Result<Parts> {
    let file: File = serde_json::from_slice(json).or_else(|error| refuse(format!("tokenizer.json: {error}")))?;
    let nfc = normalizer(&file.normalizer, "normalizer")?.then(Nfc::new);
    let (rules, table) = pretokenizer(&file.pre_tokenizer)?;
    post_processor(&file.post_processor, "post_processor")?;

    let model: Bpe = match serde_json::from_str(file.model.get()) {
        Ok(model) => model,
        Err(error) => {
            // A model of another type does not read as BPE: then its type is the reason.
            let other = serde_json::from_str(file.model.get()).ok().and_then(|ModelKind { kind }| kind);
            let other = other.filter(|kind| kind != "BPE");
            return refuse(other.map_or_else(|| format!("model: {error}"), |kind| format!("model.type = {kind}")));
        }
    };
    // Old files name no type; what has merges is BPE.
    if let Some(kind) = model.kind.as_deref().filter(|kind| *kind != "BPE") {
        return refuse(format!("model.type = {kind}"));
    }
    if model.dropout.is_some_and(|dropout| dropout != 0.0) {
        return refuse("model.dropout");
    }
    for (name, value) in [
        ("continuing_subword_prefix", &model.continuing_subword_prefix),
        ("end_of_word_suffix", &model.end_of_word_suffix),
    ] {
        if let Some(value) = value.as_deref().filter(|value| !value.is_empty()) {
            return refuse(format!("model.{name} = {value:?}"));
        }
    }
    if model.byte_fallback == Some(true) {
        return refuse("model.byte_fallback = true");
    }

    let alphabet = Alphabet::new();
    let Vocabulary { vocab, mut lengths, mut named } = vocabulary(&model.vocab, &alphabet)?;
    let pretokenizer = PreTokenizer::new(rules, table, Cuts::new(vocab.keys()));
    let merges = merge_ids(&model.merges, &vocab, &alphabet)?;
    let mut id_of_byte: [u32; 256] = std::array::from_fn(|byte| vocab.get(&[byte as u8]).unwrap_or(LEFT_OUT));
    let lacking = (0..=255u8).find(|byte| bpe::can_occur(*byte) && id_of_byte[*byte as usize] == LEFT_OUT);
    let unknown = lacking.map_or(Ok(None), |byte| unknown_token(&model, &merges, byte))?;
    if let Some(unknown) = unknown {
        lengths.resize(lengths.len().max(unknown as usize + 1), 0);
        lengths[unknown as usize] = 1;
        id_of_byte.iter_mut().filter(|id| **id == LEFT_OUT).for_each(|id| *id = unknown);
    }
    let merges = Merges::new(id_of_byte, &merges).map_err(NotUnderstood)?;
    let control: Vec<&JsonAddedToken> =
        file.added_tokens.iter().filter(|token| is_control(&token.content, token.special)).collect();
    // NFC makes these of other characters, so that a token could come of a text that does not spell it.
    let is_made_by_nfc = |letter: char| !letter.is_ascii() || matches!(letter, 'K' | ';' | '`');
    let is_hidden = |token: &&&JsonAddedToken| token.normalized && token.content.contains(is_made_by_nfc);
    if nfc.is_some()
        && let Some(token) = control.iter().find(is_hidden)
    {
        return refuse(format!("added_tokens: {:?} is looked for in normalised text", token.content));
    }
    let control = ControlTokens::new(control.into_iter().map(|token| &*token.content));
    let added = added_tokens(file.added_tokens, &model.vocab);
    named.extend(added.iter().map(|(token, _)| (token.content.clone(), token.id)));
    let (raw_added, normalized_added) = finders(added, nfc.as_ref())?;
    let ignore_merges = model.ignore_merges == Some(true);
    Ok(Parts {
        raw_added,
        normalized_added,
        control,
        nfc,
        pretokenizer,
        merges,
        vocab,
        ignore_merges,
        lengths,
        named,
        post_processor: file.post_processor,
    })
}

fn type_of<'a>(part: &'a Value, place: &str) -> Result<&'a str> {
    part.get("type").and_then(Value::as_str).map_or_else(|| refuse(format!("{place}.type is missing")), Ok)
}

fn list<'a>(part: &'a Value, name: &str, place: &str) -> Result<&'a [Value]> {
    part.get(name)
        .and_then(Value::as_array)
        .map_or_else(|| refuse(format!("{place}.{name} is not a list")), |list| Ok(&list[..]))
}

/// Whether the normalizer is NFC (else it is nothing).
fn normalizer(part: &Value, place: &str) -> Result<bool> {
    if part.is_null() {
        return Ok(false);
    }
    match type_of(part, place)? {
        "NFC" => Ok(true),
        "Sequence" => {
            let mut is_nfc = false;
            for (i, part) in list(part, "normalizers", place)?.iter().enumerate() {
                is_nfc |= normalizer(part, &format!("{place}.normalizers[{i}]"))?;
            }
            Ok(is_nfc)
        }
        other => refuse(format!("{place}.type = {other}")),
    }
}

fn post_processor(part: &Value, place: &str) -> Result<()> {
    if part.is_null() {
        return Ok(());
    }
    match type_of(part, place)? {
        "ByteLevel" | "TemplateProcessing" => Ok(()),
        "Sequence" => {
            for (i, part) in list(part, "processors", place)?.iter().enumerate() {
                post_processor(part, &format!("{place}.processors[{i}]"))?;
            }
            Ok(())
        }
        other => refuse(format!("{place}.type = {other}")),
    }
}

/// A pre-tokenizer without its sequences, and where in the file it stands.
enum Step {
    Split { pattern: String, inverted: bool, place: String },
    Digits { individual: bool },
    ByteLevel { use_regex: bool, place: String },
}

fn steps(part: &Value, place: String, out: &mut Vec<Step>) -> Result<()> {
    let flag = |name: &str, default: bool| part.get(name).map_or(Some(default), Value::as_bool);
    match type_of(part, &place)? {
        "Sequence" => {
            for (i, part) in list(part, "pretokenizers", &place)?.iter().enumerate() {
                steps(part, format!("{place}.pretokenizers[{i}]"), out)?;
            }
        }
        "Split" => {
            let Some(pattern) = part.get("pattern").and_then(|pattern| pattern.get("Regex")).and_then(Value::as_str)
            else {
                return refuse(format!("{place}.pattern is not a Regex"));
            };
            // Removing what does not match (inverted) is the same as isolating the matches only if everything matches.
            let inverted = match (part.get("behavior").and_then(Value::as_str), flag("invert", false)) {
                (Some("Isolated"), Some(_)) => false,
                (Some("Removed"), Some(true)) => true,
                (behavior, invert) => {
                    return refuse(format!("{place}.behavior = {behavior:?} with invert = {invert:?}"));
                }
            };
            out.push(Step::Split { pattern: pattern.to_owned(), inverted, place });
        }
        "Digits" => match flag("individual_digits", false) {
            Some(individual) => out.push(Step::Digits { individual }),
            None => return refuse(format!("{place}.individual_digits is not a bool")),
        },
        "ByteLevel" => match (flag("add_prefix_space", true), flag("use_regex", true)) {
            (Some(false), Some(use_regex)) => out.push(Step::ByteLevel { use_regex, place }),
            _ => return refuse(format!("{place}.add_prefix_space is not false")),
        },
        other => return refuse(format!("{place}.type = {other}")),
    }
    Ok(())
}

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN3_5: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const CL100K: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const O200K: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
const DEEPSEEK3: [&str; 3] = [
    r"\p{N}{1,3}",
    "[一-龥\u{3040}-ゟ゠-ヿ]+",
    concat!(
        r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^"##,
        "\r\n",
        r"\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[",
        "\r\n",
        r"]*|\s*[",
        "\r\n",
        r"]+|\s+(?!\S)|\s+"
    ),
];

fn pretokenizer(part: &Value) -> Result<(Rules, ClassTable)> {
    if part.is_null() {
        return refuse("pre_tokenizer = null");
    }
    let mut all = Vec::new();
    steps(part, "pre_tokenizer".to_owned(), &mut all)?;
    let Some(Step::ByteLevel { use_regex, .. }) = all.pop() else {
        return refuse("pre_tokenizer does not end with ByteLevel");
    };
    if let Some(Step::ByteLevel { place, .. }) = all.iter().find(|step| matches!(step, Step::ByteLevel { .. })) {
        return refuse(format!("{place}: ByteLevel is not the last"));
    }
    let patterns: Vec<&str> = all
        .iter()
        .filter_map(|step| if let Step::Split { pattern, .. } = step { Some(&**pattern) } else { None })
        .collect();
    let any_inverted = all.iter().any(|step| matches!(step, Step::Split { inverted: true, .. }));
    let cl100k = |letters: Flags, max_digits| Ok((Rules::Cl100k { letters, max_digits }, ClassTable::new()));
    match (&all[..], &patterns[..], use_regex) {
        ([], [], true) | ([_], [GPT2], false) => Ok((Rules::Gpt2 { digits_apart: false }, ClassTable::new())),
        ([Step::Digits { individual: true }], [], true) => {
            Ok((Rules::Gpt2 { digits_apart: true }, ClassTable::with_numeric_chars()))
        }
        ([_], [QWEN2], false) => cl100k(LETTER, 1),
        ([_], [QWEN3_5], false) => cl100k(LETTER | MARK, 1),
        ([_], [CL100K], false) => cl100k(LETTER, 3),
        ([_], [O200K], false) => Ok((Rules::O200k, ClassTable::new())),
        ([_, _, _], patterns, false) if *patterns == DEEPSEEK3 && !any_inverted => {
            Ok((Rules::DeepSeek3, ClassTable::new()))
        }
        (_, _, false) => Ok((Rules::Stages(stages(&all)?), ClassTable::new())),
        _ => refuse("pre_tokenizer: ByteLevel with use_regex after other splits"),
    }
}

fn stages(all: &[Step]) -> Result<Vec<Stage>> {
    let mut stages = Vec::new();
    for step in all {
        stages.push(match step {
            Step::Digits { individual } => Stage::digits(*individual),
            Step::Split { pattern, inverted, place } => match Stage::parse(pattern).filter(|_| !inverted) {
                // `$` also matches before a newline: only where none can be inside a piece is it the end alone.
                Some(Stage::TrailingSpace) if !matches!(&all[0], Step::Split { pattern, .. } if pattern == "[\r\n]") => {
                    return refuse(format!("{place}.pattern: $ without newlines split off before"));
                }
                Some(stage) => stage,
                None => return refuse(format!("{place}.pattern = {pattern}")),
            },
            Step::ByteLevel { place, .. } => return refuse(format!("{place}: ByteLevel is not the last")),
        });
    }
    if stages.is_empty() { refuse("pre_tokenizer: nothing splits the text") } else { Ok(stages) }
}

/// The GPT-2 alphabet: each byte as a printable character. Bytes that are none stand in order from U+0100 on.
pub struct Alphabet {
    /// By character; 256 where it is none of the alphabet.
    bytes: [u16; 0x144],
}

impl Alphabet {
    pub fn new() -> Self {
        let is_printable = |byte: &usize| matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
        let mut others = (0..256).filter(|byte| !is_printable(byte));
        let byte_of = |c| match c {
            0x100.. => others.next().expect("68 bytes are no printable characters"),
            _ if is_printable(&c) => c,
            _ => 256,
        };
        let mut bytes = [256; 0x144];
        bytes.iter_mut().zip((0..).map(byte_of)).for_each(|(byte, found)| *byte = found as u16);
        Self { bytes }
    }

    /// The bytes that `token` stands for; `None` if a character is not of the alphabet.
    pub fn decode(&self, token: &str, out: &mut Vec<u8>) -> Option<()> {
        out.reserve(token.len());
        for c in token.chars() {
            out.push(u8::try_from(*self.bytes.get(c as usize)?).ok()?);
        }
        Some(())
    }
}

/// The tokens of the model; see [`Parts`].
struct Vocabulary {
    vocab: Vocab,
    lengths: Vec<u32>,
    /// Those that no text can give.
    named: HashMap<String, u32>,
}

fn vocabulary(entries: &[(Cow<str>, u32)], alphabet: &Alphabet) -> Result<Vocabulary> {
    let mut vocab = Vocab::with_capacity(entries.len());
    let mut lengths = Vec::new();
    let mut named = HashMap::new();
    let mut bytes = Vec::new();
    for (token, id) in entries {
        bytes.clear();
        if alphabet.decode(token, &mut bytes).is_none() {
            named.insert(token.to_string(), *id);
            continue;
        }
        if bytes.is_empty() {
            continue;
        }
        if *id >= 1 << 21 {
            return refuse(format!("model.vocab[{token:?}] = {id} is too large an id"));
        }
        if lengths.len() <= *id as usize {
            lengths.resize(*id as usize + 1, 0);
        }
        if lengths[*id as usize] != 0 || !vocab.insert(&bytes, *id) {
            return refuse(format!("model.vocab[{token:?}] = {id} is there twice"));
        }
        lengths[*id as usize] = bytes.len() as u32;
    }
    Ok(Vocabulary { vocab, lengths, named })
}

/// The token that stands for each byte that the vocabulary lacks (`byte` is one); without one they are left out.
fn unknown_token(model: &Bpe, merges: &[(u32, u32, u32)], byte: u8) -> Result<Option<u32>> {
    let Some(token) = &model.unk_token else { return Ok(None) };
    let Some((_, id)) = model.vocab.iter().find(|(known, _)| known == token) else {
        return refuse(format!(
            "model.unk_token = {token:?} is not in the vocabulary, which lacks the byte {byte:#04x}"
        ));
    };
    // The engine knows a token's length by its id: the unknown token must be one that nothing else gives.
    if model.fuse_unk == Some(true)
        || model.ignore_merges == Some(true)
        || merges.iter().any(|(a, b, c)| [a, b, c].contains(&id))
    {
        return refuse(format!(
            "model.unk_token = {token:?} for the byte {byte:#04x}, with fuse_unk, ignore_merges or merges of it"
        ));
    }
    Ok(Some(*id))
}

/// The merges by rank, as (left id, right id, id of the two together).
fn merge_ids(merges: &[Merge], vocab: &Vocab, alphabet: &Alphabet) -> Result<Vec<(u32, u32, u32)>> {
    let mut by_rank = Vec::with_capacity(merges.len());
    let mut bytes = Vec::new();
    for (i, merge) in merges.iter().enumerate() {
        let (left, right) = match merge {
            Merge::Joined(joined) if joined.starts_with("#version") => continue,
            Merge::Joined(joined) => match joined.split_once(' ').filter(|(_, right)| !right.contains(' ')) {
                Some(pair) => pair,
                None => return refuse(format!("model.merges[{i}] is not a pair")),
            },
            Merge::Pair(left, right) => (&**left, &**right),
        };
        bytes.clear();
        let ids = (|| {
            alphabet.decode(left, &mut bytes)?;
            let middle = bytes.len();
            alphabet.decode(right, &mut bytes)?;
            Some((vocab.get(&bytes[..middle])?, vocab.get(&bytes[middle..])?, vocab.get(&bytes)?))
        })();
        match ids {
            Some(ids) => by_rank.push(ids),
            None => return refuse(format!("model.merges[{i}] names a token that the vocabulary lacks")),
        }
    }
    Ok(by_rank)
}

/// The added tokens, each with whether it matches normalised text.
///
/// Ids are given as `tokenizers` gives them: that of the vocabulary if the content is in it, else the next free one.
fn added_tokens(tokens: Vec<JsonAddedToken>, vocab: &[(Cow<str>, u32)]) -> Vec<(AddedToken, bool)> {
    let contents: HashSet<&str> = tokens.iter().map(|token| &*token.content).collect();
    let in_vocab: HashMap<&str, u32> =
        vocab.iter().filter(|(token, _)| contents.contains(&**token)).map(|(token, id)| (&**token, *id)).collect();
    let mut added: Vec<(AddedToken, bool)> = Vec::new();
    let mut place_of: HashMap<&str, usize> = HashMap::new();
    let mut next_id = vocab.len() as u32;
    for token in tokens.iter().filter(|token| !token.content.is_empty()) {
        let place = *place_of.entry(&token.content).or_insert(added.len());
        let id = match (added.get(place), in_vocab.get(&*token.content)) {
            (Some((earlier, _)), _) => earlier.id,
            (None, Some(id)) => *id,
            (None, None) => {
                next_id += 1;
                next_id - 1
            }
        };
        let JsonAddedToken { single_word, lstrip, rstrip, normalized, .. } = *token;
        let token = AddedToken { content: token.content.clone(), id, single_word, lstrip, rstrip };
        // A token that is listed again takes the flags of its last listing.
        match added.get_mut(place) {
            Some(earlier) => *earlier = (token, normalized),
            None => added.push((token, normalized)),
        }
    }
    added
}

/// Finders of the tokens that match the text as given, and of those that match normalised text.
fn finders(added: Vec<(AddedToken, bool)>, nfc: Option<&Nfc>) -> Result<(AddedTokens, AddedTokens)> {
    let (mut normalized, mut raw) = (Vec::new(), Vec::new());
    let mut seen = HashSet::new();
    for (mut token, is_normalized) in added {
        if let Some(changed) = nfc.filter(|_| is_normalized).and_then(|nfc| nfc.normalize(&token.content)) {
            token.content = changed.text;
        }
        if !seen.insert((token.content.clone(), is_normalized)) {
            return refuse(format!("added_tokens: two normalise to {:?}", token.content));
        }
        if is_normalized { normalized.push(token) } else { raw.push(token) }
    }
    Ok((AddedTokens::new(raw), AddedTokens::new(normalized)))
}

/// A JSON object of ids as a list: a hash map of strings would cost more than reading the file.
fn vocab_entries<'de, D: serde::Deserializer<'de>>(
    deserializer: D,
) -> std::result::Result<Vec<(Cow<'de, str>, u32)>, D::Error> {
    struct Entries;
    impl<'de> serde::de::Visitor<'de> for Entries {
        type Value = Vec<(Cow<'de, str>, u32)>;
        fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
            f.write_str("an object of token ids")
        }
        fn visit_map<A: serde::de::MapAccess<'de>>(self, mut map: A) -> std::result::Result<Self::Value, A::Error> {
            let mut entries = Vec::new();
            while let Some((Text(token), id)) = map.next_entry::<Text, u32>()? {
                entries.push((token, id));
            }
            Ok(entries)
        }
    }
    deserializer.deserialize_map(Entries)
}

/// A string, borrowed from the file where it has no escapes.
#[derive(Deserialize)]
#[serde(transparent)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);
