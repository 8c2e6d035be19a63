//! A dataset of samples that were made elsewhere: token ids and label masks in, the same files as of `preprocess` out.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use crate::dataset::Dataset;
use crate::error::{Error, ErrorKind, Result};
use crate::hash::sha256_of_file;
use crate::listing::Listing;
use crate::manifest::{
    DATASET_FORMAT, FORMAT_VERSION, Manifest, Occupant, REJECTED_NAME, Recipe, SEGMENTS_NAME, Segment, Source,
    SourceInfo, quantiles, shard_name,
};
use crate::shard::write::{ShardIndex, ShardWriter, max_tokens};
use crate::shard::{ShardInfo, TokenType};
use crate::staging::Staging;

/// What a dataset of given samples is told about them; see the manifest.
#[derive(Clone, Debug)]
pub struct Description {
    /// Longest sample allowed, in tokens.
    pub sequence_length: u32,
    /// One more than the largest token id allowed.
    pub vocab_size: u32,
    /// Token that fills rows.
    pub pad_token_id: u32,
    /// Directory of the tokenizer that made the ids; empty if it is not known.
    pub tokenizer: String,
}

/// Takes samples one after another and makes a dataset of them, all at once, when it is told to.
pub struct Assembler {
    description: Description,
    staging: Staging,
    target: PathBuf,
    directory: PathBuf,
    token_type: TokenType,
    /// The shard that is being written, and what goes into it behind the tokens.
    shard: (ShardWriter, ShardIndex),
    shards: Vec<ShardInfo>,
    files: Vec<(SourceInfo, blake3::Hasher)>,
    /// Number of samples by length in tokens.
    lengths: BTreeMap<u32, u64>,
    num_samples: u64,
    num_label_tokens: u64,
}

impl Assembler {
    /// Starts a dataset that will be at `target`: a new or an empty directory. `files` are the names of what the samples
    /// come from.
    ///
    /// # Errors
    /// [`ErrorKind::Dataset`] if there is something in `target`; [`ErrorKind::Argument`] for a description that can't be.
    pub fn new(
        target: &Path,
        files: Vec<String>,
        description: Description,
        while_waiting: impl FnMut() -> Result<()>,
    ) -> Result<Self> {
        let Description { vocab_size, pad_token_id, .. } = description;
        if pad_token_id >= vocab_size {
            let message = format!("expected pad_token_id to be below vocab_size {vocab_size}, found {pad_token_id}");
            return Err(Error::new(ErrorKind::Argument, message));
        }
        let staging = Staging::lock(target, while_waiting)?;
        if Occupant::find(target)? != Occupant::Nothing {
            let message = "expected a new or an empty directory, found one with files in it";
            return Err(Error::new(ErrorKind::Dataset, message).with_path(target));
        }
        let token_type = TokenType::for_vocab(vocab_size);
        let info = |path| SourceInfo {
            path,
            num_bytes: 0,
            blake3: String::new(),
            num_records: 0,
            num_samples: 0,
            num_rejected: 0,
            num_tokens: 0,
            num_label_tokens: 0,
        };
        let directory = staging.create()?.to_path_buf();
        Ok(Self {
            shard: new_shard(&directory, 0, token_type)?,
            directory,
            description,
            staging,
            target: target.into(),
            token_type,
            shards: Vec::new(),
            files: files.into_iter().map(|path| (info(path), blake3::Hasher::new())).collect(),
            lengths: BTreeMap::new(),
            num_samples: 0,
            num_label_tokens: 0,
        })
    }

    /// Adds a sample: its token ids, which of them are trained on, the number of its file, and its line there.
    ///
    /// # Errors
    /// [`ErrorKind::Dataset`] for a sample that a dataset can't hold; it says which.
    pub fn push(&mut self, ids: &[u32], mask: &[bool], file: u32, line: u32) -> Result<()> {
        assert_eq!(ids.len(), mask.len());
        let Description { sequence_length, vocab_size, .. } = self.description;
        let refuse = |what: String| {
            let message = format!("{what} in sample {}", self.num_samples);
            Err(Error::new(ErrorKind::Dataset, message))
        };
        if ids.is_empty() {
            return refuse("expected tokens, found none".into());
        }
        if ids.len() > sequence_length as usize {
            return refuse(format!("expected at most {sequence_length} tokens, found {}", ids.len()));
        }
        if let Some(id) = ids.iter().find(|&&id| id >= vocab_size) {
            return refuse(format!("expected token ids below {vocab_size}, found {id}"));
        }
        let num_label_tokens = mask[1..].iter().filter(|&&is_label| is_label).count() as u64;
        if num_label_tokens == 0 {
            return refuse("expected a token to learn behind the first, found none".into());
        }
        let Some((info, hasher)) = self.files.get_mut(file as usize) else {
            return refuse(format!("expected one of {} files, found file {file}", self.files.len()));
        };
        info.num_records += 1;
        info.num_samples += 1;
        info.num_tokens += ids.len() as u64;
        info.num_label_tokens += num_label_tokens;
        info.num_bytes += 4 * ids.len() as u64;
        hasher.update(&(ids.len() as u64).to_le_bytes());
        hasher.update(bytemuck::cast_slice(ids));
        hasher.update(bytemuck::cast_slice(mask));

        let num_tokens = self.shard.1.num_tokens();
        if num_tokens > 0 && num_tokens + ids.len() > max_tokens(self.shards.len()) as usize {
            let next = new_shard(&self.directory, self.shards.len() + 1, self.token_type)?;
            let full = std::mem::replace(&mut self.shard, next);
            self.shards.push(finish_shard(full)?);
        }
        let (writer, index) = &mut self.shard;
        writer.write_tokens(index.num_tokens(), ids)?;
        index.push(ids.len() as u32, &runs(mask), file, line);
        *self.lengths.entry(ids.len() as u32).or_default() += 1;
        self.num_samples += 1;
        self.num_label_tokens += num_label_tokens;
        Ok(())
    }

    /// Puts the dataset in its place.
    pub fn finish(mut self) -> Result<Manifest> {
        let num_samples = self.num_samples;
        if num_samples == 0 {
            return Err(Error::new(ErrorKind::NoRecords, "expected samples, found none"));
        }
        self.shards.push(finish_shard(self.shard)?);
        Listing::create(&self.directory, REJECTED_NAME)?.finish()?;
        let mut segments = Listing::create(&self.directory, SEGMENTS_NAME)?;
        segments.push(&Segment { blake3: None, num_samples, shapes: None })?;
        let Description { sequence_length, vocab_size, pad_token_id, tokenizer } = self.description;
        let tokenizer_file = Path::new(&tokenizer).join("tokenizer.json");
        let recipe = Recipe {
            sequence_length,
            too_long: "reject".into(),
            duplicates: "keep".into(),
            control_tokens: "allow".into(),
            train_on: "all_answers".into(),
            train_on_tool_calls: true,
            train_on_thinking: true,
            dropped_thinking: "keep".into(),
            system_key: None,
            prompt_key: "input_ids".into(),
            query_key: None,
            response_key: "labels".into(),
            history_key: None,
            text_key: "text".into(),
            record_shape: "auto".into(),
            tokenizer_sha256: match tokenizer.is_empty() {
                true => String::new(),
                false => sha256_of_file(&tokenizer_file)?,
            },
            template_sha256: String::new(),
            template_date: None,
        };
        let hashed = |(info, hasher): (SourceInfo, blake3::Hasher)| SourceInfo {
            blake3: hasher.finalize().to_hex().to_string(),
            ..info
        };
        let files: Vec<_> = self.files.into_iter().map(hashed).collect();
        let manifest = Manifest {
            format: DATASET_FORMAT.into(),
            format_version: FORMAT_VERSION,
            fingerprint: recipe.fingerprint(&files),
            recipe,
            tokenizer,
            template: "none".into(),
            template_verdict: serde_json::json!({}),
            vocab_size,
            pad_token_id,
            token_type: self.token_type,
            sources: files.iter().map(|file| Source { name: file.path.clone(), num_files: 1 }).collect(),
            files,
            num_records: num_samples,
            num_samples,
            num_rejected: 0,
            rejected_by_reason: BTreeMap::new(),
            records_by_shape: BTreeMap::new(),
            num_split_samples: 0,
            num_truncated: 0,
            num_cut_answers: 0,
            num_control_text: 0,
            num_skipped_answers: 0,
            num_tokens: self.shards.iter().map(|shard| shard.num_tokens).sum(),
            num_label_tokens: self.num_label_tokens,
            sample_tokens: quantiles(&self.lengths),
            shards: self.shards,
            segments: segments.finish()?,
        };
        manifest.write(&self.directory)?;
        self.staging.publish()?;
        Dataset::open(&self.target)?;
        Ok(manifest)
    }
}

fn new_shard(directory: &Path, number: usize, token_type: TokenType) -> Result<(ShardWriter, ShardIndex)> {
    Ok((ShardWriter::create(directory, shard_name(number), token_type)?, ShardIndex::default()))
}

fn finish_shard((writer, index): (ShardWriter, ShardIndex)) -> Result<ShardInfo> {
    let info = writer.finish(index)?;
    writer.sync()?;
    Ok(info)
}

/// The runs of true values.
fn runs(mask: &[bool]) -> Vec<Range<u32>> {
    let mut runs = Vec::new();
    let mut at = 0;
    for run in mask.chunk_by(|a, b| a == b) {
        let end = at + run.len() as u32;
        if run[0] {
            runs.push(at..end);
        }
        at = end;
    }
    runs
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;
    use crate::batch::{Arrays, fill, fill_plain};

    fn description(vocab_size: u32) -> Description {
        Description { sequence_length: 200, vocab_size, pad_token_id: 1, tokenizer: String::new() }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))] // each case waits for the disk

        // Samples come out as they went in, are proved whole, and fill arrays alike with any instructions.
        #[test]
        fn what_goes_in_comes_out(
            vocab_size in prop_oneof![Just(60_000u32), Just(70_000)],
            samples in vec(vec((0..60_000u32, any::<bool>()), 2..200), 1..12),
            shift_labels: bool,
        ) {
            let root = tempfile::tempdir().unwrap();
            let path = root.path().join("out");
            let files = vec!["a".into(), "b".into()];
            let mut assembler = Assembler::new(&path, files, description(vocab_size), || Ok(())).unwrap();
            let samples: Vec<(Vec<u32>, Vec<bool>)> = samples.into_iter().map(|tokens| {
                let (ids, mut mask): (Vec<_>, Vec<_>) = tokens.into_iter().unzip();
                *mask.last_mut().unwrap() = true;
                (ids, mask)
            }).collect();
            for (number, (ids, mask)) in samples.iter().enumerate() {
                assembler.push(ids, mask, number as u32 % 2, number as u32).unwrap();
            }
            let manifest = assembler.finish().unwrap();
            let dataset = Dataset::open(&path).unwrap();
            dataset.verify(|_| Ok(())).unwrap();
            prop_assert_eq!(&manifest, dataset.manifest());
            for (number, (ids, mask)) in samples.iter().enumerate() {
                let sample = dataset.sample(number);
                prop_assert_eq!(ids, &sample.token_ids.to_vec());
                prop_assert_eq!(mask, &sample.label_mask().collect::<Vec<_>>());
                prop_assert_eq!((["a", "b"][number % 2], number as u32), dataset.source(number).unwrap());
            }

            let rows: Vec<u32> = (0..samples.len() as u32).collect();
            let width = samples.iter().map(|(ids, _)| ids.len()).sum::<usize>() + 3;
            let arrays = |fill: &dyn Fn(Arrays<'_>) -> u64| {
                let mut arrays = [vec![7; width], vec![7; width], vec![7; width]];
                let [input_ids, labels, position_ids] = &mut arrays;
                let num_labels = fill(Arrays { input_ids, labels, position_ids });
                (arrays, num_labels)
            };
            let fast = arrays(&|arrays| fill(&dataset, &[&rows], width, shift_labels, arrays).num_label_tokens);
            let plain = arrays(&|arrays| fill_plain(&dataset, &[&rows], width, shift_labels, arrays).num_label_tokens);
            prop_assert_eq!(manifest.num_label_tokens, fast.1);
            prop_assert_eq!(fast, plain);
        }
    }

    // Given up, or refused in the middle, it leaves nothing.
    #[test]
    fn nothing_is_left() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("here/out");
        let mut assembler = Assembler::new(&path, vec!["a".into()], description(10), || Ok(())).unwrap();
        assembler.push(&[1, 2], &[false, true], 0, 1).unwrap();
        for (ids, mask, file) in
            [(vec![], vec![], 0), (vec![1, 10], vec![false, true], 0), (vec![1, 2], vec![true; 2], 1)]
        {
            assert_eq!(ErrorKind::Dataset, assembler.push(&ids, &mask, file, 1).unwrap_err().kind());
        }
        drop(assembler);
        assert_eq!(0, std::fs::read_dir(root.path()).unwrap().count());
    }
}
