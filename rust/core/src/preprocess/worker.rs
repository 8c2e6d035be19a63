//! One thread of the pipeline: chunks of records → batches of samples and rejects, and their tokens → the shards' files.

use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::Sender;

use serde::{Deserialize, Serialize};

use super::duplicates::{BatchRecord, Duplicates, hash};
use super::frames::{Frames, Piece};
use super::reuse::Reuse;
use super::schedule::{Job, Schedule, Task};
use super::{OnError, Options};
use crate::conversation::{Record, ShapeCounts};
use crate::dataset::Sample;
use crate::error::{Error, ErrorClass, ErrorKind, Position, Result};
use crate::json;
use crate::model::Model;
use crate::sampler::{Sampler, Tally};
use crate::shard::write::ShardWriter;
use crate::shard::{ShardInfo, TokenIds};
use crate::source::{Chunk, RecordSpan, Segment, Source};

/// What became of a chunk. Lines count from the chunk's start.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Batch {
    #[serde(skip)]
    pub sequence: u64,
    pub file: u32,
    pub num_source_bytes: u64,
    pub num_newlines: u64,
    pub num_records: u64,
    /// What is to be reported of the samples.
    pub tally: Tally,
    /// Records that could be read, by their shape.
    pub shapes: ShapeCounts,
    /// Samples that an older dataset had already.
    pub num_reused: u64,
    /// Token ids of all samples, one after the other.
    #[serde(skip)]
    pub ids: Vec<u32>,
    /// Where the token ids are, if they are not in memory.
    #[serde(skip)]
    pub there: Option<Vec<Piece>>,
    /// Runs of tokens that are trained on, counted from the first token of their sample.
    #[serde(skip)]
    pub runs: Vec<Range<u32>>,
    #[serde(skip)]
    pub samples: Vec<BatchSample>,
    /// The records that became samples, where duplicates are dropped; else empty.
    pub records: Vec<BatchRecord>,
    pub segments: Vec<SegmentResult>,
    pub rejects: Vec<Error>,
    /// The error that ends the work, if one does.
    pub fatal: Option<Error>,
}

/// What became of a segment; see [`Segment`](crate::manifest::Segment).
#[derive(Debug, Serialize, Deserialize)]
pub struct SegmentResult {
    #[serde(with = "hex")]
    pub blake3: Option<blake3::Hash>,
    pub num_samples: u64,
    pub shapes: ShapeCounts,
}

/// One sample of a [`Batch`].
#[derive(Debug)]
pub struct BatchSample {
    pub num_tokens: u32,
    pub num_runs: u32,
    /// From 1.
    pub line: u64,
}

/// A hash of a segment as text, where there is one.
mod hex {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub fn serialize<S: Serializer>(hash: &Option<blake3::Hash>, serializer: S) -> Result<S::Ok, S::Error> {
        hash.map(|hash| hash.to_hex().to_string()).serialize(serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<blake3::Hash>, D::Error> {
        let text = Option::<String>::deserialize(deserializer)?;
        text.map(|text| blake3::Hash::from_hex(text).map_err(serde::de::Error::custom)).transpose()
    }
}

/// What a thread reports.
#[derive(Debug)]
pub enum Event {
    Encoded(Box<Batch>),
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

/// Where batches come from.
pub enum Feed<'a> {
    /// From records that the threads encode, unless an older dataset has their samples.
    Records { source: &'a Source, reuse: &'a Reuse },
    /// From those who encoded them.
    Frames(&'a Frames),
}

/// Does what the schedule says until the work is over or something is wrong.
pub fn work(options: &Options, model: &Model, feed: &Feed<'_>, schedule: &Schedule, sender: &Sender<Result<Event>>) {
    let _guard = schedule.close_on_panic();
    let mut worker = Worker {
        options,
        model,
        feed,
        schedule,
        sampler: Sampler::new(model, options.policies),
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

/// A thread may store more than it encodes, and must not hoard.
const MAX_SPARES: usize = 2;

struct Worker<'a> {
    options: &'a Options,
    model: &'a Model,
    feed: &'a Feed<'a>,
    schedule: &'a Schedule,
    sampler: Sampler<'a>,
    chunk: Chunk,
    /// Buffers that were stored, for the next batches: fresh memory has to be cleared by the system first.
    spare_ids: Vec<Vec<u32>>,
}

impl Worker<'_> {
    fn run(&mut self, task: Task) -> Result<Event> {
        match task {
            Task::Chunk => {
                let batch = match *self.feed {
                    Feed::Records { source, reuse } => {
                        source.next(&mut self.chunk)?.then(|| self.encode_chunk(source, reuse))
                    }
                    Feed::Frames(frames) => frames.next()?,
                };
                if batch.is_none() {
                    self.schedule.end_input();
                }
                Ok(batch.map_or(Event::InputEnded, |batch| Event::Encoded(batch.into())))
            }
            Task::Job(Job::Store { shard, writer, first, mut ids }) => {
                writer.write_tokens(first, &ids)?;
                if self.spare_ids.len() < MAX_SPARES {
                    ids.clear();
                    self.spare_ids.push(ids);
                }
                Ok(Event::Stored { shard })
            }
            Task::Job(Job::Finish { shard, writer, index }) => {
                let info = writer.finish(index)?;
                Ok(Event::Finished { shard, writer, info })
            }
        }
    }

    fn encode_chunk(&mut self, source: &Source, reuse: &Reuse) -> Batch {
        let mut batch = Batch {
            sequence: self.chunk.sequence,
            file: self.chunk.file,
            num_source_bytes: self.chunk.num_source_bytes,
            num_newlines: self.chunk.num_newlines,
            ids: self.spare_ids.pop().unwrap_or_default(),
            ..Batch::default()
        };
        for number in 0..self.chunk.segments.len() {
            let Segment { bytes, records } = self.chunk.segments[number].clone();
            let blake3 = blake3::hash(&self.chunk.bytes[bytes]);
            let num_before = batch.samples.len();
            let shapes_before = std::mem::take(&mut batch.shapes);
            let is_listed = match reuse.samples(&blake3, records.len()) {
                Some((shapes, samples)) => {
                    batch.shapes = shapes;
                    for (sample, record) in samples.zip(&self.chunk.records[records]) {
                        let before = batch.marks();
                        batch.copy(&sample, record);
                        if self.options.duplicates == Duplicates::Drop {
                            batch.note(before, self.chunk.position(record, 0), Tally::default(), true);
                        }
                    }
                    true
                }
                None => {
                    let (num_rejects, tally) = (batch.rejects.len(), batch.tally);
                    self.encode_records(source, records, &mut batch);
                    (num_rejects, tally) == (batch.rejects.len(), batch.tally)
                }
            };
            let num_samples = (batch.samples.len() - num_before) as u64;
            let shapes = std::mem::replace(&mut batch.shapes, shapes_before);
            batch.shapes += shapes;
            batch.segments.push(SegmentResult { blake3: is_listed.then_some(blake3), num_samples, shapes });
            if batch.fatal.is_some() {
                return batch;
            }
        }
        if self.chunk.segments.is_empty() {
            self.encode_records(source, 0..self.chunk.records.len(), &mut batch);
            let num_samples = batch.samples.len() as u64;
            batch.segments.push(SegmentResult { blake3: None, num_samples, shapes: ShapeCounts::default() });
        }
        batch
    }

    /// Turns some of the chunk's records into samples and rejects, up to the first error that ends the work.
    fn encode_records(&mut self, source: &Source, records: Range<usize>, batch: &mut Batch) {
        let Self { options, model, chunk, sampler, .. } = self;
        for record in &chunk.records[records] {
            batch.num_records += 1;
            let before = batch.marks();
            let error = match encode_record(options, model, chunk, record, sampler, batch) {
                Ok(tally) => {
                    batch.tally += tally;
                    if options.duplicates == Duplicates::Drop {
                        batch.note(before, chunk.position(record, 0), tally, false);
                    }
                    continue;
                }
                Err(error) => error,
            };
            batch.truncate(before);
            let position = chunk.position(record, error.offset().unwrap_or(0));
            let error = error.with_path(source.file(chunk.file).0).with_position(position);
            let is_wrong = !ErrorKind::LEFT_OUT.contains(&error.kind());
            if error.kind().class() != ErrorClass::Input || (options.on_error == OnError::Raise && is_wrong) {
                batch.fatal = Some(error);
                return;
            }
            batch.rejects.push(error);
        }
    }
}

/// Where a record begins in a [`Batch`]: in its ids, runs and samples.
type Marks = (usize, usize, usize);

impl Batch {
    fn marks(&self) -> Marks {
        (self.ids.len(), self.runs.len(), self.samples.len())
    }

    /// Takes away what came behind `marks`.
    fn truncate(&mut self, marks: Marks) {
        self.ids.truncate(marks.0);
        self.runs.truncate(marks.1);
        self.samples.truncate(marks.2);
    }

    /// Notes a record whose samples are what came behind `marks`, to find its duplicates.
    fn note(&mut self, marks: Marks, position: Position, tally: Tally, is_reused: bool) {
        let samples = &self.samples[marks.2..];
        self.records.push(BatchRecord {
            hash: hash(samples, &self.ids[marks.0..], &self.runs[marks.1..]),
            num_samples: samples.len(),
            position,
            tally,
            is_reused,
            num_rejects_before: self.rejects.len(),
        });
    }

    /// Takes the sample of an older dataset for that of `record`.
    fn copy(&mut self, sample: &Sample<'_>, record: &RecordSpan) {
        match sample.token_ids {
            TokenIds::U16(ids) => self.ids.extend(ids.iter().map(|&id| u32::from(id))),
            TokenIds::U32(ids) => self.ids.extend_from_slice(ids),
        }
        let num_runs_before = self.runs.len();
        let mut was_label = false;
        for (token, is_label) in (0..).zip(sample.label_mask()) {
            match (was_label, is_label) {
                (false, true) => self.runs.push(token..token + 1),
                (true, true) => self.runs[num_runs_before..].last_mut().expect("it was pushed").end += 1,
                _ => {}
            }
            was_label = is_label;
        }
        self.samples.push(BatchSample {
            num_tokens: sample.token_ids.len() as u32,
            num_runs: (self.runs.len() - num_runs_before) as u32,
            line: record.position.line,
        });
        self.num_records += 1;
        self.num_reused += 1;
    }
}

fn encode_record(
    options: &Options,
    model: &Model,
    chunk: &Chunk,
    record: &RecordSpan,
    sampler: &mut Sampler<'_>,
    batch: &mut Batch,
) -> Result<Tally> {
    if let Some((kind, message)) = record.flaw {
        return Err(Error::new(kind, message));
    }
    let text = simdutf8::compat::from_utf8(&chunk.bytes[record.range.clone()]).map_err(|error| {
        let found = chunk.bytes[record.range.start + error.valid_up_to()];
        Error::new(ErrorKind::InvalidUtf8, format!("expected UTF-8 text, found the byte 0x{found:02X}"))
            .at_offset(error.valid_up_to())
    })?;
    let value =
        json::parse(text).map_err(|error| Error::new(ErrorKind::InvalidJson, error.message).at_offset(error.offset))?;
    let mut read = Record::read(value, &options.mapping, options.record_shape)?;
    batch.shapes.add(read.shape);
    let Batch { ids, runs, samples, .. } = batch;
    let line = record.position.line;
    sampler.record_samples(model, &mut read.content, options.sequence_length, options.too_long, |tokens, labels| {
        ids.extend_from_slice(tokens);
        runs.extend_from_slice(labels);
        samples.push(BatchSample { num_tokens: tokens.len() as u32, num_runs: labels.len() as u32, line });
    })
}
