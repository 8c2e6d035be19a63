//! The stages of preprocessing one by one, each in bytes of its own input per second: `cargo bench --bench stages`.
//!
//! The records are generated here, and so is a small tokenizer. `SFT_FAST_BENCH_DATA=FILE.jsonl` and
//! `SFT_FAST_BENCH_MODEL=DIR` take real ones; of the file the first 8 MB are read.

use std::hint::black_box;
use std::ops::Range;
use std::path::PathBuf;
use std::time::Duration;

use criterion::{BatchSize, BenchmarkGroup, Criterion, Throughput, measurement::WallTime};
use sft_fast_core::conversation::{Conversation, FieldMapping};
use sft_fast_core::json;
use sft_fast_core::model::Model;
use sft_fast_core::shard::TokenType;
use sft_fast_core::shard::write::{ShardIndex, ShardWriter};
use sft_fast_core::source::{Chunk, Source};
use sft_fast_core::template::Rendered;
use sft_fast_core::tokenize::fast::{FastTokenizer, Scratch};
use sft_fast_core::tokenize::{Input, Tokens};

#[path = "../rust/core/src/tokenize/fast/families.rs"]
#[allow(dead_code)]
mod families;

const NUM_BYTES: usize = 8_000_000;

/// Lines of JSON: pieces of the small tokenizers' sample in new orders, with numbers and made-up words among them.
fn generated() -> String {
    let words: Vec<&str> = families::SAMPLE.split_inclusive(' ').collect();
    let mut state = 88_172_645_463_325_252_u64;
    let mut below = |bound: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) as usize % bound
    };
    let mut text = |num_words: usize| -> String {
        (0..num_words)
            .map(|_| match below(12) {
                0 => format!("{} ", below(100_000)),
                1 => format!("{} ", [words[below(words.len())].trim(), words[below(words.len())].trim()].concat()),
                _ => words[below(words.len())].to_owned(),
            })
            .collect()
    };
    let mut lines = String::new();
    let mut number = 0;
    while lines.len() < NUM_BYTES {
        number += 1;
        let (user, answer) = (text(10 + number % 50), text(40 + number * 7 % 300));
        let record = match number % 2 {
            0 => serde_json::json!({"instruction": user, "output": answer}),
            _ => serde_json::json!({"messages": [
                {"role": "system", "content": "You are a helpful assistant."},
                {"role": "user", "content": user},
                {"role": "assistant", "content": answer},
            ]}),
        };
        lines.push_str(&format!("{record}\n"));
    }
    lines
}

fn lines() -> String {
    let Some(path) = std::env::var_os("SFT_FAST_BENCH_DATA") else { return generated() };
    let mut bytes = std::fs::read(&path).expect("SFT_FAST_BENCH_DATA is a file");
    bytes.truncate(NUM_BYTES);
    bytes.truncate(bytes.iter().rposition(|&byte| byte == b'\n').expect("it has lines") + 1);
    String::from_utf8(bytes).expect("it is UTF-8")
}

/// The model directory, and its template: its own, or a named one where it has none.
fn model(scratch: &tempfile::TempDir) -> (PathBuf, Model) {
    let directory = std::env::var_os("SFT_FAST_BENCH_MODEL").map_or_else(
        || {
            let (_, qwen2) = families::families().into_iter().find(|family| family.0 == "qwen2").expect("a family");
            let json = families::tokenizer_json(&qwen2, families::VARIANTS[0]);
            std::fs::write(scratch.path().join("tokenizer.json"), json).expect("room for a file");
            scratch.path().to_owned()
        },
        PathBuf::from,
    );
    let load = |template| Model::load(&directory, template, Some("2026-01-31"));
    let model = load("native").or_else(|_| load("chatml")).expect("SFT_FAST_BENCH_MODEL is a model directory");
    (directory, model)
}

fn bench(group: &mut BenchmarkGroup<'_, WallTime>, name: &str, num_bytes: usize, mut run: impl FnMut()) {
    group.throughput(Throughput::Bytes(num_bytes as u64));
    group.bench_function(name, |bencher| bencher.iter(&mut run));
}

fn main() {
    let mut criterion = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_secs(1))
        .measurement_time(Duration::from_secs(2))
        .configure_from_args();
    let mut group = criterion.benchmark_group("stages");
    let scratch = tempfile::tempdir().expect("a directory");
    let (directory, model) = model(&scratch);
    let fast = std::fs::read(directory.join("tokenizer.json")).map(|json| FastTokenizer::from_json(&json));
    let fast =
        fast.expect("it was read before").unwrap_or_else(|reason| panic!("no tokenizer for these stages: {reason}"));
    let lines = lines();
    let path = scratch.path().join("lines.jsonl");
    std::fs::write(&path, &lines).expect("room for a file");

    let open =
        || Source::open(std::slice::from_ref(&path), 1 << 20, 1, || (), |_, _| Ok(())).expect("the file is there");
    bench(&mut group, "survey: file to hash and segments", lines.len(), || drop(black_box(open())));
    bench(&mut group, "scan: file to hash, segments and records", lines.len(), || {
        let source = open();
        let mut chunk = Chunk::default();
        while source.next(&mut chunk).expect("the file is readable") {
            black_box(&chunk.records);
        }
    });

    bench(&mut group, "json: record to values", lines.len(), || {
        lines.lines().for_each(|line| drop(black_box(json::parse(line).expect("JSON"))));
    });

    let mapping = FieldMapping { query_key: Some("input".into()), ..FieldMapping::default() };
    let conversation = |line| Conversation::from_record(json::parse(line).expect("JSON"), &mapping).expect("a record");
    group.throughput(Throughput::Bytes(lines.len() as u64));
    group.bench_function("conversation: values to messages", |bencher| {
        let parse = || lines.lines().map(|line| json::parse(line).expect("JSON")).collect::<Vec<_>>();
        let read = |values: Vec<_>| {
            let read = |value| Conversation::from_record(value, &mapping).expect("a record");
            values.into_iter().map(read).collect::<Vec<_>>() // dropped outside the measured time
        };
        bencher.iter_batched(parse, read, BatchSize::LargeInput);
    });

    let conversations: Vec<_> = lines.lines().map(conversation).collect();
    let mut rendered = Rendered::default();
    let mut texts: Vec<(String, Vec<Range<usize>>)> = Vec::new();
    for conversation in &conversations {
        model.template.render(conversation, &mut rendered).expect("the template takes the records");
        texts.push((rendered.text.clone(), rendered.spans.clone()));
    }
    let num_bytes = texts.iter().map(|(text, _)| text.len()).sum();
    bench(&mut group, "render: messages to text, by plan", num_bytes, || {
        for conversation in &conversations {
            model.template.render(conversation, &mut rendered).expect("the template takes the records");
            black_box(&rendered.text);
        }
    });

    let mut work = Scratch::default();
    bench(&mut group, "pre-tokenise: text to pretokens", num_bytes, || {
        for (text, _) in &texts {
            black_box(fast.num_pretokens(text, &mut work));
        }
    });

    let mut ids = Vec::new();
    let mut encode_all = |work: &mut Scratch| {
        for (text, _) in &texts {
            ids.clear();
            fast.encode(text, work, &mut ids);
            black_box(&ids);
        }
    };
    bench(&mut group, "encode, cold: text to ids", num_bytes, || encode_all(&mut Scratch::default()));
    bench(&mut group, "encode, warm: text to ids", num_bytes, || encode_all(&mut work));

    let mut encoder = model.tokenizer.encoder();
    let mut tokens = Tokens::default();
    bench(&mut group, "encode, warm, with spans: text to ids and label runs", num_bytes, || {
        for (text, spans) in &texts {
            encoder.encode(Input { text, spans, ..Input::default() }, &mut tokens).expect("any text can be encoded");
            black_box(&tokens);
        }
    });

    let samples: Vec<Tokens> = texts
        .iter()
        .map(|(text, spans)| {
            encoder.encode(Input { text, spans, ..Input::default() }, &mut tokens).expect("any text can be encoded");
            tokens.clone()
        })
        .collect();
    let num_tokens: usize = samples.iter().map(|sample| sample.ids.len()).sum();
    let index = || {
        let mut index = ShardIndex::default();
        for (sample, line) in samples.iter().zip(1..) {
            index.push(sample.ids.len() as u32, &sample.runs, 0, line);
        }
        index
    };
    bench(&mut group, "mask: label runs to bits", num_tokens / 8, || drop(black_box(index())));

    let ids: Vec<u32> = samples.iter().flat_map(|sample| sample.ids.iter().copied()).collect();
    let token_type = TokenType::for_vocab(model.tokenizer.vocab_size());
    bench(&mut group, "write: ids and bits to a shard, hashed and on disk", 4 * num_tokens, || {
        let directory = tempfile::tempdir_in(scratch.path()).expect("room for a directory");
        let writer = ShardWriter::create(directory.path(), "shard".into(), token_type).expect("room for a file");
        writer.write_tokens(0, &ids).expect("room for the tokens");
        black_box(writer.finish(index()).expect("room for the index"));
        writer.sync().expect("room on the disk");
    });
    group.finish();
    criterion.final_summary();
}
