//! Batches in a file, by whoever encoded them, for whoever puts them together: the file of a part.
//!
//! One after another lie the frames, each a batch: a head in JSON and the arrays, the token ids last. An index of them follows,
//! and its length and hash. Every frame has hashes too, so that nothing is taken from a file that a network storage has damaged.
//! The file has its name from the moment at which it is whole and on disk.
//!
//! Token ids are most of a file, and whoever puts batches in order needs none of them: it takes them for [`Piece`]s, which are
//! read when a shard is written.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};

use super::worker::{Batch, BatchSample};
use crate::error::{Error, ErrorKind, Result};

const MAGIC: &[u8; 16] = b"sft-fast part 2\n";
/// What comes behind the index: its length, its hash and [`MAGIC`].
const TAIL_BYTES: usize = 8 + 32 + MAGIC.len();

/// Where a frame lies, and what is in it.
#[derive(Debug, Serialize, Deserialize)]
struct Frame {
    start: u64,
    num_head_bytes: usize,
    num_ids: usize,
    num_runs: usize,
    num_samples: usize,
    /// Of all but the token ids, and of those.
    blake3: String,
    ids_blake3: String,
}

/// Token ids that are in a frame.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Piece {
    /// Number of the part.
    pub part: u64,
    /// Number of the frame in the file of the part.
    pub frame: usize,
    /// Which ids of the frame.
    pub ids: Range<usize>,
}

/// Token ids in memory, or where they are.
#[derive(Debug, PartialEq, Eq)]
pub enum Ids {
    Here(Vec<u32>),
    There(Vec<Piece>),
}

impl Ids {
    /// Takes the ids from number `at` on away.
    pub fn split_off(&mut self, mut at: usize) -> Self {
        match self {
            Self::Here(ids) => Self::Here(ids.split_off(at)),
            Self::There(pieces) => {
                let mut number = 0;
                while number < pieces.len() && pieces[number].ids.len() <= at {
                    at -= pieces[number].ids.len();
                    number += 1;
                }
                let mut rest = pieces.split_off(number);
                if let Some(first) = rest.first_mut()
                    && at > 0
                {
                    let border = first.ids.start + at;
                    pieces.push(Piece { ids: first.ids.start..border, ..first.clone() });
                    first.ids.start = border;
                }
                Self::There(rest)
            }
        }
    }
}

impl Batch {
    /// The token ids, which the batch has no more.
    pub fn take_ids(&mut self) -> Ids {
        match &self.there {
            None => Ids::Here(std::mem::take(&mut self.ids)),
            Some(_) => Ids::There(self.there.take().unwrap_or_default()),
        }
    }

    /// Leaves out the token ids that are in none of these ranges, which rise.
    pub fn keep_ids(&mut self, kept: &[Range<usize>]) {
        if let Some([piece]) = self.there.as_deref() {
            let part = |range: &Range<usize>| Piece { ids: range.clone(), ..piece.clone() };
            self.there = Some(kept.iter().map(part).collect());
            return;
        }
        let mut to = 0;
        for range in kept {
            self.ids.copy_within(range.clone(), to);
            to += range.len();
        }
        self.ids.truncate(to);
    }
}

/// A file that is being written, under a name of its own: of two that write the same file, each has another.
pub struct PendingFile {
    path: PathBuf,
    temporary: PathBuf,
    file: BufWriter<File>,
}

impl PendingFile {
    /// Starts what is to be `path`. `unique` tells this process from all others.
    pub fn create(path: &Path, unique: &str) -> Result<Self> {
        let mut temporary = path.as_os_str().to_owned();
        temporary.push(format!(".tmp-{unique}"));
        let temporary = PathBuf::from(temporary);
        let file = File::create(&temporary).map_err(|error| Error::io("make the file", &temporary, &error))?;
        Ok(Self { path: path.into(), temporary, file: BufWriter::with_capacity(1 << 20, file) })
    }

    /// Adds bytes.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(|error| Error::io("write", &self.temporary, &error))
    }

    /// Gives the file its name, once it is on disk.
    pub fn finish(mut self) -> Result<()> {
        let flushed = self.file.flush().and_then(|()| self.file.get_ref().sync_all());
        flushed.map_err(|error| Error::io("write", &self.temporary, &error))?;
        fs::rename(&self.temporary, &self.path).map_err(|error| Error::io("rename", &self.temporary, &error))
    }
}

impl Drop for PendingFile {
    fn drop(&mut self) {
        // After `finish` there is nothing of this name; before it, nobody wants what there is.
        let _ = fs::remove_file(&self.temporary);
    }
}

/// The file of a part that is being written.
pub struct FrameWriter {
    file: PendingFile,
    num_bytes: u64,
    frames: Vec<Frame>,
}

impl FrameWriter {
    /// Starts what is to be `path`. `unique` tells this process from all others.
    pub fn create(path: &Path, unique: &str) -> Result<Self> {
        Ok(Self { file: PendingFile::create(path, unique)?, num_bytes: 0, frames: Vec::new() })
    }

    /// Adds a batch.
    pub fn push(&mut self, batch: &Batch) -> Result<()> {
        let head = serde_json::to_vec(batch).map_err(|_| {
            Error::new(ErrorKind::Argument, "expected names of files in UTF-8, found others").with_path(&self.file.path)
        })?;
        let runs: Vec<u32> = batch.runs.iter().flat_map(|run| [run.start, run.end]).collect();
        let samples: Vec<u64> = batch
            .samples
            .iter()
            .flat_map(|sample| [sample.num_tokens.into(), sample.num_runs.into(), sample.line])
            .collect();
        let start = self.num_bytes;
        let mut hasher = blake3::Hasher::new();
        for bytes in [&head[..], bytemuck::cast_slice(&runs), bytemuck::cast_slice(&samples)] {
            hasher.update(bytes);
            self.write(bytes)?;
        }
        let ids = bytemuck::cast_slice(&batch.ids);
        self.write(ids)?;
        self.frames.push(Frame {
            start,
            num_head_bytes: head.len(),
            num_ids: batch.ids.len(),
            num_runs: batch.runs.len(),
            num_samples: batch.samples.len(),
            blake3: hasher.finalize().to_hex().to_string(),
            ids_blake3: blake3::hash(ids).to_hex().to_string(),
        });
        Ok(())
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.num_bytes += bytes.len() as u64;
        self.file.write(bytes)
    }

    /// Gives the file its name, once it is on disk.
    pub fn finish(mut self) -> Result<()> {
        let index = serde_json::to_vec(&self.frames).expect("plain data");
        let hash = blake3::hash(&index);
        self.write(&index)?;
        self.write(&(index.len() as u64).to_le_bytes())?;
        self.write(hash.as_bytes())?;
        self.write(MAGIC)?;
        self.file.finish()
    }
}

/// The file of a part.
#[derive(Debug)]
pub struct FrameReader {
    part: u64,
    path: PathBuf,
    file: File,
    frames: Vec<Frame>,
}

impl FrameReader {
    /// Opens a file that [`FrameWriter`] finished, of the part of this number.
    ///
    /// # Errors
    /// [`ErrorKind::Dataset`] if it is damaged.
    pub fn open(path: &Path, part: u64) -> Result<Self> {
        let file = File::open(path).map_err(|error| Error::io("open", path, &error))?;
        let num_bytes = file.metadata().map_err(|error| Error::io("read", path, &error))?.len();
        let read_at = |start: u64, num_bytes: usize| {
            let mut bytes = vec![0; num_bytes];
            file.read_exact_at(&mut bytes, start).map(|()| bytes).map_err(|error| Error::io("read", path, &error))
        };
        let tail_start = num_bytes.checked_sub(TAIL_BYTES as u64).ok_or_else(|| damaged(path))?;
        let tail = read_at(tail_start, TAIL_BYTES)?;
        let index_bytes = u64::from_le_bytes(tail[..8].try_into().expect("of 8 bytes"));
        let index_start = tail_start.checked_sub(index_bytes).filter(|_| tail.ends_with(MAGIC));
        let index = read_at(index_start.ok_or_else(|| damaged(path))?, index_bytes as usize)?;
        if blake3::hash(&index).as_bytes()[..] != tail[8..40] {
            return Err(damaged(path));
        }
        let frames = serde_json::from_slice(&index).map_err(|_| damaged(path))?;
        Ok(Self { part, path: path.into(), file, frames })
    }

    /// Number of batches.
    pub fn len(&self) -> usize {
        self.frames.len()
    }

    /// Reads a batch, but for its token ids.
    fn read(&self, number: usize) -> Result<Batch> {
        let frame = &self.frames[number];
        let mut hasher = blake3::Hasher::new();
        let mut place = frame.start;
        let mut read = |bytes: &mut [u8]| {
            self.file.read_exact_at(bytes, place).map_err(|error| Error::io("read", &self.path, &error))?;
            place += bytes.len() as u64;
            hasher.update(bytes);
            Ok::<_, Error>(())
        };
        let mut head = vec![0; frame.num_head_bytes];
        let (mut runs, mut samples) = (vec![0u32; 2 * frame.num_runs], vec![0u64; 3 * frame.num_samples]);
        read(&mut head)?;
        read(bytemuck::cast_slice_mut(&mut runs))?;
        read(bytemuck::cast_slice_mut(&mut samples))?;
        if hasher.finalize().to_hex().as_str() != frame.blake3 {
            return Err(damaged(&self.path));
        }
        let mut batch: Batch = serde_json::from_slice(&head).map_err(|_| damaged(&self.path))?;
        batch.there = Some(vec![Piece { part: self.part, frame: number, ids: 0..frame.num_ids }]);
        batch.runs = runs.chunks_exact(2).map(|run| Range { start: run[0], end: run[1] }).collect();
        let sample =
            |values: &[u64]| BatchSample { num_tokens: values[0] as u32, num_runs: values[1] as u32, line: values[2] };
        batch.samples = samples.chunks_exact(3).map(sample).collect();
        Ok(batch)
    }

    /// Reads the token ids of a frame into `ids`.
    ///
    /// # Errors
    /// [`ErrorKind::Dataset`] if they are damaged, or there is no such frame.
    pub fn read_ids(&self, number: usize, ids: &mut Vec<u32>) -> Result<()> {
        let frame = self.frames.get(number).ok_or_else(|| damaged(&self.path))?;
        let start = frame.start + (frame.num_head_bytes + 8 * frame.num_runs + 24 * frame.num_samples) as u64;
        ids.resize(frame.num_ids, 0);
        let bytes = bytemuck::cast_slice_mut(ids);
        self.file.read_exact_at(bytes, start).map_err(|error| Error::io("read", &self.path, &error))?;
        match blake3::hash(bytes).to_hex().as_str() == frame.ids_blake3 {
            true => Ok(()),
            false => Err(damaged(&self.path)),
        }
    }
}

fn damaged(path: &Path) -> Error {
    // Nothing can be taken from it by the next run either.
    let _ = fs::remove_file(path);
    Error::new(ErrorKind::Dataset, "expected a part of the data set as it was written, found it damaged")
        .with_path(path)
        .with_hint("it was removed; run again, and only this part is made anew. Check the storage if it comes again")
}

/// The batches of all parts that are there, in the order of the input, for any number of threads.
#[derive(Debug, Default)]
pub struct Frames(Mutex<Queue>);

#[derive(Debug, Default)]
struct Queue {
    parts: VecDeque<Arc<FrameReader>>,
    /// Batches of the first part that were taken.
    num_taken: usize,
    sequence: u64,
}

impl Frames {
    /// Adds the next part.
    pub fn push(&self, part: FrameReader) {
        self.0.lock().expect("no thread panics while it holds the queue").parts.push_back(part.into());
    }

    /// The next batch, if there is one.
    pub fn next(&self) -> Result<Option<Batch>> {
        let mut queue = self.0.lock().expect("no thread panics while it holds the queue");
        let (part, number) = loop {
            match queue.parts.front() {
                None => return Ok(None),
                Some(part) if queue.num_taken < part.len() => break (part.clone(), queue.num_taken),
                Some(_) => {
                    queue.parts.pop_front();
                    queue.num_taken = 0;
                }
            }
        };
        queue.num_taken += 1;
        queue.sequence += 1;
        let sequence = queue.sequence - 1;
        drop(queue); // The rest needs no order.
        Ok(Some(Batch { sequence, ..part.read(number)? }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Position;

    fn batch() -> Batch {
        let error = Error::new(ErrorKind::MissingKey, "expected a key")
            .with_path(Path::new("a.jsonl"))
            .with_position(Position { line: 3, column: 4 })
            .at_location("messages[0]")
            .with_hint("write it");
        Batch {
            file: 2,
            num_newlines: 5,
            num_records: 3,
            ids: vec![7, 8, 9],
            runs: vec![1..2, 0..1],
            samples: vec![BatchSample { num_tokens: 3, num_runs: 2, line: 1 << 40 }],
            rejects: vec![error],
            ..Batch::default()
        }
    }

    // A batch comes out as it went in, and in order; a file with any byte changed or cut off is refused and removed.
    #[test]
    fn what_goes_in_comes_out() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("part");
        let write = || {
            let mut writer = FrameWriter::create(&path, "1").unwrap();
            writer.push(&batch()).unwrap();
            writer.push(&Batch { num_records: 4, ..batch() }).unwrap();
            writer.finish().unwrap();
        };
        let read = || {
            let frames = Frames::default();
            let part = FrameReader::open(&path, 5)?;
            let mut ids = Vec::new();
            (0..part.len()).try_for_each(|frame| part.read_ids(frame, &mut ids))?;
            assert_eq!(batch().ids, ids);
            frames.push(part);
            std::iter::from_fn(|| frames.next().transpose()).collect::<Result<Vec<_>>>()
        };
        write();
        assert_eq!(1, fs::read_dir(directory.path()).unwrap().count());
        let there = |frame| Batch {
            ids: Vec::new(),
            there: Some(vec![Piece { part: 5, frame, ids: 0..3 }]),
            sequence: frame as u64,
            ..batch()
        };
        let expected = [there(0), Batch { num_records: 4, ..there(1) }];
        assert_eq!(format!("{expected:?}"), format!("{:?}", read().unwrap()));

        let whole = fs::read(&path).unwrap();
        for at in (0..whole.len()).step_by(7) {
            for content in [&whole[..at], &[&whole[..at], &[whole[at] ^ 1], &whole[at + 1..]].concat()] {
                fs::write(&path, content).unwrap();
                assert_eq!(ErrorKind::Dataset, read().unwrap_err().kind(), "at {at}");
                assert!(!path.exists());
            }
        }
    }

    // Token ids that are elsewhere are divided and left out as those in memory are.
    #[test]
    fn pieces_are_divided_as_ids() {
        let all = 0..10;
        for kept in [vec![], vec![all.clone()], vec![0..3, 5..6, 8..10], vec![2..4, 4..4]] {
            let mut here = Batch { ids: all.clone().map(|id| id as u32).collect(), ..Batch::default() };
            let mut there =
                Batch { there: Some(vec![Piece { part: 1, frame: 2, ids: all.clone() }]), ..Batch::default() };
            here.keep_ids(&kept);
            there.keep_ids(&kept);
            let of = |ids: Ids| match ids {
                Ids::Here(ids) => ids,
                Ids::There(pieces) => pieces.into_iter().flat_map(|piece| piece.ids).map(|id| id as u32).collect(),
            };
            let num_ids = here.ids.len();
            for at in 0..=num_ids {
                let again =
                    |batch: &Batch| Batch { ids: batch.ids.clone(), there: batch.there.clone(), ..Batch::default() };
                let (mut first, mut second) = (again(&here).take_ids(), again(&there).take_ids());
                assert_eq!(of(first.split_off(at)), of(second.split_off(at)), "{kept:?} at {at}");
                assert_eq!(of(first), of(second), "{kept:?} at {at}");
            }
        }
    }

    // Who gives up leaves nothing.
    #[test]
    fn nothing_is_left() {
        let directory = tempfile::tempdir().unwrap();
        let mut writer = FrameWriter::create(&directory.path().join("part"), "1").unwrap();
        writer.push(&batch()).unwrap();
        drop(writer);
        assert_eq!(0, fs::read_dir(directory.path()).unwrap().count());
    }
}
