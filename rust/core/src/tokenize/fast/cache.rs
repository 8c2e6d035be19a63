//! The pretoken cache: pretokens seen before and their ids.
//!
//! Text repeats itself: 98 pretokens of 100 are in the cache. Those of up to 15 bytes and four ids are in a table that threads
//! share ([`lines`](super::lines)). Longer pretokens (and those with more ids) live in a smaller table of each thread, their
//! bytes and ids in a store that is emptied when it is full.
//!
//! The cache never changes an answer, only the time it takes.

use super::lines::{ELSEWHERE, Lines, fits};
use std::hash::BuildHasher;
use std::sync::Arc;

/// Longest pretoken that is its own key.
const MAX_KEY: usize = 15;
/// Most ids of an entry.
pub const MAX_IDS: usize = 4;
/// The top byte of a key: four bits of length, three that are free, one for pieces.
const LEN_SHIFT: u32 = 56;
const PIECE_SHIFT: u32 = 63;

/// Masks of the first so many bytes of two words.
const FIRST_BYTES: [[u64; 2]; 16] = {
    let mut masks = [[0; 2]; 16];
    let mut len = 1;
    while len < 16 {
        let mask = u128::MAX >> (8 * (16 - len));
        masks[len] = [mask as u64, (mask >> 64) as u64];
        len += 1;
    }
    masks
};

#[derive(Clone, Copy, Default)]
struct LongEntry {
    hash: u64,
    key_start: u32,
    key_len: u32,
    ids_start: u32,
    num_ids: u32,
}

/// Pretokens and their ids.
pub struct Cache {
    pub lines: Arc<Lines>,
    long: Box<[LongEntry]>,
    long_keys: Vec<u8>,
    long_ids: Vec<u32>,
    hasher: foldhash::fast::FixedState,
}

/// A pretoken as a key.
#[derive(Clone, Copy)]
pub struct Key(pub [u64; 2]);

impl Default for Key {
    fn default() -> Self {
        Self::LONG
    }
}

/// What the cache says of a key.
pub enum Found {
    /// The ids, the first so many of them.
    Ids([u32; MAX_IDS], usize),
    /// Ask [`Cache::get_long`].
    Long,
    /// Nothing.
    Nothing,
}

impl Key {
    /// A pretoken that is too long to be a key; a table has no such entry, since a length goes with this bit there.
    const LONG: Self = Self([0, ELSEWHERE]);

    /// The key of `text[start..end]`; a piece and a whole pretoken of the same bytes are two keys.
    #[inline(always)]
    pub fn new(text: &[u8], start: usize, end: usize, is_piece: bool) -> Self {
        let len = end - start;
        if len > MAX_KEY {
            return Self::LONG;
        }
        let bytes = match text.get(start..).and_then(|rest| rest.first_chunk()) {
            Some(bytes) => u128::from_le_bytes(*bytes),
            None => last_bytes(&text[start..end]),
        };
        let [low, high] = FIRST_BYTES[len];
        let top = (len as u64) << LEN_SHIFT | (is_piece as u64) << PIECE_SHIFT;
        Self([bytes as u64 & low, (bytes >> 64) as u64 & high | top])
    }

    pub fn is_long(self) -> bool {
        self.0[1] == Self::LONG.0[1]
    }
}

/// Bytes at the end of a text, behind which there are too few to read them at once.
#[cold]
#[inline(never)]
fn last_bytes(bytes: &[u8]) -> u128 {
    let mut padded = [0; 16];
    padded[..bytes.len()].copy_from_slice(bytes);
    u128::from_le_bytes(padded)
}

/// A pretoken (or piece of one) to be looked up.
#[derive(Clone, Copy, Default)]
pub struct Lookup {
    pub key: Key,
    pub line: usize,
    /// As in a batch: twice the end, and one if it is a piece.
    end: usize,
}

impl Lookup {
    /// Where it ends in the text.
    #[inline(always)]
    pub fn end(&self) -> usize {
        self.end >> 1
    }

    /// Whether it is a piece and that matters.
    pub fn is_piece(&self) -> bool {
        self.end & 1 == 1
    }
}

/// Makes the keys of pretokens that lie one behind the other from `start` on, and fetches their lines. Returns how many they are.
pub fn look_ahead(
    lines: &Lines,
    text: &[u8],
    mut start: usize,
    ends: &[usize],
    pieces_matter: bool,
    lookups: &mut [Lookup],
) -> usize {
    for (end, lookup) in ends.iter().zip(lookups) {
        let end = end & !usize::from(!pieces_matter);
        let key = Key::new(text, start, end >> 1, end & 1 == 1);
        let line = lines.line_of(key);
        lines.prefetch(line);
        *lookup = Lookup { key, line, end };
        start = end >> 1;
    }
    ends.len()
}

impl Cache {
    /// A cache over a table that may be shared.
    pub fn new(lines: Arc<Lines>) -> Self {
        let num_long = (lines.len() / 16).max(64);
        Self {
            lines,
            long: vec![LongEntry::default(); num_long].into(),
            long_keys: Vec::new(),
            long_ids: Vec::new(),
            hasher: foldhash::fast::FixedState::with_seed(0),
        }
    }

    fn clear_long(&mut self) {
        self.long.fill(LongEntry::default());
        self.long_keys.clear();
        self.long_ids.clear();
    }

    /// Remembers the ids of `pretoken`.
    pub fn put(&mut self, key: Key, line: usize, pretoken: &[u8], is_piece: bool, ids: &[u32]) {
        if key.is_long() || !fits(ids) {
            self.put_long(pretoken, is_piece, ids);
        }
        if !key.is_long() {
            self.lines.put(key, line, ids);
        }
    }

    /// The ids of a pretoken that is long or has many.
    pub fn get_long(&self, pretoken: &[u8], is_piece: bool) -> Option<&[u32]> {
        let hash = self.long_hash(pretoken, is_piece);
        let entry = &self.long[hash as usize & (self.long.len() - 1)];
        let key = entry.key_start as usize..(entry.key_start + entry.key_len) as usize;
        let found = entry.num_ids > 0 && entry.hash == hash && self.long_keys[key] == *pretoken;
        found.then(|| &self.long_ids[entry.ids_start as usize..(entry.ids_start + entry.num_ids) as usize])
    }

    /// Pieces have other hashes than whole pretokens of the same bytes, and equal hashes are asked for.
    fn long_hash(&self, pretoken: &[u8], is_piece: bool) -> u64 {
        self.hasher.hash_one(pretoken) ^ (is_piece as u64) << 63
    }

    fn put_long(&mut self, pretoken: &[u8], is_piece: bool, ids: &[u32]) {
        // On average 32 bytes of key an entry and as many of ids: the store is bounded like the table.
        let capacity = self.long.len() * 32;
        if pretoken.len() > capacity / 64 {
            return;
        }
        if self.long_keys.len() + pretoken.len() > capacity || (self.long_ids.len() + ids.len()) * 4 > capacity {
            self.clear_long();
        }
        let hash = self.long_hash(pretoken, is_piece);
        let slot = hash as usize & (self.long.len() - 1);
        self.long[slot] = LongEntry {
            hash,
            key_start: self.long_keys.len() as u32,
            key_len: pretoken.len() as u32,
            ids_start: self.long_ids.len() as u32,
            num_ids: ids.len() as u32,
        };
        self.long_keys.extend_from_slice(pretoken);
        self.long_ids.extend_from_slice(ids);
    }
}
