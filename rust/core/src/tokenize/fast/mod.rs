//! The fast engine: byte-level BPE as `tokenizers` does it, exactly, for the tokenizers that it understands in every part.
//!
//! A text goes through the same steps as in `tokenizers`:
//!
//! 1. added tokens are found in the text as given ([`added`]);
//! 2. what lies between is normalised to NFC, if the tokenizer says so ([`normalize`]), and searched for the added tokens that
//!    match normalised text;
//! 3. what still lies between is cut into pretokens ([`pretokenize`], [`stages`], with the classes of [`classes`]);
//! 4. each pretoken becomes ids: from the [`cache`], else by merging its bytes ([`bpe`]).
//!
//! [`load`] reads a tokenizer.json and refuses one that has anything else in it.

pub(super) mod added;
mod bpe;
mod cache;
mod classes;
mod cuts;
#[cfg(test)]
mod families;
mod lines;
mod load;
mod normalize;
mod pretokenize;
mod stages;
#[cfg(test)]
mod tests;
mod vocab;
mod windows;

pub use load::NotUnderstood;

use super::control::ControlTokens;
use added::Piece;
use cache::{Cache, Found, Lookup, look_ahead};
use lines::{FoundIds, Lines};
use pretokenize::Batch;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

/// The instruction set that the engine works with on this machine: `avx512`, `avx2`, `neon` or `plain`.
pub fn instruction_set() -> &'static str {
    windows::Level::detect().name()
}

/// About how much memory the cache of short pretokens takes, and how much where little text is expected: large pages have to
/// be cleared at first touch, which for a small file would take longer than all else.
const CACHE_BYTES: usize = 32 << 20;
const MIN_CACHE_BYTES: u64 = 1 << 20;

/// A byte-level BPE tokenizer.
pub struct FastTokenizer {
    parts: load::Parts,
    /// Which tokenizer a scratch belongs to.
    number: u64,
    /// What its threads have in common, once one works.
    lines: Mutex<Option<Arc<Lines>>>,
}

/// What a thread keeps between texts: its part of the pretoken cache, and working memory.
pub struct Scratch {
    cache_bytes: usize,
    /// The tokenizer whose ids the cache holds.
    owner: u64,
    cache: Option<Cache>,
    work: Work,
}

/// Working memory, kept from text to text.
struct Work {
    cursor: pretokenize::Cursor,
    batch: Batch,
    lookups: Box<[Lookup]>,
    /// What comes out of the cache.
    found: FoundIds,
    merging: bpe::Workspace,
}

/// Where a byte of the text came to lie among the tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark {
    /// Number of the token, counted in `ids`, that holds the byte; the number of tokens for the end of the text.
    pub token: usize,
    /// Whether the token begins before the byte.
    pub inside: bool,
}

impl Mark {
    /// As the end of a range of bytes: the number of the first token that has no byte of the range.
    pub fn as_end(self) -> usize {
        self.token + self.inside as usize
    }
}

impl Default for Scratch {
    fn default() -> Self {
        Self::with_cache_bytes(CACHE_BYTES)
    }
}

impl Scratch {
    /// A scratch with a cache of its own that takes about this many bytes, once it is used.
    pub fn with_cache_bytes(cache_bytes: usize) -> Self {
        Self {
            cache_bytes,
            owner: 0,
            cache: None,
            work: Work {
                cursor: pretokenize::Cursor::default(),
                batch: Batch::default(),
                lookups: vec![Lookup::default(); Batch::CAPACITY].into(),
                found: [0; _],
                merging: bpe::Workspace::default(),
            },
        }
    }
}

impl FastTokenizer {
    /// Reads a tokenizer.json.
    ///
    /// # Errors
    /// Names the part that this engine does not understand.
    pub fn from_json(json: &[u8]) -> Result<Self, NotUnderstood> {
        static NEXT_NUMBER: AtomicU64 = AtomicU64::new(1);
        Ok(Self {
            parts: load::load(json)?,
            number: NEXT_NUMBER.fetch_add(1, Ordering::Relaxed),
            lines: Mutex::default(),
        })
    }

    /// One more than the largest id.
    pub fn vocab_size(&self) -> u32 {
        let named = self.parts.named.values().map(|id| id + 1).max().unwrap_or(0);
        named.max(self.parts.lengths.len() as u32)
    }

    /// The id of a token by its text as tokenizer.json writes it, added tokens included.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        let named = self.parts.named.get(token).copied();
        named.or_else(|| {
            let mut bytes = Vec::new();
            load::Alphabet::new().decode(token, &mut bytes)?;
            self.parts.vocab.get(&bytes)
        })
    }

    /// What puts tokens around a text, as tokenizer.json has it.
    pub fn post_processor(&self) -> &serde_json::Value {
        &self.parts.post_processor
    }

    /// The tokens that text of a record must not become.
    pub fn control_tokens(&self) -> &ControlTokens {
        &self.parts.control
    }

    /// A scratch that shares what its thread learns with the others that were made here.
    pub fn scratch(&self) -> Scratch {
        let mut lines = self.lines.lock().expect("no thread panics while it holds the cache");
        let lines = lines.get_or_insert_with(|| Arc::new(Lines::new(CACHE_BYTES)));
        Scratch { owner: self.number, cache: Some(Cache::new(lines.clone())), ..Scratch::default() }
    }

    /// Sizes the cache that scratches share for so many bytes of text; it never becomes smaller.
    pub fn expect_bytes(&self, num_bytes: u64) {
        let wanted = (num_bytes / 4).clamp(MIN_CACHE_BYTES, CACHE_BYTES as u64) as usize;
        let mut lines = self.lines.lock().expect("no thread panics while it holds the cache");
        if lines.as_ref().is_none_or(|lines| lines.num_bytes() < wanted) {
            *lines = Some(Arc::new(Lines::new(wanted)));
        }
    }

    /// Appends the ids of `text` to `ids`.
    pub fn encode(&self, text: &str, scratch: &mut Scratch, ids: &mut Vec<u32>) {
        self.encode_marks(text, &[], &[], scratch, ids, &mut Vec::new());
    }

    /// Into how many pretokens a text without added tokens is cut; for measuring.
    #[doc(hidden)]
    pub fn num_pretokens(&self, text: &str, scratch: &mut Scratch) -> usize {
        let Work { cursor, batch, .. } = &mut scratch.work;
        cursor.reset();
        let mut num = 0;
        loop {
            self.parts.pretokenizer.fill(text.as_bytes(), cursor, batch);
            match batch.ends().len() {
                0 => return num,
                more => num += more,
            }
        }
    }

    /// Appends the ids of `text` to `ids`, and to `marks` one mark for each of `places` (bytes, ascending, at most the length
    /// of the text, not within characters). No added token is recognised that has a byte in one of the `plain` ranges (bytes,
    /// ascending, disjoint).
    pub fn encode_marks(
        &self,
        text: &str,
        places: &[usize],
        plain: &[Range<usize>],
        scratch: &mut Scratch,
        ids: &mut Vec<u32>,
        marks: &mut Vec<Mark>,
    ) {
        let Scratch { cache_bytes, owner, cache, work } = scratch;
        if *owner != self.number {
            *owner = self.number;
            *cache = None;
        }
        let cache = cache.get_or_insert_with(|| Cache::new(Arc::new(Lines::new(*cache_bytes))));
        let mut run = Run { parts: &self.parts, cache, work, ids, marker: Marker { places, marks } };
        run.text(text, plain);
        let end = run.ids.len();
        run.marker.at_end(end);
    }
}

/// The places whose tokens are still to be found.
struct Marker<'a> {
    places: &'a [usize],
    marks: &'a mut Vec<Mark>,
}

impl Marker<'_> {
    /// The next place, in the whole text.
    fn next(&self) -> usize {
        self.places.first().copied().unwrap_or(usize::MAX)
    }

    fn put(&mut self, token: usize, inside: bool) {
        self.marks.push(Mark { token, inside });
        self.places = &self.places[1..];
    }

    fn at_end(&mut self, token: usize) {
        while !self.places.is_empty() {
            self.put(token, false);
        }
    }
}

/// The encoding of one text.
struct Run<'a> {
    parts: &'a load::Parts,
    cache: &'a mut Cache,
    work: &'a mut Work,
    ids: &'a mut Vec<u32>,
    marker: Marker<'a>,
}

impl Run<'_> {
    fn text(&mut self, text: &str, plain: &[Range<usize>]) {
        let parts = self.parts;
        parts.raw_added.split(text, plain, |piece| match piece {
            Piece::Token { id, range } => self.added(id, range),
            Piece::Text(range) => self.between(&text[range.clone()], range.start, plain),
        });
    }

    /// A token that covers `range` of the text.
    fn added(&mut self, id: u32, range: Range<usize>) {
        while self.marker.next() < range.end {
            let inside = self.marker.next() > range.start;
            self.marker.put(self.ids.len(), inside);
        }
        self.ids.push(id);
    }

    /// Text between added tokens, before normalisation; `base` is where it starts.
    fn between(&mut self, text: &str, base: usize, plain: &[Range<usize>]) {
        let Some(normalized) = self.parts.nfc.as_ref().and_then(|nfc| nfc.normalize(text)) else {
            return self.normalized(text, base, &within(plain, base..base + text.len(), |at| at - base));
        };
        // NFC changed something: the normalised text is encoded as a text of its own, with the places led there.
        let here = self.marker.places.partition_point(|place| *place < base + text.len());
        let (places, later) = self.marker.places.split_at(here);
        let places: Vec<usize> = places.iter().map(|place| normalized.place(place - base)).collect();
        let marker = Marker { places: &places, marks: self.marker.marks };
        let mut inner = Run { parts: self.parts, cache: self.cache, work: self.work, ids: self.ids, marker };
        let plain = within(plain, base..base + text.len(), |at| normalized.place(at - base));
        inner.normalized(&normalized.text, 0, &plain);
        let end = inner.ids.len();
        inner.marker.at_end(end);
        self.marker.places = later;
    }

    /// Text between added tokens, normalised.
    fn normalized(&mut self, text: &str, base: usize, plain: &[Range<usize>]) {
        self.parts.normalized_added.split(text, plain, |piece| match piece {
            Piece::Token { id, range } => self.added(id, base + range.start..base + range.end),
            Piece::Text(range) => self.pretokens(text[range.clone()].as_bytes(), base + range.start),
        });
    }

    /// Text without added tokens, as it is; `base` is where it starts.
    fn pretokens(&mut self, text: &[u8], base: usize) {
        self.work.cursor.reset();
        let mut batch_start = 0;
        loop {
            self.parts.pretokenizer.fill(text, &mut self.work.cursor, &mut self.work.batch);
            let batch_end = self.batch(text, base, batch_start);
            if batch_end == batch_start {
                break;
            }
            batch_start = batch_end;
        }
    }

    /// The pretokens of the batch, which starts at `batch_start`; returns where it ends.
    fn batch(&mut self, text: &[u8], base: usize, batch_start: usize) -> usize {
        // Two rounds, so that the lines of the cache are on their way while keys are still being made.
        let Work { batch, lookups, .. } = &mut *self.work;
        let num = look_ahead(&self.cache.lines, text, batch_start, batch.ends(), self.parts.ignore_merges, lookups);
        let mut start = batch_start;
        let mut done = 0;
        while done < num {
            let Work { lookups, found, .. } = &mut *self.work;
            // The ids of a pretoken with a mark in it have to be told from the others.
            let limit = self.marker.next().saturating_sub(base);
            let (num_found, num_ids) = self.cache.lines.get_all(&lookups[done..num], limit, found);
            self.ids.extend_from_slice(&found[..num_ids]);
            done += num_found;
            if num_found > 0 {
                start = lookups[done - 1].end();
            }
            if done < num {
                let lookup = lookups[done];
                let first = self.ids.len();
                self.pretoken(&lookup, &text[start..lookup.end()]);
                if self.marker.next() < base + lookup.end() {
                    self.mark(first..self.ids.len(), text, base, start, lookup.end());
                }
                start = lookup.end();
                done += 1;
            }
        }
        start
    }

    /// A pretoken (or piece of one), wherever its ids may be.
    #[cold]
    fn pretoken(&mut self, lookup: &Lookup, pretoken: &[u8]) {
        let Lookup { key, line, .. } = *lookup;
        let is_piece = lookup.is_piece();
        let found = self.cache.lines.get(key, line);
        if let Found::Ids(ids, num_ids) = found {
            return self.ids.extend_from_slice(&ids[..num_ids]);
        }
        if let Found::Long = found
            && let Some(ids) = self.cache.get_long(pretoken, is_piece)
        {
            return self.ids.extend_from_slice(ids);
        }
        let first = self.ids.len();
        let whole = if self.parts.ignore_merges && !is_piece { self.parts.vocab.get(pretoken) } else { None };
        match whole {
            Some(id) => self.ids.push(id),
            None => self.parts.merges.encode(pretoken, &mut self.work.merging, self.ids),
        }
        self.cache.put(key, line, pretoken, is_piece, &self.ids[first..]);
    }

    /// Settles the marks in the pretoken `text[start..end]`, which has the tokens of the numbers `tokens`.
    fn mark(&mut self, tokens: Range<usize>, text: &[u8], base: usize, start: usize, end: usize) {
        let (mut token, mut token_start) = (tokens.start, start);
        while self.marker.next() < base + end {
            let place = self.marker.next() - base;
            while token < tokens.end {
                let token_end = self.parts.end_of(self.ids[token], text, token_start);
                if place < token_end {
                    break;
                }
                (token, token_start) = (token + 1, token_end);
            }
            self.marker.put(token, place > token_start && token < tokens.end);
        }
    }
}

impl load::Parts {
    /// Where a token of the model that starts at `start` ends. Bytes that have no token belong to the token after them.
    fn end_of(&self, id: u32, text: &[u8], start: usize) -> usize {
        let len = self.lengths[id as usize] as usize;
        if !self.merges.leaves_out() {
            return start + len;
        }
        let kept = text[start..].iter().enumerate().filter(|(_, byte)| self.merges.keeps(**byte));
        kept.take(len).last().map_or(start, |(i, _)| start + i + 1)
    }
}

/// The parts of `plain` that lie in `range`, led to other places.
fn within(plain: &[Range<usize>], range: Range<usize>, place: impl Fn(usize) -> usize) -> Vec<Range<usize>> {
    let overlapping = plain.iter().filter(|plain| plain.start < range.end && range.start < plain.end);
    overlapping.map(|plain| place(plain.start.max(range.start))..place(plain.end.min(range.end))).collect()
}
