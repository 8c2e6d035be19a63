//! The table of the pretoken cache: shared by all threads that encode with a tokenizer, without a lock.
//!
//! What one thread has merged, no other has to. A pretoken of up to 15 bytes is the key itself, two 64-bit words; an entry with
//! up to four ids takes 32 bytes, two entries a cache line, and a lookup touches that one line, which the caller fetches ahead.
//! A new entry pushes the older of its line out, so memory is bounded and nothing is ever moved elsewhere.
//!
//! Each entry is a sequence lock (Boehm, "Can seqlocks get along with programming language memory models?", 2012): the third
//! word counts its versions, odd while it is written. A reader that finds another version afterwards than before has found
//! nothing, and a writer that finds another at work leaves the entry to it; nobody ever waits.

use super::cache::{Found, Key, Lookup, MAX_IDS};
use super::pretokenize::Batch;
use memmap2::MmapMut;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicU64, fence};

/// In the top byte of a key: four bits of length, two for the number of ids less one (none in the key itself), one that says
/// that the ids do not fit and are elsewhere, and one for pieces.
const NUM_SHIFT: u32 = 60;
pub const ELSEWHERE: u64 = 1 << 62;
const KEY_MASK: u64 = !(3 << NUM_SHIFT);
/// Ids take 21 bits of 32. The version of the entry is in the upper bits of the first two.
const ID_BITS: u32 = 21;
const ID_MASK: u64 = ((1 << ID_BITS) - 1) * 0x1_0000_0001;
const VERSION_BITS: u32 = 32 - ID_BITS;
/// The lowest bit of the version: the entry is being written.
const LOCKED: u64 = 1 << ID_BITS;

/// Two words of key, two of ids; the version is in the third.
#[derive(Default)]
struct Entry([AtomicU64; 4]);

type Line = [Entry; 2];

/// Most pretokens that are looked up at once have this many ids.
pub const MAX_FOUND: usize = Batch::CAPACITY * MAX_IDS;
/// Room for the ids of pretokens that are looked up at once, and for as many more as are stored, wanted or not.
pub type FoundIds = [u32; MAX_FOUND + MAX_IDS];

/// Pretokens and their ids.
pub struct Lines {
    memory: MmapMut,
    num_lines: usize,
}

impl Lines {
    /// A table of about `num_bytes` bytes.
    pub fn new(num_bytes: usize) -> Self {
        let num_lines = (num_bytes / size_of::<Line>()).next_power_of_two().max(64);
        let memory = MmapMut::map_anon(num_lines * size_of::<Line>()).expect("memory for the cache");
        // A table that is read at random wants large pages; where there are none it is only slower.
        #[cfg(target_os = "linux")]
        let _ = memory.advise(memmap2::Advice::HugePage);
        Self { memory, num_lines }
    }

    /// How much memory it takes.
    pub fn num_bytes(&self) -> usize {
        self.num_lines * size_of::<Line>()
    }

    /// How many lines there are, a power of two.
    pub fn len(&self) -> usize {
        self.num_lines
    }

    #[inline(always)]
    fn lines(&self) -> &[Line] {
        // SAFETY: the mapping is as long as `num_lines` lines, begins at a page, and is all zeros at first, which any bits of an
        // atomic integer may be; it lives as long as `self`, and nothing but these atomics ever reads or writes it.
        unsafe { std::slice::from_raw_parts(self.memory.as_ptr().cast(), self.num_lines) }
    }

    /// The number of the line where `key` would be.
    #[inline(always)]
    pub fn line_of(&self, key: Key) -> usize {
        let product = (key.0[0] ^ 0x9e37_79b9_7f4a_7c15) as u128 * (key.0[1] ^ 0xc2b2_ae3d_27d4_eb4f) as u128;
        (product as u64 ^ (product >> 64) as u64) as usize & (self.num_lines - 1)
    }

    /// Fetches a line into the processor's cache, if the processor can be asked to.
    #[inline(always)]
    pub fn prefetch(&self, line: usize) {
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            // SAFETY: fetching ahead has no effect but on time, whatever the address.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(self.lines().as_ptr().wrapping_add(line).cast()) };
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = line;
    }

    /// Looks for a key in its line.
    pub fn get(&self, key: Key, line: usize) -> Found {
        let line = &self.lines()[line];
        match entry_of(line, key) {
            Some((ids, num)) => Found::Ids(ids, num),
            None if key.is_long() || entry_of(line, Key([key.0[0], key.0[1] | ELSEWHERE])).is_some() => Found::Long,
            None => Found::Nothing,
        }
    }

    /// Looks pretokens up, one after the other, up to the first that is not here or reaches beyond `limit`, and writes their
    /// ids to `ids`. Returns how many pretokens and how many ids they are.
    #[inline(never)]
    pub fn get_all(&self, lookups: &[Lookup], limit: usize, ids: &mut FoundIds) -> (usize, usize) {
        let lines = self.lines();
        let mut num_ids = 0;
        for (num, lookup) in lookups.iter().enumerate() {
            let found = entry_of(&lines[lookup.line & (lines.len() - 1)], lookup.key);
            let Some((found, num_found)) = found.filter(|_| lookup.end() <= limit) else { return (num, num_ids) };
            // The remainder is what the compiler needs to know that there is room.
            let to = num_ids % MAX_FOUND;
            ids[to..to + MAX_IDS].copy_from_slice(&found);
            num_ids += num_found;
        }
        (lookups.len(), num_ids)
    }

    /// Remembers the ids of a key that is not long; or, if they are too many or too large, that they are elsewhere.
    pub fn put(&self, key: Key, line: usize, ids: &[u32]) {
        let [newer, older] = &self.lines()[line];
        let Some(older_word) = older.lock() else { return };
        let Some(newer_word) = newer.lock() else {
            older.unlock(older_word);
            return;
        };
        older.write(newer.words(), older_word);
        let (packed, top) = match fits(ids) {
            true => (packed(ids), (ids.len() as u64 - 1) << NUM_SHIFT),
            false => ([0; 2], ELSEWHERE),
        };
        newer.write([key.0[0], key.0[1] | top, packed[0], packed[1]], newer_word);
    }
}

/// The ids of `key` in `line`, the first so many of them.
#[inline(always)]
fn entry_of(line: &Line, key: Key) -> Option<([u32; MAX_IDS], usize)> {
    // Which of the two it can be is found out without a branch, since nothing could foretell it.
    let [low, high, ..] = &line[1].0;
    let is_older = low.load(Relaxed) ^ key.0[0] | high.load(Relaxed) & KEY_MASK ^ key.0[1] == 0;
    let Entry([low, high, first_ids, last_ids]) = &line[usize::from(is_older)];
    let before = first_ids.load(Acquire);
    let top = high.load(Relaxed);
    let differs = low.load(Relaxed) ^ key.0[0] | top & KEY_MASK ^ key.0[1];
    let ids = [before, last_ids.load(Relaxed)];
    fence(Acquire);
    let changed = first_ids.load(Relaxed) ^ before | before & LOCKED;
    (differs | changed == 0).then_some((unpacked(ids), (top >> NUM_SHIFT & 3) as usize + 1))
}

/// Whether an entry holds these ids itself.
pub fn fits(ids: &[u32]) -> bool {
    (1..=MAX_IDS).contains(&ids.len()) && ids.iter().all(|id| id >> ID_BITS == 0)
}

fn packed(ids: &[u32]) -> [u64; 2] {
    let id = |index: usize| u64::from(ids.get(index).copied().unwrap_or(0));
    [0, 2].map(|index| id(index) | id(index + 1) << 32)
}

#[inline(always)]
fn unpacked(words: [u64; 2]) -> [u32; MAX_IDS] {
    let [first, last] = words.map(|word| word & ID_MASK);
    [first as u32, (first >> 32) as u32, last as u32, (last >> 32) as u32]
}

/// The version after that of an entry whose third word was `before`, where it stands in that word.
fn next_version(before: u64) -> u64 {
    const MASK: u64 = (1 << VERSION_BITS) - 1;
    let version = before >> ID_BITS & MASK | before >> (32 + ID_BITS) << VERSION_BITS;
    let next = version + 2;
    (next & MASK) << ID_BITS | (next >> VERSION_BITS & MASK) << (32 + ID_BITS)
}

impl Entry {
    /// Makes the version odd, unless it is; gives back the word that held it.
    fn lock(&self) -> Option<u64> {
        let before = self.0[2].load(Relaxed);
        let is_free = before & LOCKED == 0;
        let is_locked = is_free && self.0[2].compare_exchange(before, before | LOCKED, Acquire, Relaxed).is_ok();
        // Whoever sees what is written from here on also sees that the version is odd.
        fence(Release);
        is_locked.then_some(before)
    }

    /// Ends a lock under which nothing was written.
    fn unlock(&self, before: u64) {
        self.0[2].store(before, Release);
    }

    /// Writes an entry that is locked, and unlocks it.
    fn write(&self, words: [u64; 4], before: u64) {
        self.0[0].store(words[0], Relaxed);
        self.0[1].store(words[1], Relaxed);
        self.0[3].store(words[3], Relaxed);
        self.0[2].store(words[2] & ID_MASK | next_version(before), Release);
    }

    fn words(&self) -> [u64; 4] {
        [0, 1, 2, 3].map(|word| self.0[word].load(Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(number: u32) -> Key {
        let mut text = [0; 16];
        text[..4].copy_from_slice(&number.to_le_bytes());
        Key::new(&text, 0, 4, false)
    }

    fn ids_of(number: u32) -> Vec<u32> {
        (0..1 + number % 4).map(|i| number.wrapping_mul(31).wrapping_add(i) & ((1 << ID_BITS) - 1)).collect()
    }

    fn look(lines: &Lines, number: u32) -> Option<Vec<u32>> {
        match lines.get(key(number), lines.line_of(key(number))) {
            Found::Ids(ids, num) => Some(ids[..num].to_vec()),
            _ => None,
        }
    }

    // What was put last is found as it was put; the older entry of a line goes first.
    #[test]
    fn what_was_put_is_found() {
        let lines = Lines::new(0);
        for number in 0..1000 {
            lines.put(key(number), lines.line_of(key(number)), &ids_of(number));
            assert_eq!(Some(ids_of(number)), look(&lines, number));
        }
        assert!((0..1000).filter_map(|number| look(&lines, number)).count() <= 2 * lines.len());
        let too_large = [1 << ID_BITS];
        lines.put(key(7), lines.line_of(key(7)), &too_large);
        assert!(matches!(lines.get(key(7), lines.line_of(key(7))), Found::Long));
        lines.put(key(8), lines.line_of(key(8)), &[1; MAX_IDS + 1]);
        assert!(matches!(lines.get(key(8), lines.line_of(key(8))), Found::Long));
    }

    // Every version comes before it comes again, none of them locked, and none touches the ids.
    #[test]
    fn versions_come_round() {
        let ids = packed(&[(1 << ID_BITS) - 1; 2])[0];
        let mut word = ids;
        let num_versions = 1 << (2 * VERSION_BITS - 1);
        for number in 1..=num_versions {
            word = ids | next_version(word);
            assert_eq!(ids, word & ID_MASK);
            assert_eq!(0, word & LOCKED);
            assert_eq!(number == num_versions, word == ids, "{number}");
        }
    }

    // Threads that write the same few lines at once never find the ids of another key.
    #[test]
    fn threads_never_find_the_ids_of_another_key() {
        let lines = Lines::new(0);
        let num_found: usize = std::thread::scope(|scope| {
            let worker = |seed: u32| {
                let lines = &lines;
                move || {
                    let mut random = seed;
                    let mut num_found = 0;
                    for _ in 0..300_000 {
                        random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                        let number = random >> 24;
                        match look(lines, number) {
                            Some(ids) => {
                                assert_eq!(ids_of(number), ids);
                                num_found += 1;
                            }
                            None => lines.put(key(number), lines.line_of(key(number)), &ids_of(number)),
                        }
                    }
                    num_found
                }
            };
            let threads: Vec<_> = (0..4).map(|seed| scope.spawn(worker(seed))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).sum()
        });
        assert!(num_found > 0);
    }
}
