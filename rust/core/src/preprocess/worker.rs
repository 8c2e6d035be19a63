//! One thread of the pipeline: chunks of records → batches of samples and rejects, and their tokens → the shards' files.

use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::Sender;

use super::schedule::{Job, Schedule, Task};
use super::{OnError, Options};
use crate::conversation::Conversation;
use crate::error::{Error, ErrorClass, ErrorKind, Result};
use crate::json;
use crate::model::{Model, Sampler};
use crate::sample::fit;
use crate::shard::ShardInfo;
use crate::shard::write::ShardWriter;
use crate::source::{Chunk, RecordSpan, Source};

/// What became of a chunk. Lines count from the chunk's start.
#[derive(Debug, Default)]
pub struct Batch {
    pub sequence: u64,
    pub file: u32,
    pub num_source_bytes: u64,
    pub num_newlines: u64,
    pub num_records: u64,
    pub num_truncated: u64,
    pub num_control_text: u64,
    /// Token ids of all samples, one after the other.
    pub ids: Vec<u32>,
    /// Runs of tokens that are trained on, counted from the first token of their sample.
    pub runs: Vec<Range<u32>>,
    pub samples: Vec<BatchSample>,
    pub rejects: Vec<Error>,
    /// The error that ends the work, if one does.
    pub fatal: Option<Error>,
}

/// One sample of a [`Batch`].
#[derive(Debug)]
pub struct BatchSample {
    pub num_tokens: u32,
    pub num_runs: u32,
    /// From 1.
    pub line: u64,
}

/// What a thread reports.
#[derive(Debug)]
pub enum Event {
    Encoded(Batch),
    /// The input is read; chunks of other threads may still be under way.
    InputEnded,
    /// Tokens are in the file of a shard.
    Stored {
        shard: usize,
    },
    /// A shard is complete, but perhaps not on disk yet.
    Finished {
        shard: usize,
        writer: Arc<ShardWriter>,
        info: ShardInfo,
    },
}

/// Does what the schedule says until the work is over or something is wrong.
pub fn work(options: &Options, model: &Model, source: &Source, schedule: &Schedule, sender: &Sender<Result<Event>>) {
    let _guard = schedule.close_on_panic();
    let mut worker = Worker {
        options,
        model,
        source,
        schedule,
        sampler: Sampler::new(model, options.control_tokens),
        chunk: Chunk::default(),
        spare_ids: Vec::new(),
    };
    while let Some(task) = schedule.next() {
        let event = worker.run(task);
        let is_over = event.is_err();
        // The receiver is gone only when the work is being given up.
        if sender.send(event).is_err() || is_over {
            return;
        }
    }
}

struct Worker<'a> {
    options: &'a Options,
    model: &'a Model,
    source: &'a Source,
    schedule: &'a Schedule,
    sampler: Sampler<'a>,
    chunk: Chunk,
    /// Buffers that were stored, for the next batches: fresh memory has to be cleared by the system first.
    spare_ids: Vec<Vec<u32>>,
}

impl Worker<'_> {
    fn run(&mut self, task: Task) -> Result<Event> {
        match task {
            Task::Chunk if self.source.next(&mut self.chunk)? => Ok(Event::Encoded(self.encode_chunk())),
            Task::Chunk => {
                self.schedule.end_input();
                Ok(Event::InputEnded)
            }
            Task::Job(Job::Store { shard, writer, first, mut ids }) => {
                writer.write_tokens(first, &ids)?;
                ids.clear();
                self.spare_ids.push(ids);
                Ok(Event::Stored { shard })
            }
            Task::Job(Job::Finish { shard, writer, index }) => {
                let info = writer.finish(index)?;
                Ok(Event::Finished { shard, writer, info })
            }
        }
    }

    fn encode_chunk(&mut self) -> Batch {
        let Self { options, model, chunk, sampler, .. } = self;
        let path = self.source.file(chunk.file).0;
        let mut batch = Batch {
            sequence: chunk.sequence,
            file: chunk.file,
            num_source_bytes: chunk.num_source_bytes,
            num_newlines: chunk.num_newlines,
            ids: self.spare_ids.pop().unwrap_or_default(),
            ..Batch::default()
        };
        for record in &chunk.records {
            batch.num_records += 1;
            let Err(error) = encode_record(options, model, chunk, record, sampler, &mut batch) else { continue };
            let position = chunk.position(record, error.offset().unwrap_or(0));
            let error = error.with_path(path).with_position(position);
            let is_wrong = !ErrorKind::LEFT_OUT.contains(&error.kind());
            if error.kind().class() != ErrorClass::Input || (options.on_error == OnError::Raise && is_wrong) {
                batch.fatal = Some(error);
                return batch;
            }
            batch.rejects.push(error);
        }
        batch
    }
}

fn encode_record(
    options: &Options,
    model: &Model,
    chunk: &Chunk,
    record: &RecordSpan,
    sampler: &mut Sampler<'_>,
    batch: &mut Batch,
) -> Result<()> {
    if let Some((kind, message)) = record.flaw {
        return Err(Error::new(kind, message));
    }
    let text = std::str::from_utf8(&chunk.bytes[record.range.clone()]).map_err(|error| {
        let found = chunk.bytes[record.range.start + error.valid_up_to()];
        Error::new(ErrorKind::InvalidUtf8, format!("expected UTF-8 text, found the byte 0x{found:02X}"))
            .at_offset(error.valid_up_to())
    })?;
    let value =
        json::parse(text).map_err(|error| Error::new(ErrorKind::InvalidJson, error.message).at_offset(error.offset))?;
    let conversation = Conversation::from_record(value, &options.mapping)?;
    sampler.sample(model, &conversation)?;

    let num_tokens = sampler.tokens.ids.len();
    let kept = fit(num_tokens, &mut sampler.tokens.runs, options.sequence_length, options.too_long)?;
    batch.num_truncated += u64::from(kept < num_tokens);
    batch.num_control_text += u64::from(!sampler.control_text.is_empty());
    batch.ids.extend_from_slice(&sampler.tokens.ids[..kept]);
    batch.runs.extend_from_slice(&sampler.tokens.runs);
    batch.samples.push(BatchSample {
        num_tokens: kept as u32,
        num_runs: sampler.tokens.runs.len() as u32,
        line: record.position.line,
    });
    Ok(())
}
