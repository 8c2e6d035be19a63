//! Rows of samples → the arrays of a micro-batch, written into memory that the caller owns.

use std::ops::Range;

use crate::dataset::Dataset;
use crate::shard::TokenIds;

/// Label of a position without a loss, as in PyTorch and `transformers`.
pub const IGNORE_INDEX: i64 = -100;

/// The arrays of a micro-batch: row-major `[num_rows, width]`, all of the same length.
#[derive(Debug)]
pub struct Arrays<'a> {
    /// Token ids; the manifest's `pad_token_id` where a row has no token.
    pub input_ids: &'a mut [i64],
    /// Targets; [`IGNORE_INDEX`] where there is no loss.
    pub labels: &'a mut [i64],
    /// Position of each token in its sample, from 0; padding counts from 0 too.
    pub position_ids: &'a mut [i64],
}

/// Where the segments of a micro-batch lie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segments {
    /// Bounds of the segments in the flattened rows: every sample is one, and so is the padding behind the last of a row.
    pub cu_seqlens: Vec<i32>,
    /// Tokens of the longest segment.
    pub max_seqlen: i32,
    /// Positions with a loss.
    pub num_label_tokens: u64,
}

/// Fills `arrays` with `rows`, each a list of sample numbers whose tokens fit into `width` together.
///
/// `shift_labels`: `labels[t]` is the target of position `t`, the next token of the same sample. Otherwise `labels[t]`
/// belongs to token `t` and the model shifts, as `transformers` does; the first token of a sample never has a label then,
/// so that no sample is predicted from the one before it.
///
/// # Panics
/// If a sample number is too large, a row does not fit, the arrays have another size than `rows.len() * width`, or that
/// number of tokens is 2^31 or more.
pub fn fill(dataset: &Dataset, rows: &[&[u32]], width: usize, shift_labels: bool, arrays: Arrays<'_>) -> Segments {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has what the function is compiled for.
        #[allow(unsafe_code)]
        return unsafe { fill_avx2(dataset, rows, width, shift_labels, arrays) };
    }
    fill_plain(dataset, rows, width, shift_labels, arrays)
}

/// The same code with wider instructions: half as many again tokens a second.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn fill_avx2(dataset: &Dataset, rows: &[&[u32]], width: usize, shift_labels: bool, arrays: Arrays<'_>) -> Segments {
    fill_plain(dataset, rows, width, shift_labels, arrays)
}

/// What [`fill`] does, for any processor.
#[inline(always)]
pub(crate) fn fill_plain(
    dataset: &Dataset,
    rows: &[&[u32]],
    width: usize,
    shift_labels: bool,
    arrays: Arrays<'_>,
) -> Segments {
    let num_tokens = rows.len() * width;
    assert!(i32::try_from(num_tokens).is_ok(), "a micro-batch of {num_tokens} tokens is too large");
    assert_eq!([num_tokens; 3], [arrays.input_ids.len(), arrays.labels.len(), arrays.position_ids.len()]);
    let Arrays { input_ids, labels, position_ids } = arrays;
    let mut segments = Segments { cu_seqlens: vec![0], max_seqlen: 0, num_label_tokens: 0 };
    for (row_number, row) in rows.iter().enumerate() {
        let row_range = row_number * width..(row_number + 1) * width;
        let mut at = row_range.start;
        for &number in *row {
            let sample = dataset.sample(number as usize);
            let range = at..at + sample.token_ids.len();
            assert!(range.end <= row_range.end, "row {row_number} does not fit into {width} tokens");
            let ids = &mut input_ids[range.clone()];
            match sample.token_ids {
                TokenIds::U16(tokens) => ids.iter_mut().zip(tokens).for_each(|(id, &token)| *id = token.into()),
                TokenIds::U32(tokens) => ids.iter_mut().zip(tokens).for_each(|(id, &token)| *id = token.into()),
            }
            segments.num_label_tokens +=
                fill_labels(&mut labels[range.clone()], ids, sample.label_runs(), shift_labels);
            at = segments.close(range, position_ids);
        }
        if at < row_range.end {
            input_ids[at..row_range.end].fill(dataset.manifest().pad_token_id.into());
            labels[at..row_range.end].fill(IGNORE_INDEX);
            segments.close(at..row_range.end, position_ids);
        }
    }
    segments
}

// Inlined, as are the others, so that they are compiled for the instructions of their caller.

/// Writes the labels of one sample, whose tokens are trained on in `runs`; the number of those with a loss.
#[inline(always)]
fn fill_labels(labels: &mut [i64], ids: &[i64], runs: impl Iterator<Item = Range<usize>>, shift_labels: bool) -> u64 {
    let shift = usize::from(shift_labels);
    let (mut done, mut num_label_tokens) = (0, 0);
    // Nothing predicts the first token.
    for run in runs.map(|run| run.start.max(1)..run.end).filter(|run| !run.is_empty()) {
        let to = run.start - shift..run.end - shift;
        labels[done..to.start].fill(IGNORE_INDEX);
        done = to.end;
        num_label_tokens += run.len() as u64;
        labels[to].copy_from_slice(&ids[run]);
    }
    labels[done..].fill(IGNORE_INDEX);
    num_label_tokens
}

impl Segments {
    #[inline(always)]
    fn close(&mut self, range: Range<usize>, position_ids: &mut [i64]) -> usize {
        let end = range.end;
        self.max_seqlen = self.max_seqlen.max(range.len() as i32);
        self.cu_seqlens.push(end as i32);
        position_ids[range].iter_mut().zip(0..).for_each(|(position, index)| *position = index);
        end
    }
}
