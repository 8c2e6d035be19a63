//! The bytes of one shard file: written piece by piece ([`write`]), read through a memory map after every rule is checked.
//!
//! A shard is a safetensors file with four tensors (`docs/format.md`). For S samples of T tokens in all:
//! `token_ids` U16 or U32 `[T]`, `label_mask` U8 (bit `t % 8` of byte `t / 8`, from the lowest, tells whether token `t` is
//! trained on), `sample_offsets` U32 `[S + 1]`, `sample_records` U32 `[S, 2]` (file number, line).

pub mod write;

use std::borrow::Cow;
use std::fs::File;
use std::ops::Range;
use std::path::Path;

use memmap2::Mmap;
use safetensors::tensor::{Dtype, SafeTensors};

use crate::error::{Error, ErrorKind, Result};

/// The value of the key `format` in the metadata of every shard.
pub const SHARD_FORMAT: &str = "sft-fast-shard-2";

/// How wide a token id is on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum TokenType {
    /// Two bytes, for vocabularies of at most 65,536.
    U16,
    /// Four bytes.
    U32,
}

impl TokenType {
    /// The narrowest type for token ids below `vocab_size`.
    pub fn for_vocab(vocab_size: u32) -> Self {
        if vocab_size <= 1 << 16 { Self::U16 } else { Self::U32 }
    }

    fn dtype(self) -> Dtype {
        match self {
            Self::U16 => Dtype::U16,
            Self::U32 => Dtype::U32,
        }
    }

    /// The name in the header of a shard.
    fn name(self) -> &'static str {
        match self {
            Self::U16 => "U16",
            Self::U32 => "U32",
        }
    }

    /// Token ids as they are on disk.
    pub(crate) fn bytes_of(self, ids: &[u32]) -> Cow<'_, [u8]> {
        match self {
            Self::U16 => {
                let mut bytes = vec![0; 2 * ids.len()];
                bytes
                    .chunks_exact_mut(2)
                    .zip(ids)
                    .for_each(|(two, &id)| two.copy_from_slice(&(id as u16).to_le_bytes()));
                Cow::Owned(bytes)
            }
            Self::U32 => Cow::Borrowed(bytemuck::cast_slice(ids)),
        }
    }

    /// Bytes of a token id.
    fn num_bytes(self) -> usize {
        match self {
            Self::U16 => 2,
            Self::U32 => 4,
        }
    }
}

/// What a shard holds: in the manifest, and checked when it is opened.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShardInfo {
    /// File name inside the dataset's directory.
    pub name: String,
    /// Size of the file.
    pub num_bytes: u64,
    /// SHA-256 of the file, in hexadecimal.
    pub sha256: String,
    /// Samples in the shard.
    pub num_samples: u64,
    /// Tokens in the shard.
    pub num_tokens: u64,
}

/// An opened shard: a memory map that passed every check.
#[derive(Debug)]
pub struct Shard {
    map: Mmap,
    offsets: Range<usize>,
    records: Range<usize>,
    token_ids: Range<usize>,
    label_mask: Range<usize>,
    token_type: TokenType,
}

/// The token ids of a sample, as wide as they are on disk.
#[derive(Clone, Copy, Debug)]
pub enum TokenIds<'a> {
    /// See [`TokenType::U16`].
    U16(&'a [u16]),
    /// See [`TokenType::U32`].
    U32(&'a [u32]),
}

impl TokenIds<'_> {
    /// Number of tokens.
    pub fn len(&self) -> usize {
        match self {
            Self::U16(ids) => ids.len(),
            Self::U32(ids) => ids.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The largest id.
    pub fn max(&self) -> Option<u32> {
        match self {
            Self::U16(ids) => ids.iter().max().map(|&id| id.into()),
            Self::U32(ids) => ids.iter().max().copied(),
        }
    }

    /// The ids, as u32.
    pub fn to_vec(&self) -> Vec<u32> {
        let mut ids = Vec::with_capacity(self.len());
        self.append_to(&mut ids);
        ids
    }

    /// Adds the ids to `target`, as u32.
    pub fn append_to(&self, target: &mut Vec<u32>) {
        match self {
            Self::U16(ids) => target.extend(ids.iter().map(|&id| u32::from(id))),
            Self::U32(ids) => target.extend_from_slice(ids),
        }
    }
}

impl Shard {
    /// Maps `directory/info.name` and checks it against `info` and the rules of the format.
    ///
    /// # Errors
    /// [`ErrorKind::Dataset`] for any rule that does not hold; [`ErrorKind::Io`] where the file can't be read.
    pub fn open(directory: &Path, info: &ShardInfo, token_type: TokenType, vocab_size: u32) -> Result<Self> {
        let path = directory.join(&info.name);
        let damaged = |what: String| Error::new(ErrorKind::Dataset, format!("damaged shard: {what}")).with_path(&path);
        let metadata = match std::fs::metadata(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(damaged("expected a file, found none".into()));
            }
            other => other.map_err(|error| Error::io("read", &path, &error))?,
        };
        if !metadata.is_file() {
            return Err(damaged("expected a file, found something else".into()));
        }
        let file = File::open(&path).map_err(|error| Error::io("open", &path, &error))?;
        let num_bytes = file.metadata().map_err(|error| Error::io("read", &path, &error))?.len();
        if num_bytes != info.num_bytes {
            return Err(damaged(format!("expected {} bytes, as the manifest says, found {num_bytes}", info.num_bytes)));
        }
        // SAFETY: the map is read-only and never handed out as anything but plain bytes and integers. A dataset is never
        // written in place: files are made under another name and renamed, so nobody shortens a file under the map.
        #[allow(unsafe_code)]
        let map = unsafe { Mmap::map(&file) }.map_err(|error| Error::io("map", &path, &error))?;

        let tensors = SafeTensors::deserialize(&map).map_err(|error| damaged(error.to_string()))?;
        let (_, metadata) = SafeTensors::read_metadata(&map).map_err(|error| damaged(error.to_string()))?;
        let format = metadata.metadata().as_ref().and_then(|metadata| metadata.get("format"));
        if format.map(String::as_str) != Some(SHARD_FORMAT) {
            return Err(damaged(format!("expected the format {SHARD_FORMAT}, found {format:?}")));
        }
        let (samples, tokens) = (info.num_samples as usize, info.num_tokens as usize);
        if tensors.len() != 4 {
            return Err(damaged(format!("expected 4 tensors, found {}", tensors.len())));
        }
        let find = |name: &str, dtype: Dtype, shape: &[usize]| -> Result<Range<usize>> {
            let tensor =
                tensors.tensor(name).map_err(|_| damaged(format!("expected the tensor {name}, found none")))?;
            if tensor.dtype() != dtype || tensor.shape() != shape {
                let (found_dtype, found_shape) = (tensor.dtype(), tensor.shape());
                let expected = format!("expected {name} to be {dtype:?} {shape:?}");
                return Err(damaged(format!("{expected}, found {found_dtype:?} {found_shape:?}")));
            }
            let start = tensor.data().as_ptr() as usize - map.as_ptr() as usize;
            if !start.is_multiple_of(dtype.bitsize().div_ceil(8)) {
                return Err(damaged(format!("expected {name} to be aligned, found it at byte {start}")));
            }
            Ok(start..start + tensor.data().len())
        };
        if samples.max(tokens) > u32::MAX as usize {
            return Err(damaged(format!("it claims {samples} samples of {tokens} tokens, more than a shard can have")));
        }
        let (offsets, records, token_ids, label_mask) = (
            find("sample_offsets", Dtype::U32, &[samples + 1])?,
            find("sample_records", Dtype::U32, &[samples, 2])?,
            find("token_ids", token_type.dtype(), &[tokens])?,
            find("label_mask", Dtype::U8, &[write::num_mask_bytes(tokens, token_type)])?,
        );
        let shard = Self { offsets, records, token_ids, label_mask, token_type, map };
        let ends = shard.sample_offsets();
        // Without an early end, the comparisons are as fast as memory: this is most of the time that opening takes.
        let rises = ends.windows(2).fold(true, |rises, pair| rises & (pair[0] < pair[1]));
        if ends[0] != 0 || ends[samples] as usize != tokens || !rises {
            return Err(damaged("expected sample_offsets to rise from 0 to the number of tokens".into()));
        }
        if vocab_size == 0 || token_type != TokenType::for_vocab(vocab_size) {
            return Err(damaged(format!("{token_type:?} tokens do not fit a vocabulary of {vocab_size}")));
        }
        Ok(shard)
    }

    /// Number of samples.
    pub fn num_samples(&self) -> usize {
        self.sample_offsets().len() - 1
    }

    /// First token of each sample, and the end of the last.
    pub fn sample_offsets(&self) -> &[u32] {
        bytemuck::cast_slice(&self.map[self.offsets.clone()])
    }

    /// Token ids of sample `index` of the shard.
    pub fn token_ids(&self, index: usize) -> TokenIds<'_> {
        let range = self.token_range(index);
        let bytes = &self.map[self.token_ids.clone()];
        match self.token_type {
            TokenType::U16 => TokenIds::U16(&bytemuck::cast_slice(bytes)[range]),
            TokenType::U32 => TokenIds::U32(&bytemuck::cast_slice(bytes)[range]),
        }
    }

    /// File number and line (from 1) of the record of sample `index`.
    pub fn record(&self, index: usize) -> (u32, u32) {
        let records: &[u32] = bytemuck::cast_slice(&self.map[self.records.clone()]);
        (records[2 * index], records[2 * index + 1])
    }

    /// Whether each token of sample `index` is trained on.
    pub fn label_mask(&self, index: usize) -> impl ExactSizeIterator<Item = bool> + '_ {
        let bytes = &self.map[self.label_mask.clone()];
        self.token_range(index).map(move |token| bytes[token / 8] >> (token % 8) & 1 == 1)
    }

    /// The runs of tokens of sample `index` that are trained on, counted from its first token; none is empty and no two
    /// touch.
    pub fn label_runs(&self, index: usize) -> impl Iterator<Item = Range<usize>> + '_ {
        let bytes = &self.map[self.label_mask.clone()];
        let Range { start, end } = self.token_range(index);
        let mut at = start;
        std::iter::from_fn(move || {
            let first = find_bit(bytes, true, at..end);
            at = find_bit(bytes, false, first..end);
            (first < at).then(|| first - start..at - start)
        })
    }

    /// Tokens of sample `index` that have a loss: trained on, and not the first, which nothing predicts.
    pub fn num_label_tokens(&self, index: usize) -> u64 {
        let range = self.token_range(index);
        count_bits(&self.map[self.label_mask.clone()], range.start + 1..range.end)
    }

    fn token_range(&self, index: usize) -> Range<usize> {
        let offsets = self.sample_offsets();
        offsets[index] as usize..offsets[index + 1] as usize
    }
}

/// The first place in `range` with this bit, counted from the lowest of the first byte; the end if there is none.
fn find_bit(bytes: &[u8], bit: bool, range: Range<usize>) -> usize {
    let mut at = range.start;
    while at < range.end {
        let rest = &bytes[at / 8..];
        let word = rest.first_chunk().copied().unwrap_or_else(|| {
            let mut word = [0; 8];
            word[..rest.len()].copy_from_slice(rest);
            word
        });
        let word = u64::from_le_bytes(word);
        let found = if bit { word } else { !word } >> (at % 8);
        if found != 0 {
            return range.end.min(at + found.trailing_zeros() as usize);
        }
        at += 64 - at % 8;
    }
    range.end
}

fn count_bits(bytes: &[u8], range: Range<usize>) -> u64 {
    let mut count = 0;
    let mut at = range.start;
    while at < range.end {
        let in_byte = (8 - at % 8).min(range.end - at);
        let mask = (0xFFu16 >> (8 - in_byte)) as u8;
        count += u64::from((bytes[at / 8] >> (at % 8) & mask).count_ones());
        at += in_byte;
    }
    count
}

#[cfg(test)]
mod tests {
    use super::write::{ShardIndex, ShardWriter};
    use super::*;
    use proptest::prelude::*;

    type Sample = (Vec<u32>, Range<u32>, u32, u32);

    fn write(samples: &[Sample], vocab_size: u32) -> (tempfile::TempDir, ShardInfo) {
        let directory = tempfile::tempdir().unwrap();
        let (name, token_type) = ("shard-00000.safetensors".to_owned(), TokenType::for_vocab(vocab_size));
        let writer = ShardWriter::create(directory.path(), name, token_type).unwrap();
        let mut index = ShardIndex::default();
        for (ids, run, file, line) in samples {
            writer.write_tokens(index.num_tokens(), ids).unwrap();
            index.push(ids.len() as u32, std::slice::from_ref(run), *file, *line);
        }
        let info = writer.finish(index).unwrap();
        assert_eq!(info.num_bytes, std::fs::metadata(directory.path().join(&info.name)).unwrap().len());
        (directory, info)
    }

    fn samples(vocab_size: u32) -> impl Strategy<Value = Vec<Sample>> {
        let sample = (prop::collection::vec(0..vocab_size, 1..40), any::<(u32, u32)>(), 0u32..40, 0u32..40);
        prop::collection::vec(sample, 1..12).prop_map(|samples| {
            let cut = |(ids, (file, line), a, b): (Vec<u32>, (u32, u32), u32, u32)| {
                let end = (ids.len() as u32).min(a.max(b));
                let run = a.min(b).min(end)..end;
                (ids, run, file, line)
            };
            samples.into_iter().map(cut).collect()
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))] // each case waits for the disk

        // What goes into a shard comes out of it, for both widths of token ids.
        #[test]
        fn round_trip((vocab_size, samples) in prop_oneof![Just(65_536u32), Just(65_537)].prop_flat_map(|size| (Just(size), samples(size)))) {
            let (directory, info) = write(&samples, vocab_size);
            let shard = Shard::open(directory.path(), &info, TokenType::for_vocab(vocab_size), vocab_size).unwrap();
            for (index, (ids, run, file, line)) in samples.iter().enumerate() {
                prop_assert_eq!(ids, &shard.token_ids(index).to_vec());
                let mask: Vec<_> = (0..ids.len() as u32).map(|token| run.contains(&token)).collect();
                let runs: Vec<_> = shard.label_runs(index).collect();
                let run = (!run.is_empty()).then_some(run.start as usize..run.end as usize);
                prop_assert_eq!(run.into_iter().collect::<Vec<_>>(), runs);
                prop_assert_eq!(mask.iter().skip(1).filter(|&&bit| bit).count() as u64, shard.num_label_tokens(index));
                prop_assert_eq!(mask, shard.label_mask(index).collect::<Vec<_>>());
                prop_assert_eq!((*file, *line), shard.record(index));
            }
        }
    }

    // A shard that is cut at any length, or whose header is changed in any byte, is refused or reads the same; it never
    // panics.
    #[test]
    fn damage_is_refused() {
        let (directory, info) = write(&[(vec![1, 2, 3], 1..3, 0, 7), (vec![4], 0..0, 0, 8)], 100);
        let path = directory.path().join(&info.name);
        let bytes = std::fs::read(&path).unwrap();
        let open = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            let info = ShardInfo { num_bytes: bytes.len() as u64, ..info.clone() };
            Shard::open(directory.path(), &info, TokenType::U16, 100)
        };
        // The header ends with many spaces; a few of them stand for all.
        let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let spaces = bytes[..header].trim_ascii_end().len() + 2..header - 2;
        for length in (0..bytes.len()).filter(|length| !spaces.contains(length)) {
            assert!(open(&bytes[..length]).is_err(), "cut at {length}");
        }
        for at in (0..header).filter(|at| !spaces.contains(at)) {
            for flip in [0x01, 0x80, 0xFF] {
                let mut changed = bytes.clone();
                changed[at] ^= flip;
                if let Ok(shard) = open(&changed) {
                    assert_eq!(vec![1, 2, 3], shard.token_ids(0).to_vec(), "byte {at}");
                }
            }
        }
        std::fs::write(&path, &bytes[1..]).unwrap();
        assert!(
            Shard::open(directory.path(), &info, TokenType::U16, 100)
                .unwrap_err()
                .to_string()
                .contains("as the manifest says")
        );
    }
}
