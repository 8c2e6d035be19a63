//! Measures packing and planning: fill, speed, memory and balance, after checking the answers.
//!
//! `cargo bench --bench pack` packs the five length mixes at their own size, at 1 and at 10 million samples; `-- --large`
//! adds 100 million. Every figure is for one core. Peak memory is of the whole process while it packs, lengths included.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::time::Instant;

use sft_fast_core::pack::{Packing, pack, rows};
use sft_fast_core::plan::{CostModel, Imbalance, StepPlanner, imbalance, row_cost};

/// A log-normal mix of lengths. Longer samples than `capacity` are cut to it, or left out if `drop_longer`.
struct Mix {
    name: &'static str,
    median: f64,
    sigma: f64,
    shortest: u32,
    capacity: u32,
    drop_longer: bool,
    num_samples: usize,
}

const fn mix(name: &'static str, median: f64, sigma: f64, shortest: u32, capacity: u32) -> Mix {
    Mix { name, median, sigma, shortest, capacity, drop_longer: false, num_samples: 200_000 }
}

const fn long_mix(capacity: u32) -> Mix {
    Mix { drop_longer: true, num_samples: 50_000, ..mix("reasoning", 6_000.0, 0.8, 200, capacity) }
}

const MIXES: [Mix; 5] = [
    mix("alpaca", 90.0, 0.75, 16, 2_048),
    mix("chat", 309.0, 0.75, 20, 4_096),
    mix("tulu", 650.0, 0.95, 32, 8_192),
    long_mix(32_768),
    long_mix(16_384),
];

/// Forward FLOPs of decoders: 2 · parameters · L + 2 · hidden size · layers · L².
const MODELS: [(&str, CostModel); 2] = [
    ("8B", CostModel { linear: 2 * 8_030_000_000, quadratic: 2 * 4_096 * 32 }),
    ("0.6B", CostModel { linear: 2 * 440_000_000, quadratic: 2 * 2_048 * 28 }),
];

impl Mix {
    fn lengths(&self, num_samples: usize) -> Vec<u32> {
        let mut state = 88_172_645_463_325_252_u64;
        let mut uniform = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            ((state >> 11) as f64 + 0.5) / (1_u64 << 53) as f64
        };
        let mut lengths = Vec::with_capacity(num_samples);
        while lengths.len() < num_samples {
            let normal = (-2.0 * uniform().ln()).sqrt() * (std::f64::consts::TAU * uniform()).cos();
            let length = (self.median * (self.sigma * normal).exp()) as u32;
            if length <= self.capacity || !self.drop_longer {
                lengths.push(length.clamp(self.shortest, self.capacity));
            }
        }
        lengths
    }
}

/// Stops unless each sample is in exactly one pack and no pack exceeds `capacity`.
fn check(lengths: &[u32], capacity: u32, packing: &Packing) {
    let mut seen = vec![false; lengths.len()];
    for pack in packing.iter() {
        let tokens: u32 = pack.iter().map(|&sample| lengths[sample as usize]).sum();
        assert!(tokens <= capacity, "a pack has {tokens} tokens");
        for &sample in pack {
            assert!(!std::mem::replace(&mut seen[sample as usize], true), "sample {sample} is packed twice");
        }
    }
    assert!(seen.into_iter().all(|seen| seen), "a sample is not packed");
}

/// Packs of best fit decreasing, done one sample at a time.
fn best_fit_packs(lengths: &[u32], capacity: u32) -> usize {
    let mut sorted = lengths.to_vec();
    sorted.sort_unstable_by(|a, b| b.cmp(a));
    let mut num_packs_by_room: BTreeMap<u32, usize> = BTreeMap::new();
    for length in sorted {
        let room = num_packs_by_room.range(length..).next().map(|(&room, _)| room);
        if let Some(room) = room {
            let num_packs = num_packs_by_room.remove(&room).unwrap();
            if num_packs > 1 {
                num_packs_by_room.insert(room, num_packs - 1);
            }
        }
        *num_packs_by_room.entry(room.unwrap_or(capacity) - length).or_default() += 1;
    }
    num_packs_by_room.values().sum()
}

/// No packing has fewer packs: the bound L2 of S. Martello and P. Toth ("Lower bounds and reduction procedures for the
/// bin packing problem", 1990). For any threshold, samples over half the capacity stand alone, and those between the
/// threshold and half fill at best what room is left beside those that leave room for the threshold.
fn least_packs(lengths: &[u32], capacity: u32) -> u64 {
    let capacity = capacity as usize;
    let (mut count, mut tokens) = (vec![0_u64; capacity + 2], vec![0_u64; capacity + 2]);
    for &length in lengths {
        count[length as usize + 1] += 1;
        tokens[length as usize + 1] += u64::from(length);
    }
    for length in 1..capacity + 2 {
        count[length] += count[length - 1]; // now of samples shorter than `length`
        tokens[length] += tokens[length - 1];
    }
    let half = capacity / 2 + 1;
    let bound = |threshold: usize| {
        let shareable = half..capacity - threshold + 1;
        let room = (count[shareable.end] - count[shareable.start]) * capacity as u64
            - (tokens[shareable.end] - tokens[shareable.start]);
        let medium = tokens[half] - tokens[threshold];
        count[capacity + 1] - count[half] + medium.saturating_sub(room).div_ceil(capacity as u64)
    };
    (0..half).map(bound).max().unwrap_or(0)
}

/// Starts [`peak_megabytes`] anew; does nothing where the system cannot.
fn reset_peak() {
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}

/// Most memory this process has held, in MB; 0 where the system does not tell.
fn peak_megabytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) / 1024
}

/// Seconds of the fastest of `num_runs` runs, and what the last returned.
fn fastest<T>(num_runs: usize, mut run: impl FnMut() -> T) -> (f64, T) {
    let mut timed = || {
        let start = Instant::now();
        let result = run();
        (start.elapsed().as_secs_f64(), result)
    };
    let first = timed();
    (1..num_runs).map(|_| timed()).fold(first, |(best, _), (seconds, result)| (best.min(seconds), result))
}

fn print_packing(mix: &Mix, lengths: &[u32], num_runs: usize) -> Packing {
    reset_peak();
    let (seconds, packing) = fastest(num_runs, || pack(lengths, mix.capacity, 42, 0).unwrap());
    let peak_megabytes = peak_megabytes();
    check(lengths, mix.capacity, &packing);
    let (best_fit, least) = (best_fit_packs(lengths, mix.capacity), least_packs(lengths, mix.capacity));
    assert!(packing.len() >= least as usize && packing.len() <= best_fit, "{least} {} {best_fit}", packing.len());

    let fill = |num_packs: usize| 100.0 * packing.num_tokens() as f64 / (num_packs as f64 * f64::from(mix.capacity));
    println!(
        "{:<9} {:>8} {:>11} {:>10} {:>9.4} {:>11.4} {:>9.4} {:>10.2} {:>13.1} {:>8}",
        mix.name,
        mix.capacity,
        lengths.len(),
        packing.len(),
        fill(packing.len()),
        fill(best_fit),
        fill(least as usize),
        1e3 * seconds,
        lengths.len() as f64 / seconds / 1e6,
        peak_megabytes,
    );
    packing
}

/// Imbalance of 8 ranks; "reference" is with steps planned by `CostModel::REFERENCE` but paid by the model.
fn print_balance(mix: &Mix, lengths: &[u32], packing: &Packing) {
    let costs = |model| -> Vec<u64> {
        let samples = |pack: &[u32]| row_cost(pack.iter().map(|&sample| lengths[sample as usize]), model);
        packing.iter().map(samples).collect()
    };
    for (name, model) in MODELS {
        let row_costs = costs(model);
        for rows_per_rank in [1, 4] {
            let world_size = NonZeroUsize::new(8).unwrap();
            let rows_per_step = NonZeroUsize::new(8 * rows_per_rank).unwrap();
            let (seconds, planner) = fastest(3, || StepPlanner::new(&row_costs, rows_per_step, 42, 0));
            let Imbalance { before, after } = imbalance(&planner, &row_costs, world_size);
            let fixed = StepPlanner::new(&costs(CostModel::REFERENCE), rows_per_step, 42, 0);
            println!(
                "{:<9} {:>8} {:>6} {:>10} {:>7} {:>9.3} {:>8.3} {:>12.3} {:>9.2}",
                mix.name,
                mix.capacity,
                name,
                rows_per_rank,
                planner.num_steps(),
                100.0 * before,
                100.0 * after,
                100.0 * imbalance(&fixed, &row_costs, world_size).after,
                1e3 * seconds,
            );
        }
    }
}

fn main() {
    let large = std::env::args().any(|argument| argument == "--large");
    let most_samples = if large { 100_000_000 } else { 10_000_000 };
    println!(
        "mix       capacity     samples      packs    fill %  best fit %   bound %         ms   M samples/s  peak MB"
    );
    let mut packed = Vec::new();
    for mix in &MIXES {
        let lengths = mix.lengths(mix.num_samples);
        let packing = print_packing(mix, &lengths, 5);
        packed.push((mix, lengths, packing));
    }
    for num_samples in [1_000_000, 10_000_000, 100_000_000].into_iter().filter(|&number| number <= most_samples) {
        for mix in &MIXES {
            print_packing(mix, &mix.lengths(num_samples), if num_samples > 10_000_000 { 1 } else { 3 });
        }
    }

    let lengths = vec![1; 10_000_000];
    let (seconds, unpacked) = fastest(3, || rows(&lengths, 1, 42, 0).unwrap());
    check(&lengths, 1, &unpacked);
    println!("\nunpacked: {} rows, {:.1} M samples/s", unpacked.len(), lengths.len() as f64 / seconds / 1e6);

    println!("\n8 ranks   capacity  model  rows/rank   steps  before %  after %  reference %        ms");
    for (mix, lengths, packing) in &packed {
        print_balance(mix, lengths, packing);
    }
}
