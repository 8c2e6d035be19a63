//! Which samples an epoch takes of each source, by its weight and its cap. Integers only, as everything of a plan.
//!
//! The samples of a source are put into an order drawn once for the seed. Its cap takes the first of them, in every epoch
//! the same. Its weight takes each of these a whole number of times, and as many more as are missing from where the last
//! epoch ended, around and around. So a sample is used the floor or the ceiling of weight times in an epoch, and over
//! any epochs in a row no sample of a source is used more than once more than another: with a weight of 0.5, two epochs
//! use each sample exactly once. A part drawn anew in each epoch would leave a quarter of them out of both.
//!
//! The order depends on the seed and on how many samples the source has, so no source changes what is taken of another.

use crate::pack::PackError;
use crate::random::{Purpose, Random};

/// The weight of a source of which each sample is used once an epoch.
pub const WEIGHT_OF_ONE: u64 = 1_000_000;

/// How much of a source is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    /// How often an epoch uses a sample, in millionths.
    pub weight_millionths: u64,
    /// Samples that are used at all; `None`: all of them.
    pub max_samples: Option<u64>,
}

impl Share {
    /// Each sample, once an epoch.
    pub const ALL: Share = Share { weight_millionths: WEIGHT_OF_ONE, max_samples: None };

    /// What an epoch takes of a source of `num_samples`.
    pub fn of(&self, num_samples: u64) -> Taken {
        let num_kept = self.max_samples.map_or(num_samples, |max_samples| max_samples.min(num_samples));
        let weighted = u128::from(num_kept) * u128::from(self.weight_millionths);
        let num_samples = u64::try_from((weighted + u128::from(WEIGHT_OF_ONE / 2)) / u128::from(WEIGHT_OF_ONE));
        Taken { num_kept, num_samples: num_samples.unwrap_or(u64::MAX) }
    }
}

/// What an epoch takes of a source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Taken {
    /// Samples that are used at all.
    pub num_kept: u64,
    /// Samples of an epoch, each counted as often as it comes: `num_kept` times the weight, rounded.
    pub num_samples: u64,
}

impl Taken {
    /// Whether all epochs take the same samples.
    pub fn is_steady(&self) -> bool {
        self.num_kept == 0 || self.num_samples.is_multiple_of(self.num_kept)
    }
}

/// The sample numbers of an epoch, source by source; a sample comes as often as it is used.
///
/// `sources` has the source of each sample, as a number into `shares`. Takes 4 bytes for each sample of the dataset, and
/// for each of the epoch.
///
/// # Errors
/// [`PackError::TooMany`] for more than [`u32::MAX`] samples.
///
/// # Panics
/// If a sample is of a source that has no share.
pub fn epoch_samples(
    sources: impl Iterator<Item = u32>,
    shares: &[Share],
    seed: u64,
    epoch: u64,
) -> Result<Vec<u32>, PackError> {
    let mut members = vec![Vec::new(); shares.len()];
    for (sample, source) in sources.enumerate() {
        members[source as usize].push(sample_number(sample)?);
    }
    let taken: Vec<Taken> =
        shares.iter().zip(&members).map(|(share, members)| share.of(members.len() as u64)).collect();
    let num_samples = taken.iter().fold(0, |sum: u64, taken| sum.saturating_add(taken.num_samples));
    if u32::try_from(num_samples).is_err() {
        return Err(PackError::TooMany { num_samples: num_samples as usize });
    }
    let mut samples = Vec::with_capacity(num_samples as usize);
    for (mut members, taken) in members.into_iter().zip(taken) {
        let num_kept = taken.num_kept as usize;
        if num_kept < members.len() || !taken.is_steady() {
            Random::new(seed, 0, Purpose::Mix).shuffle(&mut members);
            members.truncate(num_kept);
        }
        if num_kept == 0 {
            continue;
        }
        for _ in 0..taken.num_samples as usize / num_kept {
            samples.extend_from_slice(&members);
        }
        let num_more = taken.num_samples % taken.num_kept;
        let first = (u128::from(epoch) * u128::from(num_more) % u128::from(taken.num_kept)) as usize;
        samples.extend(members.iter().cycle().skip(first).take(num_more as usize));
    }
    Ok(samples)
}

/// Sample numbers are 32 bits wide, also where an epoch takes few of the samples.
fn sample_number(sample: usize) -> Result<u32, PackError> {
    u32::try_from(sample).map_err(|_| PackError::TooMany { num_samples: sample + 1 })
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    fn share(weight_millionths: u64, max_samples: Option<u64>) -> Share {
        Share { weight_millionths, max_samples }
    }

    fn uses(samples: &[u32], num_samples: usize) -> Vec<u64> {
        let mut uses = vec![0; num_samples];
        samples.iter().for_each(|&sample| uses[sample as usize] += 1);
        uses
    }

    /// A sample beyond what 32 bits can number is refused, and never taken for another one.
    #[test]
    fn numbers_do_not_wrap() {
        let most = u32::MAX as usize;
        assert_eq!(sample_number(most), Ok(u32::MAX));
        assert_eq!(sample_number(most + 1), Err(PackError::TooMany { num_samples: most + 2 }));
    }

    proptest! {
        /// Each sample that a cap keeps is used floor or ceil of weight times an epoch, an epoch takes the rounded number of
        /// them, and over epochs in a row no sample of a source is used more than once more than another.
        #[test]
        fn weights_are_kept(
            sources in vec(0_u32..3, 0..80),
            shares in vec((0_u64..3_500_000, proptest::option::of(0_u64..40)), 3),
            seed: u64, first_epoch in 0_u64..1 << 60, num_epochs in 1_u64..7,
        ) {
            let shares: Vec<Share> = shares.into_iter().map(|(weight, max)| share(weight, max)).collect();
            let mut total = vec![0; sources.len()];
            for epoch in first_epoch..first_epoch + num_epochs {
                let samples = epoch_samples(sources.iter().copied(), &shares, seed, epoch).unwrap();
                let uses = uses(&samples, sources.len());
                for (number, share) in (0..).zip(&shares) {
                    let of_source: Vec<u64> =
                        uses.iter().zip(&sources).filter(|&(_, &source)| source == number).map(|(&uses, _)| uses).collect();
                    let taken = share.of(of_source.len() as u64);
                    prop_assert_eq!(of_source.iter().sum::<u64>(), taken.num_samples);
                    let weight = share.weight_millionths;
                    let bounds = [0, weight / WEIGHT_OF_ONE, weight.div_ceil(WEIGHT_OF_ONE)];
                    prop_assert!(of_source.iter().all(|uses| bounds.contains(uses)), "{of_source:?} {share:?}");
                    if taken.num_kept as usize == of_source.len() {
                        prop_assert!(of_source.iter().all(|uses| bounds[1..].contains(uses)), "{of_source:?} {share:?}");
                    }
                }
                total.iter_mut().zip(uses).for_each(|(total, uses)| *total += uses);
            }
            for (number, share) in (0..).zip(&shares) {
                let of_source = || total.iter().zip(&sources).filter(|&(_, &source)| source == number).map(|(&uses, _)| uses);
                if share.of(of_source().count() as u64).num_kept as usize == of_source().count() {
                    prop_assert!(of_source().max().unwrap_or(0) - of_source().min().unwrap_or(0) <= 1);
                }
            }
        }

        /// A cap keeps the same samples in all epochs, and a larger one keeps them too.
        #[test]
        fn caps_keep_the_same_samples(num_samples in 1_usize..100, max in 1_u64..100, seed: u64, epoch: u64) {
            let kept = |max, epoch| epoch_samples(std::iter::repeat_n(0, num_samples), &[share(WEIGHT_OF_ONE, Some(max))], seed, epoch).unwrap();
            prop_assert_eq!(kept(max, 0), kept(max, epoch));
            if max as usize + 1 < num_samples {
                prop_assert!(kept(max + 1, 0).starts_with(&kept(max, 0)));
            }
        }

        /// What is taken of a source depends on no other source.
        #[test]
        fn sources_do_not_depend_on_each_other(num in 1_u32..60, others in 0_usize..60, weight in 0_u64..3_000_000, seed: u64, epoch in 0_u64..9) {
            let alone = epoch_samples((0..num).map(|_| 0), &[share(weight, None)], seed, epoch).unwrap();
            let sources = (0..num).map(|_| 0).chain(std::iter::repeat_n(1, others));
            let beside = epoch_samples(sources, &[share(weight, None), share(300_000, Some(7))], seed, epoch).unwrap();
            prop_assert!(beside.starts_with(&alone));
            prop_assert!(beside[alone.len()..].iter().all(|&sample| sample >= num));
        }
    }

    /// Another seed takes another part; these samples are pinned, for a plan made today is that of any later version.
    #[test]
    fn the_part_of_a_seed_never_changes() {
        let part =
            |seed, epoch| epoch_samples(std::iter::repeat_n(0, 10), &[share(400_000, None)], seed, epoch).unwrap();
        assert_eq!([part(42, 0), part(42, 1), part(42, 2)].concat(), [6, 0, 2, 8, 5, 3, 9, 1, 4, 7, 6, 0]);
        assert_ne!(part(42, 0), part(43, 0));
    }

    /// More samples than can be numbered are refused before memory is taken for them.
    #[test]
    fn too_many_are_refused() {
        let shares = [share(u64::MAX, None)];
        assert!(matches!(epoch_samples(std::iter::repeat_n(0, 9), &shares, 0, 0), Err(PackError::TooMany { .. })));
    }
}
