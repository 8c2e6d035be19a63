//! Opening a dataset and filling micro-batches from it, on one core: `cargo bench -p sft-fast-core --bench batch`.
//!
//! The answer is checked before it is timed. Beside `fill` stands the bound of the machine: copying as many bytes as the
//! arrays of a micro-batch have, with `memcpy`.

use std::hint::black_box;
use std::path::Path;
use std::time::Instant;

use sft_fast_core::assemble::{Assembler, Description};
use sft_fast_core::batch::{Arrays, IGNORE_INDEX, fill};
use sft_fast_core::dataset::Dataset;
use sft_fast_core::pack::pack;
use sft_fast_core::shard::TokenType;

/// Numbers that look random, always the same.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }
}

/// Writes a dataset of samples of `shortest` to `longest` tokens, each of turns: prompt, answer, prompt and so on.
fn write_dataset(directory: &Path, num_samples: usize, shortest: u64, longest: u64, vocab_size: u32) {
    let mut numbers = Numbers(7);
    let description =
        Description { sequence_length: longest as u32, vocab_size, pad_token_id: 0, tokenizer: String::new() };
    let mut assembler = Assembler::new(directory, vec!["data".into()], description, || Ok(())).unwrap();
    let (mut ids, mut mask) = (Vec::new(), Vec::new());
    for sample in 0..num_samples {
        let length = (shortest + numbers.below(longest - shortest + 1)) as usize;
        ids.clear();
        ids.extend((0..length as u32).map(|token| token.wrapping_mul(2_654_435_761) % vocab_size));
        mask.clear();
        while mask.len() < length {
            let turn = |most: usize, numbers: &mut Numbers| 1 + numbers.below(most as u64) as usize;
            mask.resize(mask.len() + turn(length, &mut numbers), false);
            mask.resize(mask.len() + turn(300, &mut numbers), true);
        }
        mask.truncate(length);
        *mask.last_mut().unwrap() = true;
        assembler.push(&ids, &mask, 0, sample as u32 + 1).unwrap();
    }
    assembler.finish().unwrap();
}

/// CPU seconds of this thread, so that other processes do not count; wall time where the system does not tell.
fn cpu_seconds(start: Instant) -> f64 {
    let nanoseconds = std::fs::read_to_string("/proc/thread-self/schedstat").ok();
    let nanoseconds = nanoseconds.and_then(|text| text.split_whitespace().next()?.parse::<u64>().ok());
    nanoseconds.map_or_else(|| start.elapsed().as_secs_f64(), |nanoseconds| nanoseconds as f64 / 1e9)
}

/// CPU seconds of the fastest of some runs.
fn fastest(num_runs: usize, mut run: impl FnMut()) -> f64 {
    let start = Instant::now();
    let seconds = (0..num_runs).map(|_| {
        let before = cpu_seconds(start);
        run();
        cpu_seconds(start) - before
    });
    seconds.fold(f64::INFINITY, f64::min)
}

/// Memory of this process that no file backs, in MB; 0 where the system does not tell.
fn megabytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) / 1000
}

/// Every sample of the dataset once, in packs of `capacity`, `rows` of them in a micro-batch.
fn bench_fill(dataset: &Dataset, capacity: u32, rows: usize) {
    let packing = pack(dataset.lengths(), capacity, 42, 0).unwrap();
    let packs: Vec<&[u32]> = packing.iter().collect();
    let width = capacity as usize;
    let (mut ids, mut labels, mut positions) =
        (vec![0i64; rows * width], vec![0i64; rows * width], vec![0i64; rows * width]);
    let mut num_labels = 0;
    let mut epoch = |shift_labels: bool| {
        num_labels = 0;
        for rows in packs.chunks(rows) {
            let size = rows.len() * width;
            let arrays = Arrays {
                input_ids: &mut ids[..size],
                labels: &mut labels[..size],
                position_ids: &mut positions[..size],
            };
            num_labels += fill(dataset, rows, width, shift_labels, arrays).num_label_tokens;
            black_box((&ids, &labels, &positions));
        }
    };
    let seconds = fastest(15, || epoch(true));
    assert_eq!(dataset.manifest().num_label_tokens, num_labels);
    assert!(labels.iter().any(|&label| label != IGNORE_INDEX));

    // The same bytes, from memory that is as far away as the samples are.
    let num_positions = packs.len() * width;
    let source = vec![1u8; 3 * 8 * rows * width];
    let mut target = vec![0u8; source.len()];
    let copy_seconds = fastest(5, || {
        for _ in 0..packs.len().div_ceil(rows) {
            target.copy_from_slice(black_box(&source));
            black_box(&target);
        }
    });
    let num_tokens = dataset.manifest().num_tokens as f64;
    let token_bytes = match dataset.manifest().token_type {
        TokenType::U16 => 2.0,
        TokenType::U32 => 4.0,
    };
    println!(
        "{:>5} {:>8} {:>5} {:>14.0} {:>16.2} {:>14.2} {:>20.2} {:>16.2}",
        format!("{:?}", dataset.manifest().token_type),
        capacity,
        rows,
        num_tokens / seconds / 1e6,
        4.0 * num_tokens / seconds / 1e9,
        token_bytes * num_tokens / seconds / 1e9,
        24.0 * num_positions as f64 / seconds / 1e9,
        24.0 * num_positions as f64 / copy_seconds / 1e9,
    );
}

fn main() {
    println!(
        "type capacity  rows  M tokens/s  GB/s of int32 ids  GB/s from disk  GB/s into the arrays  GB/s of memcpy"
    );
    for vocab_size in [151_936, 50_000] {
        let directory = tempfile::tempdir().unwrap();
        write_dataset(directory.path(), 200_000, 20, 600, vocab_size);
        let dataset = Dataset::open(directory.path()).unwrap();
        dataset.verify(|_| Ok(())).unwrap();
        for (capacity, rows) in [(4096, 1), (4096, 8), (32_768, 4)] {
            bench_fill(&dataset, capacity, rows);
        }
    }

    println!("\n   samples  shards  ms to open  ms for lengths  MB");
    for num_samples in [1_000_000, 10_000_000] {
        let directory = tempfile::tempdir().unwrap();
        write_dataset(directory.path(), num_samples, 2, 60, 151_936);
        let before = megabytes();
        let open = || drop(black_box(Dataset::open(directory.path()).unwrap()));
        let seconds = fastest(5, || (0..20).for_each(|_| open())) / 20.0;
        let dataset = Dataset::open(directory.path()).unwrap();
        let after = megabytes();
        let start = Instant::now();
        assert_eq!(num_samples, dataset.lengths().len());
        let lengths_seconds = start.elapsed().as_secs_f64();
        println!(
            "{num_samples:>10} {:>7} {:>11.1} {:>15.1} {:>3}",
            dataset.manifest().shards.len(),
            1e3 * seconds,
            1e3 * lengths_seconds,
            after.saturating_sub(before),
        );
    }
}
