//! The index of a dataset, its fingerprint, and the dataset opened for reading.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind, Result};
use crate::hash::{sha256, sha256_of_file};
use crate::listing::ListingInfo;
use crate::shard::{Shard, ShardInfo, TokenIds, TokenType};

/// File name of the manifest. It is written last: where it is, the dataset is whole.
pub const MANIFEST_NAME: &str = "manifest.json";
/// File name of the list of rejected records.
pub const REJECTED_NAME: &str = "rejected.jsonl";
/// File name of the list of segments.
pub const SEGMENTS_NAME: &str = "segments.jsonl";
/// What the key `format` of a manifest says.
pub const DATASET_FORMAT: &str = "sft-fast dataset";
/// Version of the format, part of the fingerprint.
pub const FORMAT_VERSION: u32 = 2;
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
}

/// A line of the list of segments: successive records of one file that are next to each other.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Segment {
    /// BLAKE3 of its bytes, in hexadecimal, if each of its records is a sample and there is nothing else to report of it.
    pub blake3: Option<String>,
    /// Samples that came of it.
    pub num_samples: u64,
}

/// Everything but the input bytes that decides what a dataset holds. Written to the manifest, hashed into the fingerprint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// Longest sample, in tokens.
    pub sequence_length: u32,
    /// `reject`, `truncate_turns` or `truncate`.
    pub too_long: String,
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
    /// Records in the files.
    pub num_records: u64,
    /// Samples in the shards.
    pub num_samples: u64,
    /// Records left out.
    pub num_rejected: u64,
    /// Records left out, by reason code.
    pub rejected_by_reason: BTreeMap<String, u64>,
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
        let path = directory.join(MANIFEST_NAME);
        let refuse = |what: String| Error::new(ErrorKind::Dataset, what).with_path(&path);
        let value = read_json(directory)?;
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
        equal("rejects by reason", self.num_rejected, sum(self.rejected_by_reason.values().copied()))?;
        equal("samples of the shards", self.num_samples, sum(self.shards.iter().map(|shard| shard.num_samples)))?;
        equal("tokens of the shards", self.num_tokens, sum(self.shards.iter().map(|shard| shard.num_tokens)))?;
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

/// A dataset opened for reading: samples in the order of their records.
#[derive(Debug)]
pub struct Dataset {
    directory: PathBuf,
    manifest: Manifest,
    shards: Vec<Shard>,
    /// First sample of each shard, and the number of samples.
    starts: Vec<usize>,
    lengths: OnceLock<Vec<u32>>,
}

/// One sample of a [`Dataset`].
#[derive(Clone, Debug)]
pub struct Sample<'a> {
    /// Token ids.
    pub token_ids: TokenIds<'a>,
    shard: &'a Shard,
    index: usize,
}

impl Sample<'_> {
    /// Whether each token is trained on.
    pub fn label_mask(&self) -> impl ExactSizeIterator<Item = bool> + '_ {
        self.shard.label_mask(self.index)
    }

    /// The runs of tokens that are trained on; see [`Shard::label_runs`].
    pub fn label_runs(&self) -> impl Iterator<Item = Range<usize>> + '_ {
        self.shard.label_runs(self.index)
    }

    /// File number and line (from 1) of the record.
    pub fn record(&self) -> (u32, u32) {
        self.shard.record(self.index)
    }

    /// Tokens with a loss.
    pub fn num_label_tokens(&self) -> u64 {
        self.shard.num_label_tokens(self.index)
    }
}

impl Dataset {
    /// Opens the dataset in `directory`. Checks every rule of the format but the checksums; see [`Dataset::verify`].
    pub fn open(directory: &Path) -> Result<Self> {
        let manifest = Manifest::read(directory)?;
        let mut shards = Vec::with_capacity(manifest.shards.len());
        let mut starts = vec![0];
        for info in &manifest.shards {
            let shard = Shard::open(directory, info, manifest.token_type, manifest.vocab_size)?;
            starts.push(starts[shards.len()] + shard.num_samples());
            shards.push(shard);
        }
        Ok(Self { directory: directory.into(), manifest, shards, starts, lengths: OnceLock::new() })
    }

    /// The manifest.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Number of samples.
    pub fn num_samples(&self) -> usize {
        self.starts[self.shards.len()]
    }

    /// Tokens of each sample: 4 bytes a sample, made when they are first asked for.
    pub fn lengths(&self) -> &[u32] {
        self.lengths.get_or_init(|| {
            let offsets = self.shards.iter().flat_map(|shard| shard.sample_offsets().windows(2));
            let mut lengths = Vec::with_capacity(self.num_samples());
            lengths.extend(offsets.map(|pair| pair[1] - pair[0]));
            lengths
        })
    }

    /// Sample `number`, from 0.
    ///
    /// # Panics
    /// If there is no such sample.
    pub fn sample(&self, number: usize) -> Sample<'_> {
        let at = self.starts.partition_point(|&start| start <= number) - 1;
        let (shard, index) = (&self.shards[at], number - self.starts[at]);
        Sample { token_ids: shard.token_ids(index), shard, index }
    }

    /// Path of the input file and line (from 1) that sample `number` comes from.
    ///
    /// # Errors
    /// [`ErrorKind::Dataset`] where the shard names a file that the manifest does not have.
    ///
    /// # Panics
    /// If there is no such sample.
    pub fn source(&self, number: usize) -> Result<(&str, u32)> {
        let (file, line) = self.sample(number).record();
        match self.manifest.files.get(file as usize) {
            Some(file) => Ok((&file.path, line)),
            None => {
                let num_files = self.manifest.files.len();
                let message = format!(
                    "damaged shard: expected sample {number} to be of one of {num_files} files, found file {file}"
                );
                Err(Error::new(ErrorKind::Dataset, message).with_path(&self.directory))
            }
        }
    }

    /// The numbers of the shards that hold samples `range`.
    pub fn shards_of(&self, range: std::ops::Range<usize>) -> std::ops::Range<usize> {
        let at = |number: usize| self.starts.partition_point(|&start| start <= number) - 1;
        at(range.start)..at(range.end - 1) + 1
    }

    /// Proves the checksum of a shard.
    ///
    /// # Errors
    /// [`ErrorKind::Dataset`] where it is not that of the manifest.
    pub fn verify_shard(&self, number: usize) -> Result<()> {
        let info = &self.manifest.shards[number];
        self.verify_checksum("shard", &info.name, &info.sha256)
    }

    fn verify_checksum(&self, what: &str, name: &str, expected: &str) -> Result<()> {
        let path = self.directory.join(name);
        let found = sha256_of_file(&path)?;
        if found != expected {
            return Err(Error::new(
                ErrorKind::Dataset,
                format!("damaged {what}: expected SHA-256 {expected}, found {found}"),
            )
            .with_path(&path)
            .with_hint("preprocess again; the file changed after it was written"));
        }
        Ok(())
    }

    /// The list of segments, proved against the manifest.
    ///
    /// # Errors
    /// [`ErrorKind::Dataset`] where it is missing, damaged, or of other samples.
    pub fn segments(&self) -> Result<Vec<Segment>> {
        let path = self.directory.join(SEGMENTS_NAME);
        let damaged =
            |what: String| Error::new(ErrorKind::Dataset, format!("damaged list of segments: {what}")).with_path(&path);
        let ListingInfo { num_bytes, sha256 } = &self.manifest.segments;
        match std::fs::metadata(&path) {
            Ok(metadata) if metadata.is_file() && metadata.len() == *num_bytes => {}
            Ok(metadata) if metadata.is_file() => {
                let found = metadata.len();
                return Err(damaged(format!("expected {num_bytes} bytes, as the manifest says, found {found}")));
            }
            _ => return Err(damaged("expected a file, found none".into())),
        }
        self.verify_checksum("list of segments", SEGMENTS_NAME, sha256)?;
        let text = std::fs::read_to_string(&path).map_err(|error| Error::io("read", &path, &error))?;
        let segments: Vec<Segment> = text
            .lines()
            .map(|line| serde_json::from_str(line).map_err(|error| damaged(error.to_string())))
            .collect::<Result<_>>()?;
        let sum = segments.iter().try_fold(0u64, |sum, segment| sum.checked_add(segment.num_samples));
        match sum == Some(self.manifest.num_samples) {
            true => Ok(segments),
            false => Err(damaged(format!("expected {} samples, found {sum:?}", self.manifest.num_samples))),
        }
    }

    /// Proves the dataset whole: the checksums of all shards, and every law between shards, manifest and rejected records.
    ///
    /// `on_bytes` is told of progress and may stop the work.
    ///
    /// # Errors
    /// [`ErrorKind::Dataset`], naming the file and the law.
    pub fn verify(&self, mut on_bytes: impl FnMut(u64) -> Result<()>) -> Result<()> {
        let mut num_label_tokens = 0;
        for (number, info) in self.manifest.shards.iter().enumerate() {
            let path = self.directory.join(&info.name);
            let damaged =
                |what: String| Error::new(ErrorKind::Dataset, format!("damaged shard: {what}")).with_path(&path);
            self.verify_shard(number)?;
            for number in self.starts[number]..self.starts[number + 1] {
                num_label_tokens += self.check_sample(number).map_err(damaged)?;
                self.source(number)?;
            }
            on_bytes(info.num_bytes)?;
        }
        let equal = |what: &str, name: &str, expected: u64, found: u64| match expected == found {
            true => Ok(()),
            false => Err(Error::new(ErrorKind::Dataset, format!("expected {expected} {what}, found {found}"))
                .with_path(&self.directory.join(name))),
        };
        self.segments()?;
        equal("label tokens", MANIFEST_NAME, self.manifest.num_label_tokens, num_label_tokens)?;
        self.check_manifest().map_err(|what| {
            Error::new(ErrorKind::Dataset, format!("damaged manifest: {what}"))
                .with_path(&self.directory.join(MANIFEST_NAME))
        })?;
        equal("lines", REJECTED_NAME, self.manifest.num_rejected, self.num_rejected_lines()?)
    }

    /// What the manifest says of the files and of all samples together.
    fn check_manifest(&self) -> std::result::Result<(), String> {
        let Manifest { fingerprint, recipe, files, sample_tokens, .. } = &self.manifest;
        let expected = recipe.fingerprint(files);
        if *fingerprint != expected {
            return Err(format!("expected the fingerprint {expected} of its recipe and files, found {fingerprint}"));
        }
        let mut histogram = BTreeMap::new();
        for &length in self.lengths() {
            *histogram.entry(length).or_default() += 1;
        }
        let expected = quantiles(&histogram);
        match *sample_tokens == expected {
            true => Ok(()),
            false => Err(format!("expected sample_tokens {expected:?}, found {sample_tokens:?}")),
        }
    }

    /// The laws of one sample; its tokens with a loss.
    fn check_sample(&self, number: usize) -> std::result::Result<u64, String> {
        let Manifest { vocab_size, recipe: Recipe { sequence_length, .. }, .. } = self.manifest;
        let sample = self.sample(number);
        let largest = sample.token_ids.max().unwrap_or(0);
        if largest >= vocab_size {
            return Err(format!("expected token ids below {vocab_size}, found {largest} in sample {number}"));
        }
        let num_tokens = sample.token_ids.len();
        if num_tokens > sequence_length as usize {
            return Err(format!("expected at most {sequence_length} tokens, found {num_tokens} in sample {number}"));
        }
        match sample.num_label_tokens() {
            0 => Err(format!("expected a token to learn, found none in sample {number}")),
            num_label_tokens => Ok(num_label_tokens),
        }
    }

    fn num_rejected_lines(&self) -> Result<u64> {
        let path = self.directory.join(REJECTED_NAME);
        let file = std::fs::File::open(&path).map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => {
                Error::new(ErrorKind::Dataset, "damaged dataset: expected a file, found none").with_path(&path)
            }
            _ => Error::io("read", &path, &error),
        })?;
        let mut lines = BufReader::new(file).split(b'\n');
        lines.try_fold(0, |count, line| line.map(|_| count + 1)).map_err(|error| Error::io("read", &path, &error))
    }
}
