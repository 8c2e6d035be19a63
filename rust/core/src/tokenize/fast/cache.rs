//! The pretoken cache of one thread: pretokens seen before and their ids.
//!
//! Text repeats itself: 98 pretokens of 100 are in the cache. A pretoken of up to 15 bytes is the key itself, two 64-bit words;
//! an entry with up to four ids takes 32 bytes, two entries a cache line, and a lookup touches that one line. A new entry pushes
//! the older of its line out, so memory is bounded and nothing is ever moved. Longer pretokens (and those with more ids) live in
//! a second, smaller table with their bytes and ids in a shared store, which is emptied when it is full.
//!
//! The cache never changes an answer, only the time it takes.

use std::hash::BuildHasher;

/// Longest pretoken that is its own key.
const MAX_KEY: usize = 15;
const MAX_INLINE_IDS: usize = 4;
/// In the place of a number of ids: more than fit, look into the second table.
const OVERFLOW: u64 = 15;
/// Low bits of the top byte of a key hold the length, high bits the number of ids.
const KEY_MASK: u64 = 0x0fff_ffff_ffff_ffff;

#[derive(Clone, Copy, Default)]
struct Entry {
    key: [u64; 2],
    ids: [u32; MAX_INLINE_IDS],
}

#[derive(Clone, Copy, Default)]
#[repr(align(64))]
struct Line([Entry; 2]);

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
    lines: Box<[Line]>,
    long: Box<[LongEntry]>,
    long_keys: Vec<u8>,
    long_ids: Vec<u32>,
    hasher: foldhash::fast::FixedState,
}

/// A pretoken as a key.
#[derive(Clone, Copy)]
pub struct Key([u64; 2]);

impl Key {
    /// The key of `text[start..end]`, or `None` if that is longer than a key can hold.
    #[inline]
    pub fn new(text: &[u8], start: usize, end: usize) -> Option<Self> {
        let len = end - start;
        if len > MAX_KEY {
            return None;
        }
        let bytes = match text.get(start..start + 16) {
            Some(bytes) => u128::from_le_bytes(bytes.try_into().expect("the slice has 16 bytes")),
            None => {
                let mut padded = [0; 16];
                padded[..len].copy_from_slice(&text[start..end]);
                u128::from_le_bytes(padded)
            }
        };
        let kept = bytes & (u128::MAX >> (8 * (16 - len)));
        Some(Self([kept as u64, (kept >> 64) as u64 | (len as u64) << 56]))
    }

    #[inline]
    fn hash(self) -> u64 {
        let product = (self.0[0] ^ 0x9e37_79b9_7f4a_7c15) as u128 * (self.0[1] ^ 0xc2b2_ae3d_27d4_eb4f) as u128;
        product as u64 ^ (product >> 64) as u64
    }
}

impl Cache {
    /// A cache of about `num_bytes` bytes.
    pub fn new(num_bytes: usize) -> Self {
        let num_lines = (num_bytes / 64).next_power_of_two().max(64);
        let num_long = (num_lines / 16).max(64);
        Self {
            lines: vec![Line::default(); num_lines].into(),
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

    fn line(&self, key: Key) -> usize {
        key.hash() as usize & (self.lines.len() - 1)
    }

    /// Appends the ids of `pretoken`, if they are known, to `out`.
    #[inline]
    pub fn get(&self, key: Option<Key>, pretoken: &[u8], out: &mut Vec<u32>) -> bool {
        let Some(key) = key else { return self.get_long(pretoken, out) };
        let line = &self.lines[self.line(key)];
        for entry in &line.0 {
            if entry.key[0] == key.0[0] && entry.key[1] & KEY_MASK == key.0[1] {
                let num = entry.key[1] >> 60;
                if num == OVERFLOW {
                    return self.get_long(pretoken, out);
                }
                out.extend_from_slice(&entry.ids[..num as usize]);
                return true;
            }
        }
        false
    }

    /// Remembers the ids of `pretoken`.
    pub fn put(&mut self, key: Option<Key>, pretoken: &[u8], ids: &[u32]) {
        if key.is_none() || ids.len() > MAX_INLINE_IDS {
            self.put_long(pretoken, ids);
        }
        let Some(key) = key else { return };
        let mut entry = Entry { key: key.0, ids: [0; MAX_INLINE_IDS] };
        if ids.len() <= MAX_INLINE_IDS {
            entry.ids[..ids.len()].copy_from_slice(ids);
            entry.key[1] |= (ids.len() as u64) << 60;
        } else {
            entry.key[1] |= OVERFLOW << 60;
        }
        let line = self.line(key);
        let entries = &mut self.lines[line].0;
        entries[1] = entries[0];
        entries[0] = entry;
    }

    fn get_long(&self, pretoken: &[u8], out: &mut Vec<u32>) -> bool {
        let hash = self.hasher.hash_one(pretoken);
        let entry = &self.long[hash as usize & (self.long.len() - 1)];
        let key = entry.key_start as usize..(entry.key_start + entry.key_len) as usize;
        let found = entry.num_ids > 0 && entry.hash == hash && self.long_keys[key] == *pretoken;
        if found {
            out.extend_from_slice(&self.long_ids[entry.ids_start as usize..(entry.ids_start + entry.num_ids) as usize]);
        }
        found
    }

    fn put_long(&mut self, pretoken: &[u8], ids: &[u32]) {
        // On average 32 bytes of key an entry and as many of ids: the store is bounded like the table.
        let capacity = self.long.len() * 32;
        if pretoken.len() > capacity / 64 {
            return;
        }
        if self.long_keys.len() + pretoken.len() > capacity || (self.long_ids.len() + ids.len()) * 4 > capacity {
            self.clear_long();
        }
        let hash = self.hasher.hash_one(pretoken);
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
