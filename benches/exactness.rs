//! Proof of the fast engine: encodes text with it and with the `tokenizers` crate, and stops at the first difference.
//!
//! `cargo bench -p sft-fast-core --bench exactness -- --tokenizers DIR... --text FILE.jsonl... [--megabytes N] [--seed N]
//! [--threads N]` reads N megabytes of text (default 10) with each tokenizer; a `DIR` holds a `tokenizer.json`, or such
//! directories. Half of the text are whole conversations as the model's own chat template renders them (`chatml` where
//! there is none), with the spans that are trained on; the other half are pieces of what the conversations say, cut at
//! random places, with random spans, and added tokens of the tokenizer strewn in. Compared are all ids and which tokens
//! lie in the spans. Each tokenizer starts somewhere else in the files.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use sft_fast_core::conversation::{Conversation, FieldMapping};
use sft_fast_core::json;
use sft_fast_core::model::Model;
use sft_fast_core::template::Rendered;
use sft_fast_core::tokenize::reference::ReferenceTokenizer;
use sft_fast_core::tokenize::{Encode, Input, Tokenizer, Tokens};

const USAGE: &str = "nothing to compare: give --tokenizers DIR... --text FILE.jsonl... [--megabytes N] [--seed N]";

struct Arguments {
    tokenizers: Vec<PathBuf>,
    files: Vec<PathBuf>,
    megabytes: f64,
    seed: u64,
    num_threads: usize,
}

/// `None` if there is nothing to compare.
fn arguments() -> Option<Arguments> {
    let num_threads = std::thread::available_parallelism().map_or(1, |number| number.get());
    let mut all = Arguments { tokenizers: Vec::new(), files: Vec::new(), megabytes: 10.0, seed: 1, num_threads };
    let mut option = String::new();
    for argument in std::env::args().skip(1).filter(|argument| argument != "--bench") {
        match &*option {
            _ if argument.starts_with("--") => option = argument,
            "--tokenizers" => all.tokenizers.extend(tokenizers_in(Path::new(&argument))),
            "--text" => all.files.push(argument.into()),
            "--megabytes" => all.megabytes = argument.parse().ok()?,
            "--seed" => all.seed = argument.parse().ok()?,
            "--threads" => all.num_threads = argument.parse().ok()?,
            _ => return None,
        }
    }
    (!all.tokenizers.is_empty() && !all.files.is_empty()).then_some(all)
}

fn tokenizers_in(directory: &Path) -> Vec<PathBuf> {
    if directory.join("tokenizer.json").is_file() {
        return vec![directory.to_owned()];
    }
    let entries = directory.read_dir().unwrap_or_else(|error| panic!("{}: {error}", directory.display()));
    let mut found: Vec<PathBuf> = entries.map(|entry| entry.expect("an entry").path()).collect();
    found.retain(|path| path.join("tokenizer.json").is_file());
    found.sort();
    found
}

/// A generator of numbers (SplitMix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound.max(1) as u64) as usize
    }

    /// A length, short ones as often as long ones: 1 to 4,095.
    fn length(&mut self) -> usize {
        let bits = 1 + self.below(12);
        1 + self.below((1 << bits) - 1)
    }
}

/// The first place from `at` on where `text` can be cut.
fn boundary(text: &str, at: usize) -> usize {
    (at..text.len()).find(|&at| text.is_char_boundary(at)).unwrap_or(text.len())
}

#[derive(Default)]
struct Counts {
    num_texts: u64,
    num_bytes: u64,
    num_tokens: u64,
    num_label_tokens: u64,
}

/// The first difference.
struct Difference(String);

/// The two engines beside each other.
struct Pair<'a> {
    name: String,
    fast: Box<dyn Encode + 'a>,
    reference: Box<dyn Encode + 'a>,
    found: Tokens,
    expected: Tokens,
    counts: Counts,
}

impl Pair<'_> {
    fn compare(&mut self, text: &str, spans: &[Range<usize>], place: &str) -> Result<(), Difference> {
        let input = Input { text, spans, ..Input::default() };
        let encoded =
            self.fast.encode(input, &mut self.found).and_then(|()| self.reference.encode(input, &mut self.expected));
        if let Err(error) = encoded {
            return Err(Difference(format!("{}, {place}: {error}\ntext: {text:?}", self.name)));
        }
        let Self { found, expected, counts, .. } = self;
        if found == expected {
            counts.num_texts += 1;
            counts.num_bytes += text.len() as u64;
            counts.num_tokens += found.ids.len() as u64;
            counts.num_label_tokens += found.runs.iter().map(|run| u64::from(run.end - run.start)).sum::<u64>();
            return Ok(());
        }
        let same = found.ids.iter().zip(&expected.ids).take_while(|(found, expected)| found == expected).count();
        let window = |ids: &[u32]| format!("{:?}", &ids[same.min(ids.len())..ids.len().min(same + 12)]);
        Err(Difference(format!(
            "{}, {place}: the first {same} of {} ids are the same, then tokenizers has {}, the fast engine {}\n\
             label runs by tokenizers {:?}, by the fast engine {:?}, of the spans {spans:?}\ntext: {text:?}",
            self.name,
            expected.ids.len(),
            window(&expected.ids),
            window(&found.ids),
            expected.runs,
            found.runs,
        )))
    }
}

/// All that is known of one record: its conversation rendered, and what it says.
fn texts_of(line: &str, model: &Model, rendered: &mut Rendered) -> Option<String> {
    let value = json::parse(line).expect("a line of the text is JSON");
    let mapping = FieldMapping { query_key: Some("input".into()), ..FieldMapping::default() };
    let conversation = Conversation::from_record(value, &mapping).ok()?;
    let said: Vec<_> = conversation
        .messages
        .iter()
        .filter_map(|message| message.get("content")?.as_str().map(str::to_owned))
        .collect();
    model.template.render(&conversation, rendered).ok()?;
    Some(said.join("\n"))
}

fn added_tokens(directory: &Path) -> Vec<String> {
    let json = std::fs::read(directory.join("tokenizer.json")).expect("it was read before");
    let tokenizer: serde_json::Value = serde_json::from_slice(&json).expect("it was read before");
    let tokens = tokenizer["added_tokens"].as_array().cloned().unwrap_or_default();
    tokens.iter().filter_map(|token| token["content"].as_str().map(str::to_owned)).collect()
}

/// With the model's own chat template, or `chatml` where it has none that all answers can be found in.
fn load(directory: &Path) -> sft_fast_core::Result<Model> {
    let with = |template| Model::load(directory, template, Some("2026-01-31"));
    with("native").ok().filter(|model| model.template.verdict().prefix_preserving).map_or_else(|| with("chatml"), Ok)
}

/// Compares one tokenizer on `arguments.megabytes` of text; `number` tells it from the others.
fn prove(arguments: &Arguments, files: &[String], directory: &Path, number: usize) -> Result<String, Difference> {
    let start = Instant::now();
    let name = directory.display().to_string();
    let model = load(directory).map_err(|error| Difference(format!("{name}: {error}")))?;
    if let Some(reason) = model.tokenizer.why_not_fast() {
        return Ok(format!("{name}: not for the fast engine: {reason}"));
    }
    let path = directory.join("tokenizer.json");
    let bytes = std::fs::read(&path).expect("it was read before");
    let reference = ReferenceTokenizer::from_json(&bytes, &path, String::new())
        .map_err(|error| Difference(format!("{name}: {error}")))?;
    let (fast, reference) = (model.tokenizer.encoder(), reference.encoder());
    let (found, expected) = (Tokens::default(), Tokens::default());
    let mut pair = Pair { name, fast, reference, found, expected, counts: Counts::default() };

    let mut random = Random(arguments.seed ^ (number as u64) << 32);
    let added = added_tokens(directory);
    let max_bytes = (arguments.megabytes * 1e6) as u64;
    let (mut rendered, mut piece, mut num_left_out) = (Rendered::default(), String::new(), 0);
    for (file, path) in files.iter().zip(&arguments.files) {
        let budget = pair.counts.num_bytes + max_bytes / files.len() as u64;
        let mut from = random.below(file.len());
        from = file.as_bytes()[from..].iter().position(|&byte| byte == b'\n').map_or(0, |newline| from + newline + 1);
        for (index, line) in file[from..].lines().chain(file[..from].lines()).enumerate() {
            if pair.counts.num_bytes >= budget {
                break;
            }
            let Some(said) = texts_of(line, &model, &mut rendered) else {
                num_left_out += 1;
                continue;
            };
            let place = format!("{}, record {index} from byte {from}", path.display());
            if index % 2 == 0 {
                pair.compare(&rendered.text, &rendered.spans, &place)?;
                continue;
            }
            let mut rest = &*said;
            while !rest.is_empty() {
                let (now, later) = rest.split_at(boundary(rest, random.length()));
                rest = later;
                piece.clear();
                piece.push_str(now);
                if !added.is_empty() && random.below(16) == 0 {
                    let at = boundary(&piece, random.below(piece.len() + 1));
                    piece.insert_str(at, &added[random.below(added.len())]);
                }
                let mut cuts = [(); 4].map(|()| boundary(&piece, random.below(piece.len() + 1)));
                cuts.sort_unstable();
                pair.compare(&piece, &[cuts[0]..cuts[1], cuts[2]..cuts[3]], &place)?;
            }
        }
    }
    let Counts { num_texts, num_bytes, num_tokens, num_label_tokens } = pair.counts;
    if num_texts == 0 {
        return Err(Difference(format!("{}: not one record could be rendered", pair.name)));
    }
    Ok(format!(
        "{}: the same {num_tokens} ids and {num_label_tokens} label tokens in {num_texts} texts of {num_bytes} bytes; \
         {num_left_out} records not rendered; {:.0} s",
        pair.name,
        start.elapsed().as_secs_f64(),
    ))
}

fn main() -> ExitCode {
    let Some(arguments) = arguments() else {
        println!("{USAGE}");
        return ExitCode::SUCCESS; // as part of `cargo bench`
    };
    let read =
        |path: &PathBuf| std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let files: Vec<String> = arguments.files.iter().map(read).collect();
    let (next, output) = (AtomicUsize::new(0), Mutex::new(()));
    std::thread::scope(|scope| {
        for _ in 0..arguments.num_threads {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    let Some(directory) = arguments.tokenizers.get(number) else { break };
                    let result = prove(&arguments, &files, directory, number);
                    let _output = output.lock();
                    match result {
                        Ok(line) => println!("{line}"),
                        Err(Difference(text)) => {
                            println!("DIFFERENT: {text}");
                            std::process::exit(1);
                        }
                    }
                }
            });
        }
    });
    ExitCode::SUCCESS
}
