//! Preprocessing by several processes, on one machine or many: the input is cut into parts at ends of segments, and whoever can
//! encodes a part into a file. What is in the files but token ids is put in order as the batches of this process's own threads
//! are; then it is known what each shard holds, and whoever can writes it (`shards`).
//!
//! Tasks share nothing and wait for nobody. What comes of one follows from the input and the recipe alone, so it does not
//! matter which machine did it, how often, or in which run.

use std::collections::BTreeMap;
use std::fs;
use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::channel;

use serde::{Deserialize, Serialize};

use super::collect::Collector;
use super::frames::{FrameReader, FrameWriter, Frames};
use super::reuse::Reuse;
use super::schedule::Schedule;
use super::shards::{ShardOrder, shard_path};
use super::worker::{Event, Feed, work};
use super::{Duplicates, OnError, Options, Place, chunk_bytes, num_threads, recipe};
use crate::conversation::{Answers, FieldMapping, Shape};
use crate::error::{Error, ErrorKind, Result};
use crate::manifest::{Recipe, shard_name};
use crate::model::Model;
use crate::sample::TooLong;
use crate::sampler::Policies;
use crate::source::{FilePart, Source};
use crate::template::DroppedThinking;
use crate::tokenize::control::ControlPolicy;

/// A part of the input, and all that is needed to encode it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Part {
    /// Its number, from 0, in the order of the input.
    pub number: u64,
    /// Of this crate: another version may encode otherwise.
    pub version: String,
    /// What the samples have to be made by.
    pub recipe: Recipe,
    /// Whether wrong records are left out.
    pub is_lenient: bool,
    /// Where older datasets may be, and whether that is a cache.
    pub place: (bool, PathBuf),
    /// Parts of files.
    pub files: Vec<FilePart>,
}

/// The model that encodes all parts, and where their files go.
#[derive(Clone, Debug)]
pub struct Setup {
    /// Directory of the parts.
    pub directory: PathBuf,
    /// Directory of the tokenizer.
    pub tokenizer: PathBuf,
    /// Chat template; see [`Model::load`].
    pub template: String,
    /// The date that the template takes for today.
    pub template_date: String,
}

/// How far an [`Executor`] is.
#[derive(Clone, Debug, Default)]
pub struct Polled {
    /// Tasks that were finished since it was asked last, by their numbers, and what they returned.
    pub finished: Vec<(u64, String)>,
    /// How many more tasks it takes.
    pub num_free: usize,
}

/// Gets tasks done, by [`run_task`] in other processes.
pub trait Executor {
    /// Makes ready.
    fn begin(&mut self, setup: &Setup) -> Result<()>;
    /// Takes a task, as JSON; `name` is for messages.
    fn submit(&mut self, number: u64, name: &str, task: String) -> Result<()>;
    /// Asked many times a second; does not wait.
    fn poll(&mut self) -> Result<Polled>;
    /// Ends what is under way: nobody writes any more.
    fn stop(&mut self) -> Result<()>;
}

/// Beginning of the hidden name of a directory with the work of other processes, before some digits of the fingerprint.
pub(super) const PARTS: &str = "parts-";

/// Removes all directories whose names begin as `prefix` does, but for `kept`.
pub(super) fn remove_parts(prefix: &Path, kept: Option<&Path>) -> Result<()> {
    let (Some(parent), Some(name)) = (prefix.parent(), prefix.file_name().and_then(|name| name.to_str())) else {
        return Ok(());
    };
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let digits = entry.file_name().to_str().and_then(|found| found.strip_prefix(name)).map(str::to_owned);
        let is_ours =
            digits.is_some_and(|digits| digits.len() == 16 && digits.bytes().all(|digit| digit.is_ascii_hexdigit()));
        if is_ours && kept.is_none_or(|kept| kept.file_name() != Some(&entry.file_name())) {
            fs::remove_dir_all(entry.path()).map_err(|error| Error::io("remove", &entry.path(), &error))?;
        }
    }
    Ok(())
}

/// About how many bytes of the input a part has. Decided by the input alone, so that the next run finds the same parts.
fn part_bytes(source: &Source) -> u64 {
    (source.num_bytes() / 128).clamp(4 << 20, 128 << 20)
}

/// The parts of an input: what is done, what is under way, and the batches of those whose turn it is.
pub(super) struct Distribution<'a> {
    executor: &'a mut dyn Executor,
    directory: PathBuf,
    options: &'a Options,
    recipe: Recipe,
    parts: Vec<Vec<FilePart>>,
    is_done: Vec<bool>,
    num_submitted: usize,
    /// Parts whose batches were handed out.
    num_taken: usize,
    /// The batches, in the order of the input.
    pub frames: Arc<Frames>,
}

impl<'a> Distribution<'a> {
    /// Cuts the input. `None` if there is a single part: no machine is faster than this one then.
    pub fn plan(
        source: &Source,
        options: &'a Options,
        model: &Model,
        directory: PathBuf,
        executor: &'a mut dyn Executor,
    ) -> Result<Option<Self>> {
        let parts = source.parts(options.part_bytes.unwrap_or_else(|| part_bytes(source)));
        if parts.len() < 2 {
            return Ok(None);
        }
        fs::create_dir_all(&directory).map_err(|error| Error::io("make the directory", &directory, &error))?;
        let directory = absolute(&directory)?;
        let template = match Path::new(&model.template_name).is_file() {
            true => absolute(Path::new(&model.template_name))?.display().to_string(),
            false => model.template_name.clone(),
        };
        executor.begin(&Setup {
            directory: directory.clone(),
            tokenizer: absolute(&model.directory)?,
            template,
            template_date: model.template_date.clone(),
        })?;
        let is_done = (0..parts.len() as u64).map(|number| part_path(&directory, number).exists()).collect();
        Ok(Some(Self {
            executor,
            directory,
            options,
            recipe: recipe(options, model),
            parts,
            is_done,
            num_submitted: 0,
            num_taken: 0,
            frames: Arc::default(),
        }))
    }

    /// Ends what is under way and removes what was done: the input is about to become another one.
    pub fn discard(&mut self) -> Result<()> {
        self.executor.stop()?;
        fs::remove_dir_all(&self.directory).map_err(|error| Error::io("remove", &self.directory, &error))
    }

    /// Takes what is finished, and gives out what is not begun.
    pub fn advance(&mut self, collector: &mut Collector, schedule: &Schedule) -> Result<()> {
        let num_parts = self.parts.len() as u64;
        let Polled { finished, mut num_free } = self.executor.poll()?;
        for (task, result) in finished {
            match task.checked_sub(num_parts) {
                None => self.is_done[task as usize] = true,
                Some(shard) => {
                    let info = serde_json::from_str(&result).map_err(|error| unreadable(&error))?;
                    collector.put(shard as usize, &shard_path(&self.directory, shard as usize), info)?;
                }
            }
        }
        for shard in collector.take_elsewhere() {
            let number = shard.number;
            let order = ShardOrder::prepare(shard, &self.directory)?;
            let order = serde_json::to_string(&order).expect("plain data");
            self.executor.submit(num_parts + number as u64, &shard_name(number), order)?;
            num_free = num_free.saturating_sub(1);
        }
        while self.num_submitted < self.parts.len() && num_free > 0 {
            let number = self.num_submitted;
            self.num_submitted += 1;
            if !self.is_done[number] {
                num_free -= 1;
                let part = self.part(number as u64)?;
                self.executor.submit(number as u64, &format!("part {number}"), part)?;
            }
        }
        while self.num_taken < self.parts.len() && self.is_done[self.num_taken] {
            let number = self.num_taken as u64;
            let part = FrameReader::open(&part_path(&self.directory, number), number)?;
            let num_batches = part.len() as u64;
            self.frames.push(part);
            schedule.offer(num_batches);
            self.num_taken += 1;
            if self.num_taken == self.parts.len() {
                schedule.offer_all();
            }
        }
        Ok(())
    }

    fn part(&self, number: u64) -> Result<String> {
        let (is_cache, place) = match &self.options.place {
            Place::Directory { path, .. } => (false, path),
            Place::Cache(path) => (true, path),
        };
        let part = Part {
            number,
            version: env!("CARGO_PKG_VERSION").into(),
            recipe: self.recipe.clone(),
            is_lenient: self.options.on_error == OnError::Skip,
            place: (is_cache, absolute(place)?),
            files: self.parts[number as usize].clone(),
        };
        serde_json::to_string(&part)
            .map_err(|_| Error::new(ErrorKind::Argument, "expected names of files in UTF-8, found others"))
    }
}

fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).map_err(|error| Error::io("find", path, &error))
}

pub(super) fn part_path(directory: &Path, number: u64) -> PathBuf {
    directory.join(format!("part-{number:06}"))
}

/// A task as its JSON says it.
#[derive(Deserialize)]
#[serde(untagged)]
enum Task {
    Part(Box<Part>),
    Shard(ShardOrder),
}

/// Does a task that the process which put it in order wrote as JSON: encodes a part into a file in `directory`, unless it is
/// there, or writes a shard there. `unique` tells this process from all others that may do the same.
///
/// Returns what that process is to know of it.
///
/// # Errors
/// What is wrong with a record is no error here, but for whoever puts the parts together. [`ErrorKind::Argument`] if this
/// machine has another version or tokenizer; [`ErrorKind::Io`] if it sees other files, or can't write;
/// [`ErrorKind::Dataset`] if a part is damaged.
pub fn run_task(
    json: &str,
    model: &Model,
    directory: &Path,
    threads: Option<NonZero<usize>>,
    unique: &str,
) -> Result<String> {
    // The version comes first: of another one, the rest may not be readable.
    let found: serde_json::Value = serde_json::from_str(json).unwrap_or_default();
    let version = env!("CARGO_PKG_VERSION");
    if found["version"] != version {
        let message = format!("expected sft-fast {} on all machines, found {version}", found["version"]);
        return Err(Error::new(ErrorKind::Argument, message).with_hint("install the same version everywhere"));
    }
    match serde_json::from_str(json).map_err(|error| unreadable(&error))? {
        Task::Part(part) => encode_part(&part, model, directory, threads, unique).map(|()| String::new()),
        Task::Shard(order) => {
            let info = order.write(directory, unique)?;
            Ok(serde_json::to_string(&info).expect("plain data"))
        }
    }
}

fn unreadable(error: &serde_json::Error) -> Error {
    Error::new(ErrorKind::Argument, format!("expected what another process of this version wrote: {error}"))
}

fn encode_part(
    part: &Part,
    model: &Model,
    directory: &Path,
    threads: Option<NonZero<usize>>,
    unique: &str,
) -> Result<()> {
    let path = part_path(directory, part.number);
    if path.exists() {
        return Ok(());
    }
    let options = options(part, threads)?;
    if recipe(&options, model) != part.recipe {
        let message = "expected the tokenizer and the chat template of the machine that started the work, found others";
        return Err(Error::new(ErrorKind::Argument, message)
            .with_path(&model.directory)
            .with_hint("put the model on storage that all machines see under the same path"));
    }
    let reuse = Reuse::find(&options.place, &part.recipe);
    let num_threads = num_threads(&options)?;
    let num_bytes = part.files.iter().map(FilePart::num_part_bytes).sum();
    let source = Source::of_part(&part.files, chunk_bytes(&options, num_bytes, num_threads))?;
    let mut writer = FrameWriter::create(&path, unique)?;
    let schedule = Schedule::new(4 * num_threads as u64);
    let feed = Feed::Records { source: &source, reuse: &reuse };
    std::thread::scope(|scope| {
        let (sender, receiver) = channel();
        for _ in 0..num_threads {
            let (sender, schedule, options, feed) = (sender.clone(), &schedule, &options, &feed);
            scope.spawn(move || work(options, model, feed, schedule, &sender));
        }
        drop(sender);
        let _close = schedule.close_on_drop();
        let (mut waiting, mut next) = (BTreeMap::new(), 0);
        for event in receiver {
            if let Event::Encoded(batch) = event? {
                waiting.insert(batch.sequence, batch);
            }
            while let Some(batch) = waiting.remove(&next) {
                next += 1;
                writer.push(&batch)?;
                if batch.fatal.is_some() {
                    return Ok(()); // nobody reads on
                }
                schedule.advance();
            }
            if schedule.num_chunks() == Some(next) {
                break;
            }
        }
        source.check_unchanged()
    })?;
    writer.finish()
}

/// The options of which [`recipe`] makes the part's.
fn options(part: &Part, num_threads: Option<NonZero<usize>>) -> Result<Options> {
    let recipe = part.recipe.clone();
    let unknown = || Error::new(ErrorKind::Argument, "expected policies that this version knows, found others");
    Ok(Options {
        files: Vec::new(),
        file_names: None,
        sources: None,
        place: match &part.place {
            (true, path) => Place::Cache(path.clone()),
            (false, path) => Place::Directory { path: path.clone(), overwrite: false },
        },
        mapping: FieldMapping {
            system_key: recipe.system_key,
            prompt_key: recipe.prompt_key,
            query_key: recipe.query_key,
            response_key: recipe.response_key,
            history_key: recipe.history_key,
            text_key: recipe.text_key,
        },
        record_shape: Shape::named(&recipe.record_shape),
        sequence_length: recipe.sequence_length,
        policies: Policies {
            control_tokens: ControlPolicy::named(&recipe.control_tokens).ok_or_else(unknown)?,
            answers: Answers::named(&recipe.train_on).ok_or_else(unknown)?,
            trains_on_tool_calls: recipe.train_on_tool_calls,
            trains_on_thinking: recipe.train_on_thinking,
            dropped_thinking: DroppedThinking::named(&recipe.dropped_thinking).ok_or_else(unknown)?,
        },
        too_long: TooLong::named(&recipe.too_long).ok_or_else(unknown)?,
        duplicates: Duplicates::named(&recipe.duplicates).ok_or_else(unknown)?,
        on_error: if part.is_lenient { OnError::Skip } else { OnError::Raise },
        num_threads,
        chunk_bytes: None,
        part_bytes: None,
        max_shard_tokens: None,
    })
}
