//! The parallel pipeline: chunks of records in, shards, rejected records and manifest out, in the order of the input.
//!
//! Threads take chunks from the [`Source`] and turn them into samples on their own (`worker`). The calling thread puts the
//! results in order (`collect`) and gives every token its place, so that the bytes on disk depend on neither the number of
//! threads nor the size of chunks; the threads then write the tokens there themselves. What they do next, and how far the
//! fastest may run ahead of the slowest, is decided in `schedule`.
//!
//! Where other processes help, they do what a thread does with chunks (`parts`), and their results come as files (`frames`)
//! to the same collector; they write the shards, too (`shards`).

mod collect;
mod duplicates;
mod frames;
mod parts;
mod reuse;
mod schedule;
mod shards;
mod worker;

use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use crate::conversation::{FieldMapping, Shape, ShapeCounts};
use crate::dataset::Dataset;
use crate::error::{Error, ErrorClass, ErrorKind, Result};
use crate::manifest::{DATASET_FORMAT, FORMAT_VERSION, Manifest, Occupant, Recipe, Source as SourceName, SourceInfo};
use crate::model::Model;
use crate::sample::TooLong;
use crate::sampler::Policies;
use crate::shard::TokenType;
use crate::source::Source;
use crate::staging::Staging;
pub use duplicates::Duplicates;
pub use parts::{Executor, Part, Polled, Setup, run_task};

use collect::Collector;
use parts::{Distribution, PARTS, remove_parts};
use reuse::Reuse;
use schedule::Schedule;
use worker::{Feed, work};

/// What to do with a record that is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnError {
    /// Stop and write nothing.
    Raise,
    /// Leave the record out, write it to `rejected.jsonl` and count it.
    Skip,
}

/// Where the dataset goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// This directory. Another dataset there is replaced only if `overwrite` says so.
    Directory {
        /// The directory of the dataset.
        path: PathBuf,
        /// Whether another dataset may be replaced.
        overwrite: bool,
    },
    /// A directory named by the fingerprint, in this one.
    Cache(PathBuf),
}

/// What to preprocess, and how.
#[derive(Clone, Debug)]
pub struct Options {
    /// The input files, in order.
    pub files: Vec<PathBuf>,
    /// What the files are called in the manifest and in errors; `None`: their paths.
    pub file_names: Option<Vec<PathBuf>>,
    /// The sources that the files belong to, in order; `None`: each is one, called by its path.
    pub sources: Option<Vec<SourceName>>,
    /// Where the dataset goes.
    pub place: Place,
    /// Which fields hold what.
    pub mapping: FieldMapping,
    /// The shape that all records must have; `None`: each is read by its keys.
    pub record_shape: Option<Shape>,
    /// Longest sample, in tokens.
    pub sequence_length: u32,
    /// What decides the samples of a conversation.
    pub policies: Policies,
    /// What to do with longer ones.
    pub too_long: TooLong,
    /// What to do with records of which the same samples came before.
    pub duplicates: Duplicates,
    /// What to do with wrong records.
    pub on_error: OnError,
    /// Threads that encode; `None`: one for each core.
    pub num_threads: Option<NonZero<usize>>,
    /// About how much of the input a thread takes at a time; `None`: by the size of the input. Never changes the output.
    pub chunk_bytes: Option<usize>,
    /// About how much of the input another process takes at a time; `None`: by the size of the input. Never changes the
    /// output.
    pub part_bytes: Option<u64>,
    /// A shard is closed before it would hold more tokens; `None`: [`max_tokens`](crate::shard::write::max_tokens).
    pub max_shard_tokens: Option<u32>,
}

/// How far the work is. Counts are of what is finished, in the order of the input.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Whether the input is still being hashed, to find out whether the dataset is there already.
    pub is_hashing: bool,
    /// Bytes of input read in this phase.
    pub num_bytes: u64,
    /// Bytes of input in all.
    pub num_total_bytes: u64,
    /// Records read.
    pub num_records: u64,
    /// Records left out.
    pub num_rejected: u64,
    /// Tokens made.
    pub num_tokens: u64,
    /// Records that could be read, by their shape.
    pub shapes: ShapeCounts,
}

/// The dataset that [`preprocess`] made or found.
#[derive(Clone, Debug)]
pub struct Report {
    /// Its directory.
    pub path: PathBuf,
    /// Its manifest.
    pub manifest: Manifest,
    /// Whether it was there already.
    pub is_reused: bool,
    /// Samples that were taken from an older dataset, since their part of the input did not change.
    pub num_reused_samples: u64,
    /// Why the reference tokenizer was taken, where it was.
    pub why_not_fast: Option<String>,
    /// Wall time.
    pub elapsed: Duration,
}

/// Makes the dataset that `options` describe, unless it is there already.
///
/// `load` gives the model; it works while the input is hashed. `on_progress` is called about ten times a second; an error from
/// it stops the work. With an `executor`, other processes encode; the dataset is the same. What they have done when the work
/// ends early is kept beside the dataset, hidden, for the next time, unless a record was wrong.
///
/// # Errors
/// What `load` says. The first wrong record in the order of the input, with its place, if `on_error` is
/// [`OnError::Raise`]; samples that are too long or have nothing to learn are counted, never raised. Whatever the error,
/// nothing half-written is left.
pub fn preprocess(
    options: &Options,
    load: impl FnOnce() -> Result<Model> + Send,
    executor: Option<&mut dyn Executor>,
    on_progress: &mut dyn FnMut(&Progress) -> Result<()>,
) -> Result<Report> {
    preprocess_unless(options, load, executor, on_progress, &mut |_| Ok(None))
}

/// As [`preprocess`], for a dataset that goes elsewhere from its place, such as to object storage.
///
/// `elsewhere` is asked for the manifest of the dataset of a fingerprint, before work and again when the place is ours. If it
/// has one that will do, it is the report's, and nothing is made; `path` is then only where the dataset would have been.
///
/// # Errors
/// Those of [`preprocess`], and of `elsewhere`.
pub fn preprocess_unless(
    options: &Options,
    load: impl FnOnce() -> Result<Model> + Send,
    executor: Option<&mut dyn Executor>,
    on_progress: &mut dyn FnMut(&Progress) -> Result<()>,
    elsewhere: &mut dyn FnMut(&str) -> Result<Option<Manifest>>,
) -> Result<Report> {
    let start = Instant::now();
    if options.files.is_empty() {
        return Err(Error::new(ErrorKind::Argument, "expected at least one input file, found none"));
    }
    let num_source_files = options.sources.iter().flatten().map(|source| source.num_files).sum::<u64>();
    if options.sources.is_some() && num_source_files != options.files.len() as u64 {
        let message = format!("expected sources of {} files, found {num_source_files}", options.files.len());
        return Err(Error::new(ErrorKind::Argument, message));
    }
    if options.sequence_length < 2 {
        let message = format!("expected a sequence_length of at least 2, found {}", options.sequence_length);
        return Err(Error::new(ErrorKind::Argument, message));
    }
    let num_threads = num_threads(options)?;
    let (model, source) = open(load, options, num_threads, on_progress)?;
    model.tokenizer.expect_bytes(source.num_bytes());
    let files = (0..source.num_files()).map(|number| file_info(&source, number)).collect::<Vec<_>>();
    let recipe = recipe(options, &model);
    let fingerprint = recipe.fingerprint(&files);
    let target = match &options.place {
        Place::Directory { path, .. } => path.clone(),
        Place::Cache(path) => path.join(&fingerprint[..32]),
    };
    let found = |manifest: Manifest| Report {
        path: target.clone(),
        num_reused_samples: manifest.num_samples,
        manifest,
        is_reused: true,
        why_not_fast: model.tokenizer.why_not_fast().map(str::to_owned),
        elapsed: start.elapsed(),
    };
    let mut find = || match elsewhere(&fingerprint)? {
        Some(manifest) if is_wanted(&manifest, options) => Ok(Some(manifest)),
        _ => find_dataset(&target, &fingerprint, options),
    };
    // Before the lock, so that a dataset can be used where nothing can be written.
    if let Some(manifest) = find()? {
        return Ok(found(manifest));
    }
    let progress = Progress { num_total_bytes: source.num_bytes(), ..Progress::default() };
    let staging = Staging::lock(&target, || on_progress(&progress))?;
    if let Some(manifest) = find()? {
        return Ok(found(manifest));
    }

    let directory = staging.create()?;
    let collector = Collector::new(
        directory,
        files.clone(),
        options.max_shard_tokens,
        TokenType::for_vocab(model.tokenizer.vocab_size()),
    )?;
    let reuse = Reuse::find(&options.place, &recipe);
    let sources = options
        .sources
        .clone()
        .unwrap_or_else(|| files.iter().map(|file| SourceName { name: file.path.clone(), num_files: 1 }).collect());
    let parts_directory = staging.beside(&format!("{PARTS}{}", &fingerprint[..16]));
    let mut distribution = match executor {
        Some(executor) => {
            remove_parts(&staging.beside(PARTS), Some(&parts_directory))?;
            Distribution::plan(&source, options, &model, parts_directory, executor)?
        }
        None => None,
    };
    let counts = encode(options, num_threads, &model, &source, &reuse, &mut distribution, collector, on_progress);
    if let (Some(distribution), Err(error)) = (&mut distribution, &counts)
        && error.kind().class() == ErrorClass::Input
    {
        let _ = distribution.discard(); // the error to report is that of the record
    }
    let counts = counts?;
    let manifest = Manifest {
        format: DATASET_FORMAT.into(),
        format_version: FORMAT_VERSION,
        fingerprint,
        recipe,
        tokenizer: model.directory.display().to_string(),
        template: model.template_name.clone(),
        template_verdict: serde_json::to_value(model.template.verdict()).expect("plain data"),
        vocab_size: model.tokenizer.vocab_size(),
        pad_token_id: model.pad_token_id,
        token_type: TokenType::for_vocab(model.tokenizer.vocab_size()),
        sample_tokens: counts.sample_tokens(),
        num_records: counts.num_records,
        num_samples: counts.num_records - counts.num_rejected + counts.tally.num_split_samples,
        num_rejected: counts.num_rejected,
        rejected_by_reason: counts.rejected_by_reason,
        records_by_shape: counts.shapes.to_map(),
        num_split_samples: counts.tally.num_split_samples,
        num_truncated: counts.tally.num_truncated,
        num_cut_answers: counts.tally.num_cut_answers,
        num_control_text: counts.tally.num_control_text,
        num_skipped_answers: counts.tally.num_skipped_answers,
        num_tokens: counts.num_tokens,
        num_label_tokens: counts.num_label_tokens,
        files: counts.files,
        sources,
        shards: counts.shards,
        segments: counts.segments,
    };
    if manifest.num_samples == 0 {
        return Err(no_samples(&manifest));
    }
    manifest.write(directory)?;
    // Under the lock, and before the dataset is there, since nobody looks for them then.
    remove_parts(&staging.beside(PARTS), None)?;
    staging.publish()?;
    let num_reused_samples = counts.num_reused_samples;
    Ok(Report { num_reused_samples, is_reused: false, ..found(manifest) })
}

/// Runs the threads; the calling one collects.
#[expect(clippy::too_many_arguments, reason = "what one call of `preprocess` is made of")]
fn encode(
    options: &Options,
    num_threads: usize,
    model: &Model,
    source: &Source,
    reuse: &Reuse,
    distribution: &mut Option<Distribution<'_>>,
    mut collector: Collector,
    on_progress: &mut dyn FnMut(&Progress) -> Result<()>,
) -> Result<collect::Counts> {
    let window = 4 * num_threads as u64;
    let frames = distribution.as_ref().map(|distribution| distribution.frames.clone());
    let (schedule, feed) = match &frames {
        None => (Schedule::new(window), Feed::Records { source, reuse }),
        Some(frames) => (Schedule::waiting(window), Feed::Frames(frames)),
    };
    std::thread::scope(|scope| {
        let (sender, receiver) = channel();
        for _ in 0..num_threads {
            let (sender, schedule, feed) = (sender.clone(), &schedule, &feed);
            scope.spawn(move || work(options, model, feed, schedule, &sender));
        }
        drop(sender);
        let _close = schedule.close_on_drop(); // whatever happens below, no thread waits for ever
        let (mut last, mut last_poll) = (Instant::now(), None::<Instant>);
        let mut progress = Progress { num_total_bytes: source.num_bytes(), ..Progress::default() };
        while !collector.is_complete(&schedule) {
            if let Some(distribution) = distribution.as_mut()
                && last_poll.is_none_or(|last| last.elapsed() >= POLL_INTERVAL)
            {
                last_poll = Some(Instant::now());
                distribution.advance(&mut collector, &schedule)?;
            }
            match receiver.recv_timeout(if distribution.is_some() { POLL_INTERVAL } else { PROGRESS_INTERVAL }) {
                Ok(event) => collector.take(event?, &schedule)?,
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break, // a thread panicked, which the scope passes on
            }
            if last.elapsed() >= PROGRESS_INTERVAL {
                last = Instant::now();
                collector.report(&mut progress);
                on_progress(&progress)?;
            }
        }
        collector.report(&mut progress);
        on_progress(&progress)?;
        collector.finish(source)
    })
}

const PROGRESS_INTERVAL: Duration = Duration::from_millis(100);
/// How often other processes are looked at.
const POLL_INTERVAL: Duration = Duration::from_millis(25);
/// More threads than any machine has use for; each costs memory.
const MAX_THREADS: usize = 1024;

fn num_threads(options: &Options) -> Result<usize> {
    match options.num_threads.map(NonZero::get) {
        Some(number @ 1..=MAX_THREADS) => Ok(number),
        Some(number) => {
            let message = format!("expected num_threads to be at most {MAX_THREADS}, found {number}");
            Err(Error::new(ErrorKind::Argument, message))
        }
        None => std::thread::available_parallelism()
            .map(|number| number.get().min(MAX_THREADS))
            .map_err(|error| Error::new(ErrorKind::Io, format!("could not count the cores: {error}"))),
    }
}

/// Loads the model and, at the same time, opens the input and hashes it, since a dataset is found by content. An error of the
/// model goes first, and does not wait for the input.
fn open(
    load: impl FnOnce() -> Result<Model> + Send,
    options: &Options,
    num_threads: usize,
    on_progress: &mut dyn FnMut(&Progress) -> Result<()>,
) -> Result<(Model, Source)> {
    let has_failed = AtomicBool::new(false);
    let mut progress = Progress { is_hashing: true, ..Progress::default() };
    let mut last = Instant::now();
    let on_bytes = |num_bytes, num_total_bytes| {
        progress.num_bytes += num_bytes;
        progress.num_total_bytes = num_total_bytes;
        if has_failed.load(Ordering::Relaxed) {
            return Err(Error::new(ErrorKind::Tokenizer, "expected a model, found none"));
        }
        if last.elapsed() < PROGRESS_INTERVAL {
            return Ok(());
        }
        last = Instant::now();
        on_progress(&progress)
    };
    let mut load = Some(|| load().inspect_err(|_| has_failed.store(true, Ordering::Relaxed)));
    let mut model = None;
    let first = || model = load.take().map(|load| load());
    let sizes = options.files.iter().filter_map(|path| path.metadata().ok()).map(|file| file.len());
    let chunk_bytes = chunk_bytes(options, sizes.sum(), num_threads);
    let source = Source::open(&options.files, chunk_bytes, num_threads, first, on_bytes);
    // Where the files could not even be opened, nothing was done first.
    let model = model.or_else(|| load.map(|load| load())).transpose()?;
    let source = source?.with_names(options.file_names.as_deref());
    Ok((model.expect("it was loaded, first or then"), source))
}

fn file_info(source: &Source, number: u32) -> SourceInfo {
    let (path, num_bytes) = source.file(number);
    let blake3 = source.survey(number).blake3.clone();
    SourceInfo {
        path: path.display().to_string(),
        num_bytes,
        blake3,
        num_records: 0,
        num_samples: 0,
        num_rejected: 0,
        num_tokens: 0,
        num_label_tokens: 0,
    }
}

fn recipe(options: &Options, model: &Model) -> Recipe {
    let mapping = options.mapping.clone();
    let policies = options.policies;
    let is_dated = model.template.verdict().date_dependent;
    Recipe {
        sequence_length: options.sequence_length,
        too_long: options.too_long.as_str().into(),
        duplicates: options.duplicates.as_str().into(),
        control_tokens: policies.control_tokens.as_str().into(),
        train_on: policies.answers.as_str().into(),
        train_on_tool_calls: policies.trains_on_tool_calls,
        train_on_thinking: policies.trains_on_thinking,
        dropped_thinking: policies.dropped_thinking.as_str().into(),
        system_key: mapping.system_key,
        prompt_key: mapping.prompt_key,
        query_key: mapping.query_key,
        response_key: mapping.response_key,
        history_key: mapping.history_key,
        text_key: mapping.text_key,
        record_shape: options.record_shape.map_or("auto", Shape::as_str).into(),
        tokenizer_sha256: model.tokenizer_sha256.clone(),
        template_sha256: model.template_sha256.clone(),
        template_date: is_dated.then(|| model.template_date.clone()),
    }
}

/// Whether a dataset of the wanted fingerprint will do. Made with `skip` and wanted with `raise`, it is made again, to find the
/// wrong record and raise its error.
fn is_wanted(manifest: &Manifest, options: &Options) -> bool {
    let is_policy = |code: &String| ErrorKind::LEFT_OUT.iter().any(|kind| kind.code() == code);
    options.on_error == OnError::Skip || manifest.rejected_by_reason.keys().all(is_policy)
}

/// The dataset in `target`, if it is the wanted one; an error if something else is there that must not be replaced.
fn find_dataset(target: &Path, fingerprint: &str, options: &Options) -> Result<Option<Manifest>> {
    let refuse = |what: &str, hint: &str| Err(Error::new(ErrorKind::Dataset, what).with_path(target).with_hint(hint));
    let stranger = match Occupant::find(target)? {
        Occupant::Nothing => return Ok(None),
        Occupant::Dataset { stranger } => stranger,
        Occupant::Stranger => {
            return refuse(
                "expected a dataset, a new or an empty directory, found a directory with other files",
                "choose another output directory; nothing in this one was touched",
            );
        }
    };
    let may_replace = matches!(options.place, Place::Cache(_) | Place::Directory { overwrite: true, .. });
    match Dataset::open(target) {
        Ok(dataset) if dataset.manifest().fingerprint == fingerprint => {
            Ok(is_wanted(dataset.manifest(), options).then(|| dataset.manifest().clone()))
        }
        _ if may_replace => match stranger {
            None => Ok(None),
            Some(name) => refuse(
                &format!("expected a directory with nothing but a dataset, found '{name}' in it"),
                "move the file away, or choose another output directory; nothing in this one was touched",
            ),
        },
        Ok(_) => refuse(
            "expected the dataset of these files and settings, found another one",
            "choose another output directory, or replace the dataset with --overwrite (overwrite=True)",
        ),
        Err(error) => Err(error.with_hint("replace the damaged dataset with --overwrite (overwrite=True)")),
    }
}

/// Small inputs are cut finer, so that all threads have something to do.
fn chunk_bytes(options: &Options, num_bytes: u64, num_threads: usize) -> usize {
    options.chunk_bytes.unwrap_or_else(|| (num_bytes / (8 * num_threads as u64)).clamp(1 << 16, 1 << 20) as usize)
}

fn no_samples(manifest: &Manifest) -> Error {
    let message = match manifest.num_records {
        0 => "expected records, found none".to_owned(),
        number => format!("expected at least one sample, but all {number} records were rejected"),
    };
    let mut error = Error::new(ErrorKind::NoRecords, message);
    if let [file] = &manifest.files[..] {
        error = error.with_path(Path::new(&file.path));
    }
    if manifest.num_records > 0 {
        let reasons = manifest.rejected_by_reason.iter().map(|(code, count)| format!("{code} {count}"));
        error = error.with_hint(format!("by reason: {}", reasons.collect::<Vec<_>>().join(", ")));
    }
    error
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use super::*;
    use crate::template::ChatTemplate;
    use crate::tokenize::control::ControlTokens;
    use crate::tokenize::frame::TextFrame;
    use crate::tokenize::{Encode, Input, Tokenizer, Tokens};

    /// A tokenizer with a bug: it can't bear the letter z. Every other character is a token.
    struct Fragile(ControlTokens);

    impl Tokenizer for Fragile {
        fn encoder(&self) -> Box<dyn Encode + '_> {
            Box::new(FragileEncoder)
        }

        fn vocab_size(&self) -> u32 {
            1 << 16
        }

        fn token_to_id(&self, _: &str) -> Option<u32> {
            None
        }

        fn post_processor(&self) -> std::result::Result<Option<tokenizers::PostProcessorWrapper>, String> {
            Ok(None)
        }

        fn control_tokens(&self) -> &ControlTokens {
            &self.0
        }

        fn why_not_fast(&self) -> Option<&str> {
            None
        }
    }

    struct FragileEncoder;

    impl Encode for FragileEncoder {
        fn encode(&mut self, input: Input<'_>, tokens: &mut Tokens) -> Result<()> {
            let Input { text, spans, .. } = input;
            assert!(!text.contains('z'), "a bug");
            tokens.ids = text.bytes().map(u32::from).collect();
            tokens.runs = spans.iter().map(|span| span.start as u32..span.end as u32).collect();
            Ok(())
        }
    }

    fn model() -> Model {
        let template = "{% for message in messages %}{{ message.role + ':' + message.content + '\\n' }}{% endfor %}\
                        {% if add_generation_prompt %}assistant:{% endif %}";
        Model {
            directory: "model".into(),
            tokenizer: Box::new(Fragile(ControlTokens::new(std::iter::empty()))),
            tokenizer_sha256: String::new(),
            template_name: "native".into(),
            template: ChatTemplate::compile("test", template, &[]).unwrap(),
            template_sha256: String::new(),
            template_date: String::new(),
            pad_token_id: 0,
            text_frame: TextFrame::default(),
        }
    }

    /// 1,000 records, the one in the middle with `odd` for an answer, for three threads.
    fn options(directory: &Path, odd: &str) -> Options {
        let record = |answer: &str| format!("{{\"instruction\": \"a\", \"output\": \"{answer}\"}}\n");
        let path = directory.join("data.jsonl");
        std::fs::write(&path, [record("b").repeat(500), record(odd), record("b").repeat(499)].concat()).unwrap();
        Options {
            files: vec![path],
            file_names: None,
            sources: None,
            place: Place::Directory { path: directory.join("out"), overwrite: false },
            mapping: FieldMapping::default(),
            record_shape: None,
            sequence_length: 100,
            policies: Policies::default(),
            too_long: TooLong::Reject,
            duplicates: Duplicates::Keep,
            on_error: OnError::Raise,
            num_threads: NonZero::new(3),
            chunk_bytes: Some(64),
            part_bytes: None,
            max_shard_tokens: Some(1000),
        }
    }

    fn run(directory: &Path, odd: &str) -> Result<Report> {
        preprocess(&options(directory, odd), || Ok(model()), None, &mut |_| Ok(()))
    }

    fn names(directory: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(directory).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    // A model that can't be loaded is the error, whatever is wrong with the input, and the input is not read to its end.
    #[test]
    fn the_model_goes_first() {
        let directory = tempfile::tempdir().unwrap();
        let mut options = options(directory.path(), "y");
        options.files.push(directory.path().join("missing.jsonl"));
        let found = preprocess(&options, || Err(Error::new(ErrorKind::Tokenizer, "no")), None, &mut |_| Ok(()));
        assert_eq!(ErrorKind::Tokenizer, found.unwrap_err().kind());
        let found = preprocess(&options, || Ok(model()), None, &mut |_| Ok(()));
        assert_eq!(ErrorKind::Io, found.unwrap_err().kind());
    }

    // A thread that panics ends the work, instead of leaving the others to wait for its chunk; nothing is left of it.
    #[test]
    fn a_panic_ends_the_work() {
        let directory = tempfile::tempdir().unwrap();
        assert!(catch_unwind(AssertUnwindSafe(|| run(directory.path(), "z"))).is_err());
        assert_eq!(vec!["data.jsonl"], names(directory.path()));

        let report = run(directory.path(), "y").unwrap();
        assert_eq!((1000, false), (report.manifest.num_samples, report.is_reused));
        assert!(report.manifest.shards.len() > 10);
        assert_eq!(vec!["data.jsonl", "out"], names(directory.path()));
    }
}
