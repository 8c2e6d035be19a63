//! The index of a dataset, its fingerprint, and what a directory that is to become one holds.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind, Result};
use crate::hash::sha256;
use crate::listing::ListingInfo;
use crate::shard::{ShardInfo, TokenType};

/// File name of the manifest. It is written last: where it is, the dataset is whole.
pub const MANIFEST_NAME: &str = "manifest.json";
/// File name of the list of rejected records.
pub const REJECTED_NAME: &str = "rejected.jsonl";
/// File name of the list of segments.
pub const SEGMENTS_NAME: &str = "segments.jsonl";
/// What the key `format` of a manifest says.
pub const DATASET_FORMAT: &str = "sft-fast dataset";
/// Version of the format, part of the fingerprint.
pub const FORMAT_VERSION: u32 = 3;
/// A manifest that is larger is not read.
const MAX_MANIFEST_BYTES: u64 = 256 << 20;

/// One input file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SourceInfo {
    /// The path as it was given.
    pub path: String,
    /// Size in bytes.
    pub num_bytes: u64,
    /// BLAKE3 of the content, in hexadecimal.
    pub blake3: String,
    /// Records found.
    pub num_records: u64,
    /// Samples that came of them.
    pub num_samples: u64,
    /// Records left out.
    pub num_rejected: u64,
    /// Tokens of the samples.
    pub num_tokens: u64,
    /// Tokens with a loss.
    pub num_label_tokens: u64,
}

/// Files that go by one name, for weights, caps and losses of their own: successive ones of the manifest's list. What it is
/// called and how files are put together is as it was given, and decides nothing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Source {
    /// Its name.
    pub name: String,
    /// Files of it.
    pub num_files: u64,
}

/// A line of the list of segments: successive records of one file that are next to each other.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Segment {
    /// BLAKE3 of its bytes, in hexadecimal, if each of its records is a sample and there is nothing else to report of it.
    pub blake3: Option<String>,
    /// Samples that came of it.
    pub num_samples: u64,
    /// Its records by their shape, where it has a hash.
    pub shapes: Option<BTreeMap<String, u64>>,
}

/// Everything but the input bytes that decides what a dataset holds. Written to the manifest, hashed into the fingerprint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// Longest sample, in tokens.
    pub sequence_length: u32,
    /// `reject`, `truncate_turns` or `truncate`.
    pub too_long: String,
    /// What becomes of a record of which the same samples came before: `keep` or `drop`.
    pub duplicates: String,
    /// What becomes of text that spells a control token: `plain`, `reject` or `allow`.
    pub control_tokens: String,
    /// Which answers are trained on: `all_answers` or `last_answer`.
    pub train_on: String,
    /// Whether answers are trained on that call tools.
    pub train_on_tool_calls: bool,
    /// Whether the thinking of an answer is trained on.
    pub train_on_thinking: bool,
    /// What becomes of an answer whose thinking the template leaves out: `skip`, `split`, `reject` or `keep`.
    pub dropped_thinking: String,
    /// Field of the system prompt.
    pub system_key: Option<String>,
    /// Field of the prompt.
    pub prompt_key: String,
    /// Field of the query.
    pub query_key: Option<String>,
    /// Field of the answer.
    pub response_key: String,
    /// Field of earlier turns.
    pub history_key: Option<String>,
    /// Field of plain text.
    pub text_key: String,
    /// The shape that all records have; `auto`: that which their keys show.
    pub record_shape: String,
    /// SHA-256 of `tokenizer.json`.
    pub tokenizer_sha256: String,
    /// SHA-256 of the chat template's text and of the special tokens that it can print.
    pub template_sha256: String,
    /// The date that a template sees as today, where it asks for one.
    pub template_date: Option<String>,
}

impl Recipe {
    /// The fingerprint of the dataset that this recipe makes of `files`: SHA-256, in hexadecimal.
    pub fn fingerprint(&self, files: &[SourceInfo]) -> String {
        let content: Vec<_> = files.iter().map(|file| (file.num_bytes, &file.blake3)).collect();
        let canonical = serde_json::to_vec(&(DATASET_FORMAT, FORMAT_VERSION, self, content)).expect("plain data");
        sha256(&canonical)
    }
}

/// What `manifest.json` says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// [`DATASET_FORMAT`].
    pub format: String,
    /// [`FORMAT_VERSION`].
    pub format_version: u32,
    /// Hash of everything that decides the content.
    pub fingerprint: String,
    /// What the dataset was made by, besides the files.
    pub recipe: Recipe,
    /// Directory of the tokenizer, as it was given.
    pub tokenizer: String,
    /// Name of the chat template, as it was given.
    pub template: String,
    /// What is known of the template: prefix-preserving, end-of-turn trained, generation markers, date-dependent.
    pub template_verdict: serde_json::Value,
    /// One more than the largest token id.
    pub vocab_size: u32,
    /// Token that fills rows; it is never trained on.
    pub pad_token_id: u32,
    /// Width of a token id on disk.
    pub token_type: TokenType,
    /// The input files.
    pub files: Vec<SourceInfo>,
    /// The sources that the files belong to, in order.
    pub sources: Vec<Source>,
    /// Records in the files.
    pub num_records: u64,
    /// Samples in the shards.
    pub num_samples: u64,
    /// Records left out.
    pub num_rejected: u64,
    /// Records left out, by reason code.
    pub rejected_by_reason: BTreeMap<String, u64>,
    /// Records that could be read, by their shape.
    pub records_by_shape: BTreeMap<String, u64>,
    /// Samples of a record beyond its first.
    pub num_split_samples: u64,
    /// Samples that lost their end.
    pub num_truncated: u64,
    /// Samples whose last answer lost its end.
    pub num_cut_answers: u64,
    /// Samples with text that spells a control token and was encoded as ordinary text.
    pub num_control_text: u64,
    /// Answers that are not trained on because the template leaves out their thinking.
    pub num_skipped_answers: u64,
    /// Tokens of all samples.
    pub num_tokens: u64,
    /// Tokens with a loss.
    pub num_label_tokens: u64,
    /// Sample lengths in tokens: `min`, `p50`, `p90`, `p99`, `max`.
    pub sample_tokens: BTreeMap<String, u32>,
    /// The shards, in the order of the samples.
    pub shards: Vec<ShardInfo>,
    /// The list of segments.
    pub segments: ListingInfo,
}

impl Manifest {
    /// Reads and checks the manifest of the dataset in `directory`.
    ///
    /// # Errors
    /// [`ErrorKind::Dataset`] where there is no manifest, or one that is damaged, foreign or of another version.
    pub fn read(directory: &Path) -> Result<Self> {
        Self::of_json(read_json(directory)?, &directory.join(MANIFEST_NAME))
    }

    /// The manifest that a value is, which was read from `path`.
    pub fn of_json(value: serde_json::Value, path: &Path) -> Result<Self> {
        let refuse = |what: String| Error::new(ErrorKind::Dataset, what).with_path(path);
        if value["format"] != DATASET_FORMAT {
            return Err(refuse(format!("expected the format \"{DATASET_FORMAT}\", found {}", value["format"])));
        }
        if value["format_version"] != FORMAT_VERSION {
            let found = &value["format_version"];
            return Err(refuse(format!("expected format version {FORMAT_VERSION}, found {found}"))
                .with_hint("preprocess again with this version of sft-fast"));
        }
        let manifest: Self =
            serde_json::from_value(value).map_err(|error| refuse(format!("damaged manifest: {error}")))?;
        manifest.check().map_err(|what| refuse(format!("damaged manifest: {what}")))?;
        Ok(manifest)
    }

    /// The laws that hold between the manifest's own numbers.
    fn check(&self) -> std::result::Result<(), String> {
        fn sum(mut counts: impl Iterator<Item = u64>) -> Option<u64> {
            counts.try_fold(0u64, |sum, count| sum.checked_add(count))
        }
        let equal = |what: &str, expected: u64, found: Option<u64>| match found {
            Some(found) if found == expected => Ok(()),
            _ => Err(format!("expected {what} to add up to {expected}, found {found:?}")),
        };
        let kept_and_rejected = self.num_samples.checked_add(self.num_rejected);
        let kept_and_rejected = kept_and_rejected.and_then(|sum| sum.checked_sub(self.num_split_samples));
        equal("samples but the split ones, and rejected records,", self.num_records, kept_and_rejected)?;
        equal("records of the files", self.num_records, sum(self.files.iter().map(|file| file.num_records)))?;
        equal("samples of the files", self.num_samples, sum(self.files.iter().map(|file| file.num_samples)))?;
        equal("rejects of the files", self.num_rejected, sum(self.files.iter().map(|file| file.num_rejected)))?;
        equal("tokens of the files", self.num_tokens, sum(self.files.iter().map(|file| file.num_tokens)))?;
        let label_tokens = sum(self.files.iter().map(|file| file.num_label_tokens));
        equal("label tokens of the files", self.num_label_tokens, label_tokens)?;
        let num_files = sum(self.sources.iter().map(|source| source.num_files));
        equal("files of the sources", self.files.len() as u64, num_files)?;
        let mut names: Vec<_> = self.sources.iter().map(|source| &source.name).collect();
        names.sort();
        if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(format!("expected sources of different names, found two called {:?}", pair[0]));
        }
        equal("rejects by reason", self.num_rejected, sum(self.rejected_by_reason.values().copied()))?;
        equal("samples of the shards", self.num_samples, sum(self.shards.iter().map(|shard| shard.num_samples)))?;
        equal("tokens of the shards", self.num_tokens, sum(self.shards.iter().map(|shard| shard.num_tokens)))?;
        match sum(self.records_by_shape.values().copied()) {
            Some(num_read) if num_read <= self.num_records => {}
            found => return Err(format!("expected at most {} records by shape, found {found:?}", self.num_records)),
        }
        if self.pad_token_id >= self.vocab_size {
            let Self { vocab_size, pad_token_id, .. } = self;
            return Err(format!("expected pad_token_id to be below vocab_size {vocab_size}, found {pad_token_id}"));
        }
        match self.shards.iter().zip(0..).find(|&(shard, number)| shard.name != shard_name(number)) {
            Some((shard, number)) => Err(format!("expected the name {}, found {:?}", shard_name(number), shard.name)),
            None => Ok(()),
        }
    }

    /// Writes the manifest into `directory` and makes sure that it is on disk.
    pub fn write(&self, directory: &Path) -> Result<()> {
        let path = directory.join(MANIFEST_NAME);
        let mut text = serde_json::to_string_pretty(self).expect("plain data");
        text.push('\n');
        let written = std::fs::write(&path, text).and_then(|()| std::fs::File::open(&path)?.sync_all());
        written.map_err(|error| Error::io("write", &path, &error))
    }
}

/// The content of a manifest, before anything in it is trusted.
fn read_json(directory: &Path) -> Result<serde_json::Value> {
    let path = directory.join(MANIFEST_NAME);
    let refuse = |what: String| Error::new(ErrorKind::Dataset, what).with_path(&path);
    let metadata = std::fs::metadata(&path).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory => {
            Error::new(ErrorKind::Dataset, format!("expected a dataset, found no {MANIFEST_NAME}"))
                .with_path(directory)
                .with_hint("make one with: sft-fast preprocess FILE … --output-dir DIR")
        }
        _ => Error::io("read", &path, &error),
    })?;
    if !metadata.is_file() {
        return Err(refuse("damaged manifest: expected a file, found something else".into()));
    }
    if metadata.len() > MAX_MANIFEST_BYTES {
        return Err(refuse(format!("expected at most {MAX_MANIFEST_BYTES} bytes, found {}", metadata.len())));
    }
    let bytes = std::fs::read(&path).map_err(|error| Error::io("read", &path, &error))?;
    serde_json::from_slice(&bytes).map_err(|error| refuse(format!("damaged manifest: {error}")))
}

/// The name of shard `number`, from 0.
pub fn shard_name(number: usize) -> String {
    format!("shard-{number:05}.safetensors")
}

/// The lengths that at least this share of the samples does not exceed: `min`, `p50`, `p90`, `p99`, `max`.
///
/// `histogram`: number of samples by length in tokens.
pub fn quantiles(histogram: &BTreeMap<u32, u64>) -> BTreeMap<String, u32> {
    let total: u128 = histogram.values().map(|&count| u128::from(count)).sum();
    let quantile = |percent: u128| {
        let mut seen = 0;
        let reaches = |&(_, &count): &(&u32, &u64)| {
            seen += u128::from(count);
            100 * seen >= percent * total
        };
        histogram.iter().find(reaches).map(|(&length, _)| length)
    };
    [("min", 0), ("p50", 50), ("p90", 90), ("p99", 99), ("max", 100)]
        .into_iter()
        .filter_map(|(name, percent)| Some((name.to_owned(), quantile(percent)?)))
        .collect()
}

fn is_shard_name(name: &str) -> bool {
    let number = name.strip_prefix("shard-").and_then(|rest| rest.strip_suffix(".safetensors"));
    number.is_some_and(|number| number.len() >= 5 && number.bytes().all(|byte| byte.is_ascii_digit()))
}

/// What is in a directory that is to become a dataset.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Occupant {
    /// Nothing, or there is no directory.
    Nothing,
    /// A dataset, perhaps a damaged one.
    Dataset {
        /// The first file beside it that is no part of a dataset. Where there is one, the directory is not to be removed.
        stranger: Option<String>,
    },
    /// Something else.
    Stranger,
}

impl Occupant {
    /// Looks into `directory`.
    pub fn find(directory: &Path) -> Result<Self> {
        let failed = |error: std::io::Error| Error::io("read the directory", directory, &error);
        let mut names = match std::fs::read_dir(directory) {
            Ok(entries) => entries
                .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
                .collect::<std::io::Result<Vec<_>>>()
                .map_err(failed)?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Self::Nothing),
            Err(error) => return Err(failed(error)),
        };
        names.sort();
        if names.is_empty() {
            return Ok(Self::Nothing);
        }
        let has_manifest = names.iter().any(|name| name == MANIFEST_NAME);
        let is_foreign = || matches!(read_json(directory), Ok(value) if value["format"] != DATASET_FORMAT);
        if !has_manifest || is_foreign() {
            return Ok(Self::Stranger);
        }
        let is_part = |name: &str| [MANIFEST_NAME, REJECTED_NAME, SEGMENTS_NAME].contains(&name) || is_shard_name(name);
        Ok(Self::Dataset { stranger: names.into_iter().find(|name| !is_part(name)) })
    }
}
