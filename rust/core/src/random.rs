//! Random numbers of a plan: integers only, the same on every machine and in every later version.

/// What random numbers are drawn for; each purpose has its own stream, so that none follows from another.
#[derive(Clone, Copy)]
pub(crate) enum Purpose {
    Samples = 1,
    Packs = 2,
    Steps = 3,
    Mix = 4,
}

/// SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014), keyed by
/// (seed, epoch, purpose). The n-th number is a fixed mix of key + n · constant: 64-bit integers, no platform.
pub(crate) struct Random(u64);

impl Random {
    const INCREMENT: u64 = 0x9e37_79b9_7f4a_7c15;

    pub(crate) fn new(seed: u64, epoch: u64, purpose: Purpose) -> Random {
        let key = [epoch, purpose as u64].into_iter().fold(seed, |key, word| Random(key).next().wrapping_add(word));
        Random(Random(key).next())
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(Random::INCREMENT);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`, each equally likely: the high half of a product, drawn again in the few cases that
    /// would favour some (D. Lemire, "Fast random integer generation in an interval", 2019). `bound` is not 0.
    pub(crate) fn below(&mut self, bound: usize) -> usize {
        let bound = bound as u64;
        loop {
            let product = u128::from(self.next()) * u128::from(bound);
            let low = product as u64;
            if low >= bound || low >= bound.wrapping_neg() % bound {
                return (product >> 64) as usize;
            }
        }
    }

    /// Puts `items` into an order drawn uniformly (Fisher and Yates).
    pub(crate) fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last + 1));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    /// Every order of four items comes up equally often, within five standard deviations.
    #[test]
    fn shuffles_are_uniform() {
        let mut random = Random::new(7, 0, Purpose::Samples);
        let mut counts = BTreeMap::new();
        for _ in 0..24_000 {
            let mut items = [0, 1, 2, 3];
            random.shuffle(&mut items);
            *counts.entry(items).or_insert(0_i32) += 1;
        }
        assert_eq!(counts.len(), 24);
        assert!(counts.values().all(|count| (count - 1000).abs() < 155), "{counts:?}");
    }

    /// The generator is SplitMix64: its first numbers from the state 1234567 are the published ones.
    #[test]
    fn the_generator_is_splitmix64() {
        let mut random = Random(1_234_567);
        assert_eq!([random.next(), random.next()], [6_457_827_717_110_365_317, 3_203_168_211_198_807_973]);
    }

    /// Seed, epoch and purpose each change the numbers, and do not stand in for each other.
    #[test]
    fn streams_differ() {
        let keys =
            [(0, 0, Purpose::Samples), (1, 0, Purpose::Samples), (0, 1, Purpose::Samples), (0, 0, Purpose::Packs)];
        let mut firsts = keys.map(|(seed, epoch, purpose)| Random::new(seed, epoch, purpose).next());
        firsts.sort_unstable();
        assert!(firsts.windows(2).all(|pair| pair[0] != pair[1]));
    }
}
