//! The pretoken cache of one thread: pretokens seen before and their ids.
//!
//! Text repeats itself: 98 pretokens of 100 are in the cache. A pretoken of up to 15 bytes is the key itself, two 64-bit words;
//! an entry with up to four ids takes 32 bytes, two entries a cache line, and a lookup touches that one line, which the caller
//! fetches ahead. A new entry pushes the older of its line out, so memory is bounded and nothing is ever moved. Longer pretokens
//! (and those with more ids) live in a second, smaller table, their bytes and ids in a store that is emptied when it is full.
//!
//! The cache never changes an answer, only the time it takes.

use memmap2::MmapMut;
use std::hash::BuildHasher;

/// Longest pretoken that is its own key.
const MAX_KEY: usize = 15;
/// Most ids of an entry.
pub const MAX_IDS: usize = 4;
/// In the place of a number of ids: more than fit, look into the second table.
const OVERFLOW: u64 = 7;
/// The top byte of a key: four bits of length, three for the number of ids (none in the key itself), one for pieces.
const KEY_MASK: u64 = 0x8fff_ffff_ffff_ffff;
const LEN_SHIFT: u32 = 56;
const NUM_SHIFT: u32 = 60;
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

/// Two words of key, two of ids.
type Entry = [u64; 4];
type Line = [Entry; 2];

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
    /// `[Line]`
    lines: MmapMut,
    num_lines: usize,
    long: Box<[LongEntry]>,
    long_keys: Vec<u8>,
    long_ids: Vec<u32>,
    hasher: foldhash::fast::FixedState,
}

/// A pretoken as a key; zeros for one that is too long to be a key.
#[derive(Clone, Copy, Default)]
pub struct Key([u64; 2]);

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
    /// The key of `text[start..end]`; a piece and a whole pretoken of the same bytes are two keys.
    #[inline(always)]
    pub fn new(text: &[u8], start: usize, end: usize, is_piece: bool) -> Self {
        let len = end - start;
        if len > MAX_KEY {
            return Self::default();
        }
        let bytes = match text.get(start..start + 16) {
            Some(bytes) => u128::from_le_bytes(bytes.try_into().expect("the slice has 16 bytes")),
            None => {
                let mut padded = [0; 16];
                padded[..len].copy_from_slice(&text[start..end]);
                u128::from_le_bytes(padded)
            }
        };
        let [low, high] = FIRST_BYTES[len];
        let top = (len as u64) << LEN_SHIFT | (is_piece as u64) << PIECE_SHIFT;
        Self([bytes as u64 & low, (bytes >> 64) as u64 & high | top])
    }

    fn is_long(self) -> bool {
        self.0[1] == 0
    }
}

impl Cache {
    /// A cache of about `num_bytes` bytes.
    pub fn new(num_bytes: usize) -> Self {
        let num_lines = (num_bytes / size_of::<Line>()).next_power_of_two().max(64);
        let num_long = (num_lines / 16).max(64);
        let lines = MmapMut::map_anon(num_lines * size_of::<Line>()).expect("memory for the cache");
        // A table that is read at random wants large pages; where there are none it is only slower.
        #[cfg(target_os = "linux")]
        let _ = lines.advise(memmap2::Advice::HugePage);
        Self {
            lines,
            num_lines,
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

    /// The number of the line where `key` would be.
    #[inline(always)]
    pub fn line_of(&self, key: Key) -> usize {
        let product = (key.0[0] ^ 0x9e37_79b9_7f4a_7c15) as u128 * (key.0[1] ^ 0xc2b2_ae3d_27d4_eb4f) as u128;
        (product as u64 ^ (product >> 64) as u64) as usize & (self.num_lines - 1)
    }

    #[inline(always)]
    fn lines(&self) -> &[Line] {
        bytemuck::cast_slice(&self.lines)
    }

    /// Fetches a line into the processor's cache, if the processor can be asked to.
    #[inline(always)]
    pub fn prefetch(&self, line: usize) {
        #[cfg(target_arch = "x86_64")]
        if let Some(line) = self.lines().get(line) {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            // SAFETY: fetching ahead has no effect but on time, and the address is that of a line.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(line).cast()) };
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = line;
    }

    /// Looks for `key` in its line.
    #[inline(always)]
    pub fn get(&self, key: Key, line: usize) -> Found {
        if key.is_long() {
            return Found::Long;
        }
        for entry in &self.lines()[line] {
            if entry[0] == key.0[0] && entry[1] & KEY_MASK == key.0[1] {
                let num = entry[1] >> NUM_SHIFT & 7;
                if num == OVERFLOW {
                    return Found::Long;
                }
                return Found::Ids(bytemuck::cast([entry[2], entry[3]]), num as usize);
            }
        }
        Found::Nothing
    }

    /// Remembers the ids of `pretoken`.
    pub fn put(&mut self, key: Key, line: usize, pretoken: &[u8], is_piece: bool, ids: &[u32]) {
        if key.is_long() || ids.len() > MAX_IDS {
            self.put_long(pretoken, is_piece, ids);
        }
        if key.is_long() {
            return;
        }
        let mut inline = [0u32; MAX_IDS];
        let mut num = OVERFLOW;
        if let Some(inline) = inline.get_mut(..ids.len()) {
            inline.copy_from_slice(ids);
            num = ids.len() as u64;
        }
        let ids: [u64; 2] = bytemuck::cast(inline);
        let lines: &mut [Line] = bytemuck::cast_slice_mut(&mut self.lines);
        let entries = &mut lines[line];
        entries[1] = entries[0];
        entries[0] = [key.0[0], key.0[1] | num << NUM_SHIFT, ids[0], ids[1]];
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
