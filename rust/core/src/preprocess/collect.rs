//! Batches in any order → shards and `rejected.jsonl` in the order of the input, and the counts for the manifest.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::JoinHandle;

use super::worker::Batch;
use super::{Options, Progress};
use crate::error::{Error, ErrorKind, Position, Result};
use crate::manifest::{REJECTED_NAME, SourceInfo, shard_name};
use crate::shard::{ShardBuilder, ShardInfo, TokenType};
use crate::source::Source;

/// What the pipeline counted; see the fields of the same names in [`Manifest`](crate::manifest::Manifest).
#[derive(Debug, Default)]
pub struct Counts {
    pub num_records: u64,
    pub num_rejected: u64,
    pub rejected_by_reason: BTreeMap<String, u64>,
    pub num_truncated: u64,
    pub num_tokens: u64,
    pub num_label_tokens: u64,
    pub files: Vec<SourceInfo>,
    pub shards: Vec<ShardInfo>,
    /// Number of samples by length in tokens.
    lengths: BTreeMap<u32, u64>,
}

impl Counts {
    /// Quantiles of the sample lengths: the smallest length that at least this share of the samples does not exceed.
    pub fn sample_tokens(&self) -> BTreeMap<String, u32> {
        let total: u64 = self.lengths.values().sum();
        let quantile = |share: f64| {
            let wanted = (share * total as f64).ceil() as u64;
            let mut seen = 0;
            let reaches = |&(_, &count): &(&u32, &u64)| {
                seen += count;
                seen >= wanted
            };
            self.lengths.iter().find(reaches).map(|(&length, _)| length)
        };
        [("min", 0.0), ("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("max", 1.0)]
            .into_iter()
            .filter_map(|(name, share)| Some((name.to_owned(), quantile(share)?)))
            .collect()
    }
}

/// Takes batches from the threads and puts them on disk in order.
pub struct Collector<'a> {
    options: &'a Options,
    counts: Counts,
    /// Batches that came before their turn.
    waiting: BTreeMap<u64, Batch>,
    next_sequence: u64,
    num_bytes: u64,
    file: u32,
    num_newlines: u64,
    token_type: TokenType,
    shard: ShardBuilder,
    num_shards: usize,
    writer: ShardWriter,
    rejected: BufWriter<File>,
    rejected_path: PathBuf,
}

impl<'a> Collector<'a> {
    /// A collector that writes into `directory`.
    pub fn new(directory: &Path, files: Vec<SourceInfo>, options: &'a Options, token_type: TokenType) -> Result<Self> {
        let rejected_path = directory.join(REJECTED_NAME);
        let rejected = File::create(&rejected_path).map_err(|error| Error::io("write", &rejected_path, &error))?;
        Ok(Self {
            options,
            counts: Counts { files, ..Counts::default() },
            waiting: BTreeMap::new(),
            next_sequence: 0,
            num_bytes: 0,
            file: 0,
            num_newlines: 0,
            token_type,
            shard: ShardBuilder::new(token_type),
            num_shards: 0,
            writer: ShardWriter::start(directory.into()),
            rejected: BufWriter::new(rejected),
            rejected_path,
        })
    }

    /// Takes a batch, and puts on disk what is now in order: the number of batches.
    pub fn take(&mut self, batch: Batch) -> Result<u64> {
        self.waiting.insert(batch.sequence, batch);
        let first = self.next_sequence;
        while let Some(batch) = self.waiting.remove(&self.next_sequence) {
            self.next_sequence += 1;
            self.append(batch)?;
        }
        Ok(self.next_sequence - first)
    }

    fn append(&mut self, batch: Batch) -> Result<()> {
        if batch.file != self.file {
            (self.file, self.num_newlines) = (batch.file, 0);
        }
        for error in batch.rejects {
            self.reject(&in_file(error, self.num_newlines))?;
        }
        if let Some(error) = batch.fatal {
            return Err(in_file(error, self.num_newlines));
        }
        let (mut ids, mut runs) = (&batch.ids[..], &batch.runs[..]);
        for sample in &batch.samples {
            let (sample_ids, sample_runs);
            (sample_ids, ids) = ids.split_at(sample.num_tokens as usize);
            (sample_runs, runs) = runs.split_at(sample.num_runs as usize);
            let line = u32::try_from(self.num_newlines + sample.line).map_err(|_| {
                Error::new(ErrorKind::Argument, "expected files of at most 4,294,967,295 lines, found a longer one")
                    .with_path(Path::new(&self.counts.files[batch.file as usize].path))
                    .with_hint("split the file")
            })?;
            let would_overflow = self.shard.num_tokens() + sample_ids.len() > self.options.max_shard_tokens as usize;
            if would_overflow && self.shard.num_samples() > 0 {
                self.close_shard()?;
            }
            self.shard.push(sample_ids, sample_runs, batch.file, line);
            *self.counts.lengths.entry(sample.num_tokens).or_default() += 1;
            // The first token has nothing before it that could predict it.
            let num_labels =
                sample_runs.iter().map(|run| u64::from(run.end - run.start.max(1).min(run.end))).sum::<u64>();
            self.counts.num_label_tokens += num_labels;
        }
        self.counts.num_tokens += batch.ids.len() as u64;
        self.counts.num_records += batch.num_records;
        self.counts.files[batch.file as usize].num_records += batch.num_records;
        self.counts.num_truncated += batch.num_truncated;
        self.num_newlines += batch.num_newlines;
        self.num_bytes += batch.num_source_bytes;
        Ok(())
    }

    fn reject(&mut self, error: &Error) -> Result<()> {
        let code = error.kind().code();
        self.counts.num_rejected += 1;
        *self.counts.rejected_by_reason.entry(code.into()).or_default() += 1;
        let line = serde_json::json!({
            "path": error.path().map(|path| path.display().to_string()),
            "line": error.position().map(|position| position.line),
            "column": error.position().map(|position| position.column),
            "reason": code,
            "message": error.message(),
            "location": error.location(),
        });
        writeln!(self.rejected, "{line}").map_err(|error| Error::io("write", &self.rejected_path, &error))
    }

    fn close_shard(&mut self) -> Result<()> {
        let full = std::mem::replace(&mut self.shard, ShardBuilder::new(self.token_type));
        let name = shard_name(self.num_shards);
        self.num_shards += 1;
        self.writer.write(full, name)
    }

    /// Writes the current counts into `progress`.
    pub fn report(&self, progress: &mut Progress) {
        progress.num_bytes = self.num_bytes;
        progress.num_records = self.counts.num_records;
        progress.num_rejected = self.counts.num_rejected;
        progress.num_tokens = self.counts.num_tokens;
    }

    /// Writes the last shard and makes sure that everything is on disk and that no input file changed meanwhile.
    pub fn finish(mut self, source: &Source) -> Result<Counts> {
        if self.shard.num_samples() > 0 {
            self.close_shard()?;
        }
        self.counts.shards = self.writer.finish()?;
        self.rejected
            .into_inner()
            .map_err(std::io::IntoInnerError::into_error)
            .and_then(|file| file.sync_all())
            .map_err(|error| Error::io("write", &self.rejected_path, &error))?;
        source.check_unchanged()?;
        Ok(self.counts)
    }
}

/// Turns a line that counts from the chunk's start into one that counts from the file's.
fn in_file(error: Error, num_newlines: u64) -> Error {
    match error.position() {
        Some(Position { line, column }) => error.with_position(Position { line: num_newlines + line, column }),
        None => error,
    }
}

/// A thread that writes shards, one behind the other, while the next ones are made.
struct ShardWriter {
    sender: Option<SyncSender<(ShardBuilder, String)>>,
    thread: Option<JoinHandle<Result<Vec<ShardInfo>>>>,
}

impl ShardWriter {
    fn start(directory: PathBuf) -> Self {
        // At most one shard waits while one is written: memory holds three with the one being filled.
        let (sender, receiver) = sync_channel::<(ShardBuilder, String)>(1);
        let thread = std::thread::spawn(move || {
            receiver.into_iter().map(|(shard, name)| shard.write(&directory, &name)).collect()
        });
        Self { sender: Some(sender), thread: Some(thread) }
    }

    fn write(&mut self, shard: ShardBuilder, name: String) -> Result<()> {
        match &self.sender {
            Some(sender) if sender.send((shard, name)).is_ok() => Ok(()),
            // The thread ended early: its error says why.
            _ => self.join().map(|_| ()),
        }
    }

    fn finish(mut self) -> Result<Vec<ShardInfo>> {
        self.join()
    }

    fn join(&mut self) -> Result<Vec<ShardInfo>> {
        self.sender = None;
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(result)) => result,
            Some(Err(panic)) => std::panic::resume_unwind(panic),
            None => Ok(Vec::new()),
        }
    }
}

impl Drop for ShardWriter {
    /// When the work is given up, nothing may go on writing into the directory that is about to be removed.
    fn drop(&mut self) {
        self.sender = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
