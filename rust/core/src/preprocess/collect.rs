//! Batches in any order → places in the shards, `rejected.jsonl` and `segments.jsonl` in the order of the input, and the
//! counts for the manifest.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::JoinHandle;

use super::Progress;
use super::duplicates::Seen;
use super::frames::{Ids, Piece};
use super::schedule::{Job, Schedule};
use super::worker::{Batch, Event, SegmentResult};
use crate::conversation::ShapeCounts;
use crate::error::{Error, ErrorKind, Position, Result};
use crate::listing::{Listing, ListingInfo};
use crate::manifest::{REJECTED_NAME, SEGMENTS_NAME, Segment, SourceInfo, quantiles, shard_name};
use crate::sampler::Tally;
use crate::shard::write::{ShardIndex, ShardWriter, max_tokens};
use crate::shard::{ShardInfo, TokenType};
use crate::source::Source;

/// What the pipeline counted; see the fields of the same names in [`Manifest`](crate::manifest::Manifest).
#[derive(Debug, Default)]
pub struct Counts {
    pub num_records: u64,
    pub num_rejected: u64,
    pub rejected_by_reason: BTreeMap<String, u64>,
    pub tally: Tally,
    pub shapes: ShapeCounts,
    pub num_reused_samples: u64,
    pub num_tokens: u64,
    pub num_label_tokens: u64,
    pub files: Vec<SourceInfo>,
    pub shards: Vec<ShardInfo>,
    pub segments: ListingInfo,
    /// Number of samples by length in tokens.
    lengths: BTreeMap<u32, u64>,
}

impl Counts {
    /// Quantiles of the sample lengths.
    pub fn sample_tokens(&self) -> BTreeMap<String, u32> {
        quantiles(&self.lengths)
    }
}

/// A shard that is being filled, or whose tokens are being stored.
struct OpenShard {
    /// Where this process stores the tokens, once there are some for it.
    writer: Option<Arc<ShardWriter>>,
    /// The tokens that another process is to store.
    pieces: Vec<Piece>,
    index: ShardIndex,
    max_tokens: usize,
    /// Stores that were ordered and are not done.
    num_stores: usize,
    is_full: bool,
}

/// A shard that another process is to write.
pub struct ShardElsewhere {
    pub number: usize,
    pub token_type: TokenType,
    pub index: ShardIndex,
    /// Where its tokens are, in order.
    pub pieces: Vec<Piece>,
}

/// Takes what the threads did, puts it in order and tells them where it goes.
pub struct Collector {
    max_shard_tokens: Option<u32>,
    directory: PathBuf,
    counts: Counts,
    /// Batches that came before their turn.
    waiting: BTreeMap<u64, Box<Batch>>,
    next_sequence: u64,
    num_bytes: u64,
    file: u32,
    num_newlines: u64,
    token_type: TokenType,
    /// The shards that have tokens to come, by number; only the last is not full.
    open: BTreeMap<usize, OpenShard>,
    /// For each shard that was begun what it holds, once that is known.
    shards: Vec<Option<ShardInfo>>,
    /// Shards that are full, for others to write.
    elsewhere: Vec<ShardElsewhere>,
    syncer: Syncer,
    /// Records that came so far, where duplicates are dropped.
    seen: Seen,
    rejected: Listing,
    segments: Listing,
    /// Samples of segments that can't be told apart, since the last that could.
    num_unlisted: u64,
}

impl Collector {
    /// A collector that writes into `directory`.
    pub fn new(
        directory: &Path,
        files: Vec<SourceInfo>,
        max_shard_tokens: Option<u32>,
        token_type: TokenType,
    ) -> Result<Self> {
        Ok(Self {
            max_shard_tokens,
            directory: directory.into(),
            counts: Counts { files, ..Counts::default() },
            waiting: BTreeMap::new(),
            next_sequence: 0,
            num_bytes: 0,
            file: 0,
            num_newlines: 0,
            token_type,
            open: BTreeMap::new(),
            shards: Vec::new(),
            elsewhere: Vec::new(),
            syncer: Syncer::start(),
            seen: Seen::default(),
            rejected: Listing::create(directory, REJECTED_NAME)?,
            segments: Listing::create(directory, SEGMENTS_NAME)?,
            num_unlisted: 0,
        })
    }

    /// Takes what a thread did, and orders what comes of it.
    pub fn take(&mut self, event: Event, schedule: &Schedule) -> Result<()> {
        match event {
            Event::Encoded(batch) => {
                self.waiting.insert(batch.sequence, batch);
                while let Some(batch) = self.waiting.remove(&self.next_sequence) {
                    self.next_sequence += 1;
                    self.append(*batch, schedule)?;
                    schedule.advance();
                }
            }
            Event::InputEnded => {}
            Event::Stored { shard } => {
                self.open.get_mut(&shard).expect("it has a store under way").num_stores -= 1;
                self.finish_shard(shard, schedule);
            }
            Event::Finished { shard, writer, info } => {
                self.shards[shard] = Some(info);
                self.syncer.sync(writer)?;
            }
        }
        if schedule.num_chunks() == Some(self.next_sequence) {
            self.close_shard(schedule);
        }
        Ok(())
    }

    /// The shards that are full since, for others to write; each comes back by [`put`](Self::put).
    pub fn take_elsewhere(&mut self) -> Vec<ShardElsewhere> {
        std::mem::take(&mut self.elsewhere)
    }

    /// Takes the file of a shard that another process wrote, which is on disk.
    pub fn put(&mut self, number: usize, path: &Path, info: ShardInfo) -> Result<()> {
        let target = self.directory.join(shard_name(number));
        std::fs::rename(path, &target).map_err(|error| Error::io("rename", path, &error))?;
        self.shards[number] = Some(info);
        Ok(())
    }

    /// Whether the whole input is in shards that are complete.
    pub fn is_complete(&self, schedule: &Schedule) -> bool {
        schedule.num_chunks() == Some(self.next_sequence) && self.shards.iter().all(Option::is_some)
    }

    fn append(&mut self, mut batch: Batch, schedule: &Schedule) -> Result<()> {
        if batch.file != self.file {
            (self.file, self.num_newlines) = (batch.file, 0);
        }
        let path = |file: u32| self.counts.files[file as usize].path.clone();
        self.seen.drop_duplicates(&mut batch, self.num_newlines, path);
        for error in std::mem::take(&mut batch.rejects) {
            self.reject(&in_file(error, self.num_newlines))?;
        }
        if let Some(error) = batch.fatal {
            return Err(in_file(error, self.num_newlines));
        }
        let mut ids = batch.take_ids();
        self.counts.num_tokens += batch.samples.iter().map(|sample| u64::from(sample.num_tokens)).sum::<u64>();
        let mut runs = &batch.runs[..];
        // Tokens of the batch that have a place, but are not ordered to be stored there yet.
        let mut num_placed = 0;
        for sample in &batch.samples {
            let sample_runs;
            (sample_runs, runs) = runs.split_at(sample.num_runs as usize);
            let line = u32::try_from(self.num_newlines + sample.line).map_err(|_| {
                Error::new(ErrorKind::Argument, "expected files of at most 4,294,967,295 lines, found a longer one")
                    .with_path(Path::new(&self.counts.files[batch.file as usize].path))
                    .with_hint("split the file")
            })?;
            let mut shard = self.open_shard()?;
            let would_overflow = shard.index.num_tokens() + sample.num_tokens as usize > shard.max_tokens;
            if would_overflow && shard.index.num_samples() > 0 {
                let rest = ids.split_off(num_placed);
                self.store(ids, schedule)?;
                self.close_shard(schedule);
                (ids, num_placed) = (rest, 0);
                shard = self.open_shard()?;
            }
            shard.index.push(sample.num_tokens, sample_runs, batch.file, line);
            num_placed += sample.num_tokens as usize;
            *self.counts.lengths.entry(sample.num_tokens).or_default() += 1;
            // The first token has nothing before it that could predict it.
            let num_labels =
                sample_runs.iter().map(|run| u64::from(run.end - run.start.max(1).min(run.end))).sum::<u64>();
            self.counts.num_label_tokens += num_labels;
            let file = &mut self.counts.files[batch.file as usize];
            file.num_samples += 1;
            file.num_tokens += u64::from(sample.num_tokens);
            file.num_label_tokens += num_labels;
        }
        self.store(ids, schedule)?;
        for segment in &batch.segments {
            self.list(segment)?;
        }
        self.counts.num_records += batch.num_records;
        self.counts.files[batch.file as usize].num_records += batch.num_records;
        self.counts.tally += batch.tally;
        self.counts.shapes += batch.shapes;
        self.counts.num_reused_samples += batch.num_reused;
        self.num_newlines += batch.num_newlines;
        self.num_bytes += batch.num_source_bytes;
        Ok(())
    }

    /// Lists a segment. Those without a hash are put together, so that it does not matter how they were cut.
    fn list(&mut self, segment: &SegmentResult) -> Result<()> {
        let Some(hash) = segment.blake3.filter(|_| segment.num_samples > 0) else {
            self.num_unlisted += segment.num_samples;
            return Ok(());
        };
        self.list_unlisted()?;
        self.segments.push(&Segment {
            blake3: Some(hash.to_hex().to_string()),
            num_samples: segment.num_samples,
            shapes: Some(segment.shapes.to_map()),
        })
    }

    fn list_unlisted(&mut self) -> Result<()> {
        match std::mem::take(&mut self.num_unlisted) {
            0 => Ok(()),
            num_samples => self.segments.push(&Segment { blake3: None, num_samples, shapes: None }),
        }
    }

    fn reject(&mut self, error: &Error) -> Result<()> {
        let code = error.kind().code();
        self.counts.num_rejected += 1;
        self.counts.files[self.file as usize].num_rejected += 1;
        *self.counts.rejected_by_reason.entry(code.into()).or_default() += 1;
        self.rejected.push(&serde_json::json!({
            "path": error.path().map(|path| path.display().to_string()),
            "line": error.position().map(|position| position.line),
            "column": error.position().map(|position| position.column),
            "reason": code,
            "message": error.message(),
            "location": error.location(),
        }))
    }

    /// The shard that is being filled.
    fn open_shard(&mut self) -> Result<&mut OpenShard> {
        if self.open.last_key_value().is_none_or(|(_, shard)| shard.is_full) {
            let number = self.shards.len();
            let shard = OpenShard {
                writer: None,
                pieces: Vec::new(),
                index: ShardIndex::default(),
                max_tokens: self.max_shard_tokens.unwrap_or_else(|| max_tokens(number)) as usize,
                num_stores: 0,
                is_full: false,
            };
            self.open.insert(number, shard);
            self.shards.push(None);
        }
        Ok(self.open.last_entry().expect("one is open").into_mut())
    }

    /// Orders `ids`, whose samples are the last that the shard took, to be stored.
    fn store(&mut self, ids: Ids, schedule: &Schedule) -> Result<()> {
        let Some((&number, shard)) = self.open.iter_mut().next_back() else { return Ok(()) };
        match ids {
            Ids::Here(ids) if !ids.is_empty() => {
                let writer = match &shard.writer {
                    Some(writer) => writer.clone(),
                    None => ShardWriter::create(&self.directory, shard_name(number), self.token_type)?.into(),
                };
                shard.writer = Some(writer.clone());
                shard.num_stores += 1;
                let first = shard.index.num_tokens() - ids.len();
                schedule.add(Job::Store { shard: number, writer, first, ids });
            }
            Ids::Here(_) => {}
            Ids::There(pieces) => shard.pieces.extend(pieces),
        }
        Ok(())
    }

    /// Lets the shard that is being filled take no more.
    fn close_shard(&mut self, schedule: &Schedule) {
        if let Some((&number, shard)) = self.open.iter_mut().next_back() {
            shard.is_full = true;
            self.finish_shard(number, schedule);
        }
    }

    /// Orders a shard to be finished, if it is full and all its tokens are stored.
    fn finish_shard(&mut self, number: usize, schedule: &Schedule) {
        if self.open.get(&number).is_some_and(|shard| shard.is_full && shard.num_stores == 0)
            && let Some(OpenShard { writer, pieces, index, .. }) = self.open.remove(&number)
        {
            match writer {
                Some(writer) => schedule.add(Job::Finish { shard: number, writer, index }),
                None => {
                    self.elsewhere.push(ShardElsewhere { number, token_type: self.token_type, index, pieces });
                }
            }
        }
    }

    /// Writes the current counts into `progress`.
    pub fn report(&self, progress: &mut Progress) {
        progress.num_bytes = self.num_bytes;
        progress.num_records = self.counts.num_records;
        progress.num_rejected = self.counts.num_rejected;
        progress.num_tokens = self.counts.num_tokens;
        progress.shapes = self.counts.shapes;
    }

    /// Makes sure that everything is on disk and that no input file changed meanwhile.
    pub fn finish(mut self, source: &Source) -> Result<Counts> {
        self.syncer.finish()?;
        self.list_unlisted()?;
        self.counts.shards = self.shards.into_iter().flatten().collect();
        self.rejected.finish()?;
        self.counts.segments = self.segments.finish()?;
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

/// A thread that waits for the disk while the others go on.
struct Syncer {
    sender: Option<SyncSender<Arc<ShardWriter>>>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Syncer {
    fn start() -> Self {
        // Few may wait, since each is an open file.
        let (sender, receiver) = sync_channel::<Arc<ShardWriter>>(4);
        let thread = std::thread::spawn(move || receiver.into_iter().try_for_each(|writer| writer.sync()));
        Self { sender: Some(sender), thread: Some(thread) }
    }

    fn sync(&mut self, writer: Arc<ShardWriter>) -> Result<()> {
        match &self.sender {
            Some(sender) if sender.send(writer).is_ok() => Ok(()),
            // The thread ended early: its error says why.
            _ => self.finish(),
        }
    }

    fn finish(&mut self) -> Result<()> {
        self.sender = None;
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(result)) => result,
            Some(Err(panic)) => std::panic::resume_unwind(panic),
            None => Ok(()),
        }
    }
}

impl Drop for Syncer {
    /// When the work is given up, nothing may hold a file in the directory that is about to be removed.
    fn drop(&mut self) {
        self.sender = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
