//! Records of which the same samples came before are left out: the first in the order of the input stays.
//!
//! Same are records whose samples have the same token ids and the same label mask, however they were written. Told by the
//! first 128 bits of BLAKE3 over both: with a billion records, two that differ are taken for the same with a probability
//! below 10^-20. Workers hash, the collector compares in the order of the input, so threads and chunks decide nothing.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ops::Range;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::worker::{Batch, BatchSample};
use crate::error::{Error, ErrorKind, Position};
use crate::sampler::Tally;

/// What becomes of a record of which the same samples came before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Duplicates {
    /// It is trained on as any other.
    #[default]
    Keep,
    /// It is left out and counted.
    Drop,
}

impl Duplicates {
    /// The policy of this name.
    pub fn named(name: &str) -> Option<Self> {
        [Self::Keep, Self::Drop].into_iter().find(|policy| policy.as_str() == name)
    }

    /// Its name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Keep => "keep",
            Self::Drop => "drop",
        }
    }
}

/// The first 128 bits of a hash of samples.
pub type SamplesHash = [u8; 16];

/// One record of a [`Batch`] that became samples.
#[derive(Debug, Serialize, Deserialize)]
pub struct BatchRecord {
    pub hash: SamplesHash,
    pub num_samples: usize,
    pub position: Position,
    /// What is to be reported of it.
    pub tally: Tally,
    pub is_reused: bool,
    /// Rejects of the batch that came before it.
    pub num_rejects_before: usize,
}

/// The hash of the samples of one record.
pub fn hash(samples: &[BatchSample], mut ids: &[u32], mut runs: &[Range<u32>]) -> SamplesHash {
    let mut hasher = blake3::Hasher::new();
    for sample in samples {
        let (sample_ids, sample_runs);
        (sample_ids, ids) = ids.split_at(sample.num_tokens as usize);
        (sample_runs, runs) = runs.split_at(sample.num_runs as usize);
        hasher.update(&sample.num_tokens.to_le_bytes());
        hasher.update(bytemuck::cast_slice(sample_ids));
        // Runs that touch are one, however they came to be.
        let runs = sample_runs.iter().filter(|run| !run.is_empty());
        let mut bounds: Vec<u32> = Vec::with_capacity(2 * sample.num_runs as usize);
        for run in runs {
            match bounds.last_mut() {
                Some(end) if *end == run.start => *end = run.end,
                _ => bounds.extend([run.start, run.end]),
            }
        }
        hasher.update(&(bounds.len() as u32).to_le_bytes());
        hasher.update(bytemuck::cast_slice(&bounds));
    }
    hasher.finalize().as_bytes()[..16].try_into().expect("of 32 bytes")
}

/// The records that came so far, each with the file and line of its first: 24 bytes a record, and up to 34 more for the
/// table around them.
#[derive(Debug, Default)]
pub struct Seen(HashMap<SamplesHash, (u32, u32)>);

impl Seen {
    /// Takes the records that came before out of a batch. Lines of the batch begin after `num_newlines` of its file.
    pub fn drop_duplicates(&mut self, batch: &mut Batch, num_newlines: u64, path: impl Fn(u32) -> String) {
        let firsts: Vec<Option<(u32, u32)>> = batch
            .records
            .iter()
            .map(|record| match self.0.entry(record.hash) {
                Entry::Occupied(first) => Some(*first.get()),
                Entry::Vacant(place) => {
                    // A line beyond 32 bits is an error of its own as soon as the sample is placed.
                    let line = u32::try_from(num_newlines + record.position.line).unwrap_or(u32::MAX);
                    place.insert((batch.file, line));
                    None
                }
            })
            .collect();
        if firsts.iter().any(Option::is_some) {
            batch.drop_records(&firsts, path);
        }
    }
}

impl Batch {
    /// Takes out the records that have a first one, and rejects them in their order.
    fn drop_records(&mut self, firsts: &[Option<(u32, u32)>], path: impl Fn(u32) -> String) {
        let own_path = path(self.file);
        let mut rejects = std::mem::take(&mut self.rejects).into_iter();
        let mut num_rejects = 0;
        let (samples, runs) = (std::mem::take(&mut self.samples), std::mem::take(&mut self.runs));
        let (mut samples, mut runs) = (samples.into_iter(), runs.into_iter());
        let mut kept: Vec<Range<usize>> = Vec::new();
        let mut from = 0;
        let mut segments = self.segments.iter_mut();
        let (mut segment, mut num_left) = (None, 0);
        for (record, first) in self.records.iter().zip(firsts) {
            while num_left == 0 {
                segment = segments.next();
                num_left = segment.as_ref().map_or(record.num_samples as u64, |segment| segment.num_samples);
            }
            num_left -= record.num_samples as u64;
            for sample in samples.by_ref().take(record.num_samples) {
                let num_tokens = sample.num_tokens as usize;
                let own_runs = runs.by_ref().take(sample.num_runs as usize);
                if first.is_none() {
                    self.runs.extend(own_runs);
                    match kept.last_mut() {
                        Some(last) if last.end == from => last.end += num_tokens,
                        _ => kept.push(from..from + num_tokens),
                    }
                    self.samples.push(sample);
                } else {
                    own_runs.for_each(drop);
                }
                from += num_tokens;
            }
            let Some((file, line)) = *first else { continue };
            if let Some(segment) = &mut segment {
                segment.blake3 = None;
                segment.num_samples -= record.num_samples as u64;
            }
            self.tally -= record.tally;
            self.num_reused -= u64::from(record.is_reused);
            self.rejects.extend(rejects.by_ref().take(record.num_rejects_before - num_rejects));
            num_rejects = record.num_rejects_before;
            let message = format!("the same ids and label mask as of {}:{line}", path(file));
            let error = Error::new(ErrorKind::Duplicate, message);
            self.rejects.push(error.with_path(Path::new(&own_path)).with_position(record.position));
        }
        self.rejects.extend(rejects);
        self.keep_ids(&kept);
    }
}
