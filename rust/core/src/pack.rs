//! Lengths and a capacity become packs: the lengths of a pack are chosen on the histogram, the samples by a shuffle.
//!
//! Integers only; nothing here knows of tokens, files or models. The work falls into two halves:
//!
//! 1. *Which lengths share a pack* is decided on the histogram of lengths (`patterns.rs`), equal packs all at once. So
//!    it takes milliseconds for a thousand samples or a hundred million, and packs hold the same lengths in every epoch.
//!    The method is first fit decreasing, one pack at a time, with a look ahead for two samples that fill the pack to
//!    the last token. First and best fit decreasing (arXiv 2404.10830 packs documents by the latter) leave 0.007 to
//!    0.15 % of all positions free on common mixes. Looking ahead needs at most 0.001 % more packs there than the lower
//!    bound of Martello and Toth (1990), and often no more, so there is nothing left to gain. Where it does not pay,
//!    plain first fit decreasing is taken, which needs at most 11/9 of the fewest packs, and one more (Johnson, 1973).
//! 2. *Which sample stands for a length* and *in what order the packs come* is shuffled by (seed, epoch).
//!
//! The result is a pure function of (lengths, capacity, seed, epoch): the same on every machine and every rank.

use std::fmt;

mod patterns;

use self::patterns::{fewest_packs, num_packs};
use crate::random::{Purpose, Random};

/// Why lengths cannot be packed: the first sample that stands in the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PackError {
    /// The sample has no tokens.
    Empty {
        /// Its number.
        sample: usize,
    },
    /// The sample does not fit into a pack of its own.
    TooLong {
        /// Its number.
        sample: usize,
        /// Its tokens.
        length: u32,
        /// Tokens of a pack.
        capacity: u32,
    },
    /// Sample numbers are 32 bits wide.
    TooMany {
        /// How many there are.
        num_samples: usize,
    },
}

impl PackError {
    /// The same error of other sample numbers: `samples[i]` for i.
    pub fn renumbered(self, samples: &[u32]) -> Self {
        let number = |sample: usize| samples[sample] as usize;
        match self {
            Self::Empty { sample } => Self::Empty { sample: number(sample) },
            Self::TooLong { sample, length, capacity } => Self::TooLong { sample: number(sample), length, capacity },
            Self::TooMany { .. } => self,
        }
    }
}

impl fmt::Display for PackError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PackError::Empty { sample } => write!(f, "sample {sample} has no tokens"),
            PackError::TooLong { sample, length, capacity } => {
                write!(f, "sample {sample} has {length} tokens, but a pack holds {capacity}")
            }
            PackError::TooMany { num_samples } => {
                write!(f, "{num_samples} samples are more than the {} that can be numbered", u32::MAX)
            }
        }
    }
}

impl std::error::Error for PackError {}

/// Packs of sample numbers, stored flat: 4 bytes a sample and 4 bytes a pack.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packing {
    /// `offsets[i]..offsets[i + 1]` is the range of pack `i` in `samples`; 32 bits suffice, as for sample numbers.
    offsets: Vec<u32>,
    samples: Vec<u32>,
    num_tokens: u64,
}

impl Packing {
    /// Number of packs.
    pub fn len(&self) -> usize {
        self.offsets.len() - 1
    }

    /// Whether there are no packs, which is so for no samples only.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The sample numbers of pack `index`, never none.
    ///
    /// # Panics
    /// If `index >= self.len()`.
    pub fn get(&self, index: usize) -> &[u32] {
        &self.samples[self.offsets[index] as usize..self.offsets[index + 1] as usize]
    }

    /// The packs in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &[u32]> {
        self.offsets.windows(2).map(|range| &self.samples[range[0] as usize..range[1] as usize])
    }

    /// The same packs of other sample numbers: `samples[i]` for i.
    ///
    /// # Panics
    /// If there is no number for a sample.
    pub fn renumbered(mut self, samples: &[u32]) -> Packing {
        self.samples.iter_mut().for_each(|sample| *sample = samples[*sample as usize]);
        self
    }

    /// The flat arrays: where each pack begins in the sample numbers, and, last, how many these are; the sample numbers.
    pub fn into_parts(self) -> (Vec<u32>, Vec<u32>) {
        (self.offsets, self.samples)
    }

    /// Tokens of all samples.
    pub fn num_tokens(&self) -> u64 {
        self.num_tokens
    }

    /// The part of all positions that holds a token, 0 to 1; 1 when there are no packs, since nothing is wasted.
    pub fn fill_ratio(&self, capacity: u32) -> f64 {
        if self.is_empty() {
            return 1.0;
        }
        self.num_tokens as f64 / (self.len() as f64 * f64::from(capacity))
    }
}

/// Packs `lengths` (tokens of each sample) into rows of at most `capacity` tokens.
///
/// Every sample is in exactly one pack. Beyond its input and its result it takes 4 bytes a sample, twice that when
/// lengths reach 65,536, and a little for each distinct length.
///
/// # Errors
/// [`PackError`] if a sample is empty or too long, or if there are more than [`u32::MAX`].
///
/// ```
/// let packing = sft_fast_core::pack::pack(&[6, 3, 5, 2], 8, 42, 0)?;
/// assert_eq!(packing.len(), 2); // 6 + 2 and 5 + 3
/// assert_eq!(packing.fill_ratio(8), 1.0);
/// # Ok::<(), sft_fast_core::pack::PackError>(())
/// ```
pub fn pack(lengths: &[u32], capacity: u32, seed: u64, epoch: u64) -> Result<Packing, PackError> {
    let num_tokens = check(lengths, capacity)?;
    let mut by_length = sorted_by_length(lengths);

    // One bucket a distinct length, longest first. A bucket is shuffled, then handed out from its front.
    let mut random = Random::new(seed, epoch, Purpose::Samples);
    let mut histogram = Vec::new();
    let mut next = Vec::new();
    let mut start = 0;
    for bucket in by_length.chunk_by_mut(|&a, &b| lengths[a as usize] == lengths[b as usize]) {
        random.shuffle(bucket);
        histogram.push((lengths[bucket[0] as usize], bucket.len() as u32));
        next.push(start);
        start += bucket.len();
    }

    let patterns = fewest_packs(&histogram, capacity, num_tokens);
    let mut packs = Vec::with_capacity(num_packs(&patterns) as usize + 1);
    for (number, pattern) in patterns.iter().enumerate() {
        packs.resize(packs.len() + pattern.num_packs as usize, number as u32);
    }
    Random::new(seed, epoch, Purpose::Packs).shuffle(&mut packs);

    let mut samples = Vec::with_capacity(lengths.len());
    // The list of packs becomes the list of their ends in place.
    for pack in &mut packs {
        for run in &patterns[*pack as usize].runs {
            let from = &mut next[run.bucket];
            samples.extend_from_slice(&by_length[*from..*from + run.num_samples as usize]);
            *from += run.num_samples as usize;
        }
        *pack = samples.len() as u32;
    }
    packs.insert(0, 0);
    Ok(Packing { offsets: packs, samples, num_tokens })
}

/// The unpacked mode: one sample a row, all rows in shuffled order. Lengths are checked as by [`pack`].
///
/// # Errors
/// [`PackError`] if a sample is empty or too long, or if there are more than [`u32::MAX`].
pub fn rows(lengths: &[u32], capacity: u32, seed: u64, epoch: u64) -> Result<Packing, PackError> {
    let num_tokens = check(lengths, capacity)?;
    let num_samples = lengths.len() as u32;
    let mut samples: Vec<u32> = (0..num_samples).collect();
    Random::new(seed, epoch, Purpose::Samples).shuffle(&mut samples);
    Ok(Packing { offsets: (0..=num_samples).collect(), samples, num_tokens })
}

/// The preconditions that both modes share; returns the sum of lengths.
fn check(lengths: &[u32], capacity: u32) -> Result<u64, PackError> {
    if u32::try_from(lengths.len()).is_err() {
        return Err(PackError::TooMany { num_samples: lengths.len() });
    }
    let mut num_tokens = 0;
    for (sample, &length) in lengths.iter().enumerate() {
        if length == 0 {
            return Err(PackError::Empty { sample });
        }
        if length > capacity {
            return Err(PackError::TooLong { sample, length, capacity });
        }
        num_tokens += u64::from(length);
    }
    Ok(num_tokens)
}

/// Sample numbers, longest sample first, equal lengths in order of number.
///
/// A radix sort by 16-bit digits: one pass for lengths below 65,536, else two, and never a table as long as the
/// longest sample.
fn sorted_by_length(lengths: &[u32]) -> Vec<u32> {
    let scatter = |digit: &dyn Fn(u32) -> usize, from: &mut dyn Iterator<Item = u32>| -> Vec<u32> {
        let mut positions = vec![0_u32; 1 << 16];
        for &length in lengths {
            positions[digit(length)] += 1;
        }
        let mut before = 0;
        for position in &mut positions {
            (*position, before) = (before, before + *position);
        }
        let mut sorted = vec![0; lengths.len()];
        for sample in from {
            let position = &mut positions[digit(lengths[sample as usize])];
            sorted[*position as usize] = sample;
            *position += 1;
        }
        sorted
    };
    let low = scatter(&|length| usize::from(!(length as u16)), &mut (0..lengths.len() as u32));
    if lengths.iter().all(|&length| length < 1 << 16) {
        return low;
    }
    scatter(&|length| usize::from(!((length >> 16) as u16)), &mut low.into_iter())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;

    fn tokens(lengths: &[u32], pack: &[u32]) -> u32 {
        pack.iter().map(|&sample| lengths[sample as usize]).sum()
    }

    fn pack_lengths(lengths: &[u32], packing: &Packing) -> Vec<Vec<u32>> {
        packing.iter().map(|pack| pack.iter().map(|&sample| lengths[sample as usize]).collect()).collect()
    }

    /// Lengths with a capacity that holds them: few distinct lengths, many, and lengths of more than 16 bits.
    fn lengths_and_capacity() -> impl Strategy<Value = (Vec<u32>, u32)> {
        let long = prop_oneof![1_u32..1_000, 65_530..65_540_u32, 131_070..200_000_u32];
        prop_oneof![
            (vec(1_u32..=9, 0..200), 9_u32..40),
            (vec(1_u32..=500, 0..300), 500_u32..2_000),
            (vec(long, 0..100), 200_000_u32..400_000),
        ]
    }

    proptest! {
        /// Each sample is in exactly one pack, no pack is empty or over capacity, and tokens are conserved.
        #[test]
        fn packs_partition_the_samples((lengths, capacity) in lengths_and_capacity(), seed: u64, epoch: u64) {
            for packing in [pack(&lengths, capacity, seed, epoch), rows(&lengths, capacity, seed, epoch)] {
                let packing = packing.unwrap();
                let mut seen: Vec<u32> = packing.iter().flatten().copied().collect();
                seen.sort_unstable();
                prop_assert_eq!(seen, (0..lengths.len() as u32).collect::<Vec<_>>());
                prop_assert!(packing.iter().all(|pack| !pack.is_empty() && tokens(&lengths, pack) <= capacity));
                prop_assert_eq!(packing.num_tokens(), lengths.iter().map(|&length| u64::from(length)).sum::<u64>());
                prop_assert!((0..packing.len()).map(|index| packing.get(index)).eq(packing.iter()));
            }
            prop_assert_eq!(rows(&lengths, capacity, seed, epoch).unwrap().len(), lengths.len());
        }

        /// Seed and epoch change who stands where, never which lengths share a pack.
        #[test]
        fn the_lengths_of_packs_do_not_depend_on_the_seed((lengths, capacity) in lengths_and_capacity(), seed: u64) {
            let sorted = |seed, epoch| {
                let mut packs = pack_lengths(&lengths, &pack(&lengths, capacity, seed, epoch).unwrap());
                packs.sort_unstable();
                packs
            };
            prop_assert_eq!(sorted(seed, 0), sorted(seed.wrapping_add(1), 5));
        }

        /// The radix sort orders like a stable sort by falling length.
        #[test]
        fn samples_sort_by_length((lengths, _) in lengths_and_capacity()) {
            let mut expected: Vec<u32> = (0..lengths.len() as u32).collect();
            expected.sort_by_key(|&sample| std::cmp::Reverse(lengths[sample as usize]));
            prop_assert_eq!(sorted_by_length(&lengths), expected);
        }
    }

    /// The same arguments give the same packs; another seed or epoch gives other packs in another order.
    #[test]
    fn seed_and_epoch_decide_the_order() {
        let lengths: Vec<u32> = (0..500).map(|sample| 1 + sample % 7).collect();
        for mode in [pack, rows] {
            let first = mode(&lengths, 20, 42, 0).unwrap();
            assert_eq!(first, mode(&lengths, 20, 42, 0).unwrap());
            for (seed, epoch) in [(42, 1), (43, 0), (0, 42)] {
                assert_ne!(first, mode(&lengths, 20, seed, epoch).unwrap());
            }
        }
        let order = |epoch| pack_lengths(&lengths, &pack(&lengths, 20, 42, epoch).unwrap());
        assert_ne!(order(0), order(1));
    }

    /// A plan made today is the plan made on any machine and by any later version: these packs are pinned.
    #[test]
    fn packs_of_a_seed_never_change() {
        let packing = pack(&[5, 3, 8, 2, 2, 6, 4, 1, 3, 5], 10, 42, 3).unwrap();
        assert_eq!(packing.iter().collect::<Vec<_>>(), [&[9, 0][..], &[1, 8, 4, 7], &[5, 6], &[2, 3]]);
        assert_eq!(rows(&[1; 6], 1, 42, 3).unwrap().samples, [1, 4, 3, 5, 2, 0]);
    }

    /// No samples make no packs, and lengths that cannot be packed are refused by number.
    #[test]
    fn limits_are_checked() {
        let none = pack(&[], 8, 0, 0).unwrap();
        assert!(none.is_empty() && none.fill_ratio(8) == 1.0);
        for mode in [pack, rows] {
            assert_eq!(mode(&[1, 0, 9], 8, 0, 0), Err(PackError::Empty { sample: 1 }));
            assert_eq!(mode(&[8, 9, 0], 8, 0, 0), Err(PackError::TooLong { sample: 1, length: 9, capacity: 8 }));
        }
        assert_eq!(pack(&[u32::MAX, u32::MAX], u32::MAX, 0, 0).unwrap().len(), 2);
    }
}
