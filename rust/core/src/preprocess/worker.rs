//! One thread of the pipeline: chunks of records → batches of samples and rejects.

use std::ops::Range;
use std::path::Path;
use std::sync::mpsc::Sender;
use std::sync::{Condvar, Mutex};

use super::{OnError, Options};
use crate::conversation::Conversation;
use crate::error::{Error, ErrorClass, ErrorKind, Result};
use crate::json;
use crate::model::{Model, Sampler};
use crate::sample::fit;
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

/// Takes chunks until there are no more, or the gate is closed, or something is wrong.
pub fn work(options: &Options, model: &Model, source: &Source, gate: &Gate, sender: &Sender<Result<Batch>>) {
    let _guard = gate.close_on_panic();
    let mut sampler = Sampler::new(model);
    let mut chunk = Chunk::default();
    while gate.enter() {
        match source.next(&mut chunk) {
            Ok(true) => {}
            Ok(false) => return,
            Err(error) => {
                // The receiver is gone only when the work is being given up.
                let _ = sender.send(Err(error));
                return;
            }
        }
        let batch = encode_chunk(options, model, source.file(chunk.file).0, &chunk, &mut sampler);
        if sender.send(Ok(batch)).is_err() {
            return;
        }
    }
}

fn encode_chunk(options: &Options, model: &Model, path: &Path, chunk: &Chunk, sampler: &mut Sampler<'_>) -> Batch {
    let mut batch = Batch {
        sequence: chunk.sequence,
        file: chunk.file,
        num_source_bytes: chunk.num_source_bytes,
        num_newlines: chunk.num_newlines,
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
    batch.ids.extend_from_slice(&sampler.tokens.ids[..kept]);
    batch.runs.extend_from_slice(&sampler.tokens.runs);
    batch.samples.push(BatchSample {
        num_tokens: kept as u32,
        num_runs: sampler.tokens.runs.len() as u32,
        line: record.position.line,
    });
    Ok(())
}

/// Keeps threads from running further ahead of the collector than a window of chunks, so that memory stays flat.
pub struct Gate {
    window: u64,
    state: Mutex<GateState>,
    changed: Condvar,
}

#[derive(Default)]
struct GateState {
    num_entered: u64,
    num_done: u64,
    is_closed: bool,
}

impl Gate {
    /// A gate that lets at most `window` chunks be under way.
    pub fn new(window: u64) -> Self {
        Self { window, state: Mutex::default(), changed: Condvar::new() }
    }

    fn update(&self, change: impl FnOnce(&mut GateState)) {
        change(&mut self.state.lock().expect("no thread panics while it holds the gate"));
        self.changed.notify_all();
    }

    /// Waits until one more chunk may be begun; false if no more should be.
    fn enter(&self) -> bool {
        let state = self.state.lock().expect("no thread panics while it holds the gate");
        let mut state = self
            .changed
            .wait_while(state, |state| !state.is_closed && state.num_entered - state.num_done >= self.window)
            .expect("no thread panics while it holds the gate");
        state.num_entered += 1;
        !state.is_closed
    }

    /// Lets `num_chunks` more in.
    pub fn advance(&self, num_chunks: u64) {
        self.update(|state| state.num_done += num_chunks);
    }

    /// A guard that closes the gate when it is dropped.
    pub fn close_on_drop(&self) -> impl Drop + '_ {
        Close { gate: self, always: true }
    }

    /// A guard that closes the gate when the thread panics, so that the others end instead of waiting for its chunk.
    fn close_on_panic(&self) -> impl Drop + '_ {
        Close { gate: self, always: false }
    }
}

struct Close<'a> {
    gate: &'a Gate,
    always: bool,
}

impl Drop for Close<'_> {
    fn drop(&mut self) {
        if self.always || std::thread::panicking() {
            self.gate.update(|state| state.is_closed = true);
        }
    }
}
