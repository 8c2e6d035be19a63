//! A shard being written: token ids as they come, by any thread; at the end what is known only then, and the header.
//!
//! So that memory holds no shard, tokens are the first tensor, at a place that is known beforehand: the header has a fixed
//! size, filled up with spaces, as safetensors allows.

use std::fs::{File, OpenOptions};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde_json::json;

use super::{SHARD_FORMAT, ShardInfo, TokenType};
use crate::error::{Error, Result};
use crate::hash::sha256_of_file;

/// Where the tokens begin: behind the header, at the beginning of a page.
const TOKENS_START: u64 = 4096;

/// Shard `number` (from 0) is closed before it would hold more tokens. The first are small, since a shard is hashed by one
/// thread, and while the last is hashed there is nothing else to do; the largest take 128 MiB of 4-byte ids.
pub fn max_tokens(number: usize) -> u32 {
    const STEP: u32 = 1 << 19;
    const LARGEST: u32 = 1 << 25;
    LARGEST.min(STEP.saturating_mul(number.saturating_add(1).try_into().unwrap_or(u32::MAX)))
}

/// The file of a shard, shared by the threads that write its tokens.
#[derive(Debug)]
pub struct ShardWriter {
    file: File,
    path: PathBuf,
    name: String,
    token_type: TokenType,
}

/// What a shard has beside the token ids. It grows sample by sample.
#[derive(Debug)]
pub struct ShardIndex {
    offsets: Vec<u32>,
    records: Vec<u32>,
    mask: Vec<u8>,
}

impl Default for ShardIndex {
    fn default() -> Self {
        Self { offsets: vec![0], records: Vec::new(), mask: Vec::new() }
    }
}

impl ShardIndex {
    /// Samples so far.
    pub fn num_samples(&self) -> usize {
        self.offsets.len() - 1
    }

    /// Tokens so far.
    pub fn num_tokens(&self) -> usize {
        self.offsets[self.num_samples()] as usize
    }

    /// Adds a sample: its number of tokens, the runs of them that are trained on (counted from its first), and the file and
    /// line of its record. All tokens of a shard together number less than 2^32; the caller sees to that.
    pub fn push(&mut self, num_tokens: u32, runs: &[Range<u32>], file: u32, line: u32) {
        let first = self.num_tokens();
        let end = first + num_tokens as usize;
        self.mask.resize(end.div_ceil(8), 0);
        for run in runs {
            set_bits(&mut self.mask, first + run.start as usize..first + run.end as usize);
        }
        self.offsets.push(end as u32);
        self.records.extend([file, line]);
    }

    /// The bytes of the shard before its tokens, and those behind them.
    pub fn around_tokens(self, token_type: TokenType) -> [Vec<u8>; 2] {
        let (num_samples, num_tokens) = (self.num_samples(), self.num_tokens());
        let Self { offsets, records, mut mask } = self;
        mask.resize(num_mask_bytes(num_tokens, token_type), 0);
        let mut end = 0;
        let mut tensor = |dtype: &str, shape: &[usize], num_bytes: usize| {
            let start = end;
            end += num_bytes;
            json!({"dtype": dtype, "shape": shape, "data_offsets": [start, end]})
        };
        let header = json!({
            "__metadata__": {"format": SHARD_FORMAT},
            "token_ids": tensor(token_type.name(), &[num_tokens], num_tokens * token_type.num_bytes()),
            "label_mask": tensor("U8", &[mask.len()], mask.len()),
            "sample_offsets": tensor("U32", &[num_samples + 1], 4 * offsets.len()),
            "sample_records": tensor("U32", &[num_samples, 2], 4 * records.len()),
        });
        let mut head = (TOKENS_START - 8).to_le_bytes().to_vec();
        serde_json::to_writer(&mut head, &header).expect("memory takes everything");
        head.resize(TOKENS_START as usize, b' ');
        [head, [&mask[..], bytemuck::cast_slice(&offsets), bytemuck::cast_slice(&records)].concat()]
    }
}

impl ShardWriter {
    /// Makes the file `directory/name`.
    pub fn create(directory: &Path, name: String, token_type: TokenType) -> Result<Self> {
        let path = directory.join(&name);
        let opened = OpenOptions::new().write(true).create_new(true).open(&path);
        let file = opened.map_err(|error| Error::io("make the file", &path, &error))?;
        Ok(Self { file, path, name, token_type })
    }

    /// Writes token ids; the first of them has the number `first` in the shard. Every token is written once, in any order.
    pub fn write_tokens(&self, first: usize, ids: &[u32]) -> Result<()> {
        let place = TOKENS_START + (first * self.token_type.num_bytes()) as u64;
        self.write_at(&self.token_type.bytes_of(ids), place)
    }

    /// Writes everything but the tokens, which are all there. It may not be on disk yet: see [`sync`](Self::sync).
    pub fn finish(&self, index: ShardIndex) -> Result<ShardInfo> {
        let (num_samples, num_tokens) = (index.num_samples(), index.num_tokens());
        let [head, tail] = index.around_tokens(self.token_type);
        self.write_at(&head, 0)?;
        let place = TOKENS_START + (num_tokens * self.token_type.num_bytes()) as u64;
        self.write_at(&tail, place)?;
        Ok(ShardInfo {
            name: self.name.clone(),
            num_bytes: place + tail.len() as u64,
            sha256: sha256_of_file(&self.path)?,
            num_samples: num_samples as u64,
            num_tokens: num_tokens as u64,
        })
    }

    /// Makes sure that what was written is on disk.
    pub fn sync(&self) -> Result<()> {
        self.file.sync_all().map_err(|error| Error::io("write", &self.path, &error))
    }

    fn write_at(&self, bytes: &[u8], place: u64) -> Result<()> {
        self.file.write_all_at(bytes, place).map_err(|error| Error::io("write", &self.path, &error))
    }
}

/// Bytes of the label mask of `num_tokens` tokens: a bit for each, and as many bytes more as let the numbers behind it begin
/// at a multiple of their size.
pub(super) fn num_mask_bytes(num_tokens: usize, token_type: TokenType) -> usize {
    let tokens = num_tokens * token_type.num_bytes();
    (tokens + num_tokens.div_ceil(8)).next_multiple_of(4) - tokens
}

/// Sets bits `range`, counted from the lowest bit of the first byte.
fn set_bits(bytes: &mut [u8], range: Range<usize>) {
    if range.is_empty() {
        return;
    }
    let (first, last) = (range.start / 8, (range.end - 1) / 8);
    let head = 0xFFu8 << (range.start % 8);
    let tail = 0xFFu8 >> (7 - (range.end - 1) % 8);
    if first == last {
        bytes[first] |= head & tail;
    } else {
        bytes[first] |= head;
        bytes[first + 1..last].fill(0xFF);
        bytes[last] |= tail;
    }
}
