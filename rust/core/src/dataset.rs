//! A dataset opened for reading: its samples, its list of segments, and the proof that it is whole.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use crate::error::{Error, ErrorKind, Result};
use crate::hash::sha256_of_file;
use crate::listing::ListingInfo;
use crate::manifest::{MANIFEST_NAME, Manifest, REJECTED_NAME, Recipe, SEGMENTS_NAME, Segment, quantiles};
use crate::shard::{Shard, TokenIds};

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
        let at = self.shard_of(number);
        let (shard, index) = (&self.shards[at], number - self.starts[at]);
        Sample { token_ids: shard.token_ids(index), shard, index }
    }

    /// The number of the file that each sample comes from.
    pub fn file_numbers(&self) -> impl Iterator<Item = u32> + '_ {
        self.shards.iter().flat_map(|shard| (0..shard.num_samples()).map(|index| shard.record(index).0))
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

    fn shard_of(&self, number: usize) -> usize {
        self.starts.partition_point(|&start| start <= number) - 1
    }

    /// The numbers of the shards that hold samples `range`.
    pub fn shards_of(&self, range: Range<usize>) -> Range<usize> {
        self.shard_of(range.start)..self.shard_of(range.end - 1) + 1
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
        let mut files = vec![(0, 0, 0); self.manifest.files.len()];
        for (number, info) in self.manifest.shards.iter().enumerate() {
            let path = self.directory.join(&info.name);
            let damaged =
                |what: String| Error::new(ErrorKind::Dataset, format!("damaged shard: {what}")).with_path(&path);
            self.verify_shard(number)?;
            for number in self.starts[number]..self.starts[number + 1] {
                let num_label_tokens_of_sample = self.check_sample(number).map_err(damaged)?;
                num_label_tokens += num_label_tokens_of_sample;
                self.source(number)?;
                let sample = self.sample(number);
                let file = &mut files[sample.record().0 as usize];
                file.0 += 1;
                file.1 += sample.token_ids.len() as u64;
                file.2 += num_label_tokens_of_sample;
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
        for (file, (num_samples, num_tokens, num_label_tokens)) in self.manifest.files.iter().zip(files) {
            let of_file = |what: &str| format!("{what} of {}", file.path);
            equal(&of_file("samples"), MANIFEST_NAME, file.num_samples, num_samples)?;
            equal(&of_file("tokens"), MANIFEST_NAME, file.num_tokens, num_tokens)?;
            equal(&of_file("label tokens"), MANIFEST_NAME, file.num_label_tokens, num_label_tokens)?;
        }
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
