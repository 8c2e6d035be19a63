//! What can be known of every sample of a dataset in one pass over its bytes: for statistics, comparison and duplicates.

use std::hash::{BuildHasher, Hasher};
use std::ops::Range;

use foldhash::quality::FixedState;

use crate::dataset::Dataset;
use crate::shard::TokenIds;

/// One entry a sample in each list, in the order of the samples.
#[derive(Debug, Default)]
pub struct Survey {
    /// Tokens with a loss.
    pub num_label_tokens: Vec<u32>,
    /// Runs of tokens that are trained on: the answers.
    pub num_label_runs: Vec<u32>,
    /// Hashes of the token ids; equal for equal ids, whatever the width that they are stored with.
    pub ids_hashes: Vec<u64>,
    /// Hashes of the label mask.
    pub mask_hashes: Vec<u64>,
    /// Numbers of the files in the manifest.
    pub files: Vec<u32>,
    /// Lines of the records, from 1.
    pub lines: Vec<u32>,
}

/// Reads all samples, on all cores: 32 bytes a sample are kept.
pub fn survey(dataset: &Dataset) -> Survey {
    let num_threads = std::thread::available_parallelism().map_or(1, usize::from);
    let part = dataset.num_samples().div_ceil(num_threads).max(1);
    let mut whole = Survey::default();
    std::thread::scope(|scope| {
        let starts = (0..dataset.num_samples()).step_by(part);
        let threads: Vec<_> = starts
            .map(|start| scope.spawn(move || survey_range(dataset, start..(start + part).min(dataset.num_samples()))))
            .collect();
        for thread in threads {
            let survey = thread.join().expect("reading samples does not panic");
            whole.num_label_tokens.extend(survey.num_label_tokens);
            whole.num_label_runs.extend(survey.num_label_runs);
            whole.ids_hashes.extend(survey.ids_hashes);
            whole.mask_hashes.extend(survey.mask_hashes);
            whole.files.extend(survey.files);
            whole.lines.extend(survey.lines);
        }
    });
    whole
}

fn survey_range(dataset: &Dataset, range: Range<usize>) -> Survey {
    let state = FixedState::with_seed(0);
    let mut survey = Survey::default();
    for sample in range.map(|number| dataset.sample(number)) {
        let mut ids_hasher = state.build_hasher();
        // This hash takes zeros at the end for nothing: the length tells `[0]` from `[0, 0]`.
        ids_hasher.write_usize(sample.token_ids.len());
        match sample.token_ids {
            TokenIds::U16(ids) => ids.iter().for_each(|&id| ids_hasher.write_u32(id.into())),
            TokenIds::U32(ids) => ids.iter().for_each(|&id| ids_hasher.write_u32(id)),
        }
        let (mut mask_hasher, mut num_runs) = (state.build_hasher(), 0);
        for run in sample.label_runs() {
            mask_hasher.write_usize(run.start);
            mask_hasher.write_usize(run.end);
            num_runs += 1;
        }
        mask_hasher.write_u32(num_runs);
        let (file, line) = sample.record();
        // A sample has less than 2^32 tokens, as a shard has.
        survey.num_label_tokens.push(u32::try_from(sample.num_label_tokens()).unwrap_or(u32::MAX));
        survey.num_label_runs.push(num_runs);
        survey.ids_hashes.push(ids_hasher.finish());
        survey.mask_hashes.push(mask_hasher.finish());
        survey.files.push(file);
        survey.lines.push(line);
    }
    survey
}
