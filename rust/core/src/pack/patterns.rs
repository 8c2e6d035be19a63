//! Which lengths share a pack: a histogram becomes patterns, each a list of lengths and the number of packs that hold
//! them. No sample is known here, so the work depends on the number of distinct lengths alone.

use std::cmp::Ordering;
use std::iter;

/// Samples of equal length, side by side in a pack.
pub(super) struct Run {
    /// Index of the length in the histogram.
    pub(super) bucket: usize,
    pub(super) num_samples: u32,
}

/// Packs that hold the same lengths.
pub(super) struct Pattern {
    /// Longest samples first.
    pub(super) runs: Vec<Run>,
    pub(super) num_packs: u32,
}

/// Packs of all patterns.
pub(super) fn num_packs(patterns: &[Pattern]) -> u64 {
    patterns.iter().map(|pattern| u64::from(pattern.num_packs)).sum()
}

/// Steps of the search for two samples that fill a pack. On mixes of documents 64 find all there is to gain.
const MAX_PROBES: usize = 256;

/// First fit decreasing with or without a look ahead, whichever needs fewer packs.
pub(super) fn fewest_packs(histogram: &[(u32, u32)], capacity: u32, num_tokens: u64) -> Vec<Pattern> {
    let looking_ahead = first_fit_decreasing(histogram, capacity, MAX_PROBES);
    if num_packs(&looking_ahead) == num_tokens.div_ceil(u64::from(capacity)) {
        return looking_ahead; // No packing has fewer.
    }
    let plain = first_fit_decreasing(histogram, capacity, 0);
    if num_packs(&plain) < num_packs(&looking_ahead) { plain } else { looking_ahead }
}

/// First fit decreasing over a histogram of (length, number of samples), longest first.
///
/// What first fit puts into its first pack is the longest sample, then the longest that fits, and so on; then the same
/// goes for the next pack. Looking ahead, up to `max_probes` steps are spent on two samples that fill the room left.
fn first_fit_decreasing(histogram: &[(u32, u32)], capacity: u32, max_probes: usize) -> Vec<Pattern> {
    let mut open = Open::new(histogram);
    iter::from_fn(|| open.next_pattern(capacity, max_probes)).collect()
}

/// Samples that are in no pack yet: the buckets that have some, as a linked list from long to short.
///
/// Past the last bucket stands the end of the list, which is also before its first. A bucket that was left out keeps
/// its way forward, so that the list can be entered anywhere.
struct Open<'a> {
    histogram: &'a [(u32, u32)],
    num_samples: Vec<u32>,
    next: Vec<usize>,
    previous: Vec<usize>,
}

impl Open<'_> {
    fn new(histogram: &[(u32, u32)]) -> Open<'_> {
        let end = histogram.len();
        Open {
            histogram,
            num_samples: histogram.iter().map(|bucket| bucket.1).chain([u32::MAX]).collect(),
            next: (1..=end).chain([0]).collect(),
            previous: iter::once(end).chain(0..end).collect(),
        }
    }

    /// Fills a pack, and more in the same way while samples last. So each call uses up a length, or at least halves it.
    fn next_pattern(&mut self, capacity: u32, max_probes: usize) -> Option<Pattern> {
        let runs = self.fill_pack(capacity, max_probes);
        let num_more = runs.iter().map(|run| self.num_samples[run.bucket] / run.num_samples).min()?;
        for run in &runs {
            self.take(run.bucket, run.num_samples * num_more);
        }
        Some(Pattern { runs, num_packs: 1 + num_more })
    }

    /// Takes the samples of one pack, longest first; none if there are none left.
    fn fill_pack(&mut self, capacity: u32, max_probes: usize) -> Vec<Run> {
        let mut runs: Vec<Run> = Vec::new();
        let mut room = capacity;
        while let Some(longest) = self.longest_up_to(room) {
            let tokens = self.histogram[longest].0;
            // The longest sample is not passed over for a pair, or it would never find its match.
            let may_pair = room < capacity && tokens < room;
            let (first, second) = match if may_pair { self.pair_that_fills(room, max_probes) } else { None } {
                Some((long, short)) => ((long, 1), Some((short, 1))),
                // While there is room for another two of the longest, no pair fills it: those are taken at once.
                None => ((longest, self.num_samples[longest].min((room / tokens - 1).max(1))), None),
            };
            for (bucket, num_samples) in iter::once(first).chain(second) {
                self.take(bucket, num_samples);
                room -= self.histogram[bucket].0 * num_samples;
                match runs.last_mut() {
                    Some(run) if run.bucket == bucket => run.num_samples += num_samples,
                    _ => runs.push(Run { bucket, num_samples }),
                }
            }
        }
        runs
    }

    /// The bucket of the longest sample of at most `room` tokens.
    fn longest_up_to(&mut self, room: u32) -> Option<usize> {
        let entry = self.histogram.partition_point(|bucket| bucket.0 > room);
        let mut bucket = entry;
        while self.num_samples[bucket] == 0 {
            bucket = self.next[bucket];
        }
        // Shortens the way for the next who enters here.
        let mut passed = entry;
        while self.num_samples[passed] == 0 {
            passed = std::mem::replace(&mut self.next[passed], bucket);
        }
        (bucket < self.histogram.len()).then_some(bucket)
    }

    /// The buckets of two samples of `room` tokens together, as equal as can be: short samples are worth keeping.
    fn pair_that_fills(&mut self, room: u32, max_probes: usize) -> Option<(usize, usize)> {
        let mut short = self.longest_up_to(room / 2)?;
        // Two halves may be two samples of one bucket.
        let halves = self.histogram[short].0 * 2 == room && self.num_samples[short] > 1;
        let mut long = if halves { short } else { self.previous[short] };
        for _ in 0..max_probes {
            let (&(long_tokens, _), &(short_tokens, _)) = (self.histogram.get(long)?, self.histogram.get(short)?);
            match (room - short_tokens).cmp(&long_tokens) {
                Ordering::Equal => return Some((long, short)),
                Ordering::Less => short = self.next[short],
                Ordering::Greater => long = self.previous[long],
            }
        }
        None
    }

    /// Takes samples out of a bucket, which must have as many.
    fn take(&mut self, bucket: usize, num_samples: u32) {
        if num_samples > 0 {
            self.num_samples[bucket] -= num_samples;
            if self.num_samples[bucket] == 0 {
                let (previous, next) = (self.previous[bucket], self.next[bucket]);
                self.next[previous] = next;
                self.previous[next] = previous;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;

    /// First fit decreasing one sample at a time, by looking at every pack: the room left in each, sorted.
    fn rooms_one_by_one(lengths: &[u32], capacity: u32) -> Vec<u32> {
        let mut lengths = lengths.to_vec();
        lengths.sort_unstable_by(|a, b| b.cmp(a));
        let mut rooms: Vec<u32> = Vec::new();
        for length in lengths {
            match rooms.iter_mut().find(|room| **room >= length) {
                Some(room) => *room -= length,
                None => rooms.push(capacity - length),
            }
        }
        rooms.sort_unstable();
        rooms
    }

    fn histogram(lengths: &[u32]) -> Vec<(u32, u32)> {
        let mut counts = BTreeMap::new();
        for &length in lengths {
            *counts.entry(length).or_insert(0) += 1;
        }
        counts.into_iter().rev().collect()
    }

    /// The lengths in each pack, sorted.
    fn packs(histogram: &[(u32, u32)], patterns: &[Pattern]) -> Vec<Vec<u32>> {
        let lengths = |run: &Run| vec![histogram[run.bucket].0; run.num_samples as usize];
        let pack = |pattern: &Pattern| pattern.runs.iter().flat_map(lengths).collect();
        let mut packs: Vec<Vec<u32>> =
            patterns.iter().flat_map(|pattern| vec![pack(pattern); pattern.num_packs as usize]).collect();
        packs.sort_unstable();
        packs
    }

    /// Lengths with a capacity that holds them: few distinct ones, or many.
    fn lengths_and_capacity() -> impl Strategy<Value = (Vec<u32>, u32)> {
        prop_oneof![(vec(1_u32..=9, 0..200), 9_u32..40), (vec(1_u32..=500, 0..300), 500_u32..2_000)]
    }

    proptest! {
        /// Without looking ahead, packing the histogram leaves the same rooms as first fit sample by sample.
        #[test]
        fn the_histogram_packs_like_its_samples((lengths, capacity) in lengths_and_capacity()) {
            let histogram = histogram(&lengths);
            let packs = packs(&histogram, &first_fit_decreasing(&histogram, capacity, 0));
            let mut rooms: Vec<u32> = packs.iter().map(|pack| capacity - pack.iter().sum::<u32>()).collect();
            rooms.sort_unstable();
            prop_assert_eq!(rooms, rooms_one_by_one(&lengths, capacity));
        }

        /// Every sample is in one pack, and there are never more packs than first fit decreasing makes.
        #[test]
        fn looking_ahead_never_costs_packs((lengths, capacity) in lengths_and_capacity()) {
            let num_tokens = lengths.iter().map(|&length| u64::from(length)).sum();
            let histogram = histogram(&lengths);
            let patterns = fewest_packs(&histogram, capacity, num_tokens);
            let mut packed = packs(&histogram, &patterns).concat();
            packed.sort_unstable();
            prop_assert_eq!(packed, { let mut sorted = lengths.clone(); sorted.sort_unstable(); sorted });
            prop_assert!(num_packs(&patterns) <= rooms_one_by_one(&lengths, capacity).len() as u64);
        }
    }

    /// Two samples that fill a pack are taken before a longer one that does not, be they of one length or of two.
    #[test]
    fn pairs_fill_packs() {
        let lengths = [5, 4, 3, 3, 3, 2];
        assert_eq!(rooms_one_by_one(&lengths, 10), [1, 1, 8]);
        let histogram = histogram(&lengths);
        assert_eq!(packs(&histogram, &fewest_packs(&histogram, 10, 20)), [[4, 3, 3], [5, 3, 2]]);
    }

    /// A single sample of half the room is not a pair, and the search goes on beside it.
    #[test]
    fn half_a_pair_is_no_pair() {
        let histogram = [(12, 1), (7, 1), (4, 1), (1, 1)];
        assert_eq!(packs(&histogram, &first_fit_decreasing(&histogram, 20, MAX_PROBES)), [vec![4], vec![12, 7, 1]]);
        assert_eq!(Open::new(&histogram).pair_that_fills(8, MAX_PROBES), Some((1, 3)));
        assert_eq!(Open::new(&[(4, 1)]).pair_that_fills(8, MAX_PROBES), None);
        assert_eq!(Open::new(&[(4, 2)]).pair_that_fills(8, MAX_PROBES), Some((0, 0)));
    }
}
