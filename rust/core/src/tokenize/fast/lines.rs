//! The table of the pretoken cache: shared by all threads that encode with a tokenizer, without a lock.
//!
//! What one thread has merged, no other has to. A pretoken of up to 15 bytes is the key itself, two 64-bit words; an entry with
//! up to four ids takes 32 bytes, two entries a cache line, and a lookup touches that one line, which the caller fetches ahead.
//! A new entry pushes the older of its line out, so memory is bounded and nothing is ever moved elsewhere.
//!
//! Each entry is a sequence lock (Boehm, "Can seqlocks get along with programming language memory models?", 2012): the third
//! word counts its versions, odd while it is written. A reader that finds another version afterwards than before has found
//! nothing, and a writer that finds another at work leaves the entry to it; nobody ever waits.

use super::cache::{Found, Key, MAX_IDS};
use memmap2::MmapMut;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicU64, fence};

/// In the place of a number of ids: more than fit, look into the second table.
const OVERFLOW: u64 = 7;
/// In the top byte of a key: four bits of length, three for the number of ids (none in the key itself), one for pieces.
const KEY_MASK: u64 = 0x8fff_ffff_ffff_ffff;
const NUM_SHIFT: u32 = 60;
/// Ids take 21 bits; two of them and the version of the entry fill a word.
const ID_BITS: u32 = 21;
const VERSION_BITS: u32 = 22;
const VERSION_MASK: u64 = (1 << VERSION_BITS) - 1;

/// Two words of key, two of ids; the version is in the low bits of the third.
#[derive(Default)]
struct Entry([AtomicU64; 4]);

type Line = [Entry; 2];

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
        if let Some(line) = self.lines().get(line) {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            // SAFETY: fetching ahead has no effect but on time, and the address is that of a line.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(line).cast()) };
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = line;
    }

    /// Looks for a key that is not long in its line.
    #[inline(always)]
    pub fn get(&self, key: Key, line: usize) -> Found {
        for Entry([low, high, first_ids, last_ids]) in &self.lines()[line] {
            let before = first_ids.load(Acquire);
            let found = high.load(Relaxed);
            if low.load(Relaxed) != key.0[0] || found & KEY_MASK != key.0[1] {
                continue;
            }
            let ids = [before, last_ids.load(Relaxed)];
            fence(Acquire);
            if before & 1 != 0 || first_ids.load(Relaxed) != before {
                return Found::Nothing;
            }
            return match found >> NUM_SHIFT & 7 {
                OVERFLOW => Found::Long,
                num => Found::Ids(unpacked(ids), num as usize),
            };
        }
        Found::Nothing
    }

    /// Remembers the ids of a key that is not long; or, if they are too many or too large, that they are elsewhere.
    pub fn put(&self, key: Key, line: usize, ids: &[u32]) {
        let [newer, older] = &self.lines()[line];
        let Some(older_version) = older.lock() else { return };
        let Some(newer_version) = newer.lock() else {
            older.unlock(older_version);
            return;
        };
        older.write(newer.words(), older_version);
        let (packed, num) = if fits(ids) { (packed(ids), ids.len() as u64) } else { ([0; 2], OVERFLOW) };
        newer.write([key.0[0], key.0[1] | num << NUM_SHIFT, packed[0], packed[1]], newer_version);
    }
}

/// Whether an entry holds these ids itself.
pub fn fits(ids: &[u32]) -> bool {
    ids.len() <= MAX_IDS && ids.iter().all(|id| id >> ID_BITS == 0)
}

fn packed(ids: &[u32]) -> [u64; 2] {
    let id = |index: usize| u64::from(ids.get(index).copied().unwrap_or(0));
    [0, 2].map(|index| (id(index) << ID_BITS | id(index + 1)) << VERSION_BITS)
}

#[inline(always)]
fn unpacked(words: [u64; 2]) -> [u32; MAX_IDS] {
    let second = |word: u64| (word >> VERSION_BITS) as u32 & ((1 << ID_BITS) - 1);
    let first = |word: u64| (word >> (VERSION_BITS + ID_BITS)) as u32;
    [first(words[0]), second(words[0]), first(words[1]), second(words[1])]
}

impl Entry {
    /// Makes the version odd, unless it is; gives back the word that held it.
    fn lock(&self) -> Option<u64> {
        let before = self.0[2].load(Relaxed);
        let is_locked = before & 1 == 0 && self.0[2].compare_exchange(before, before | 1, Acquire, Relaxed).is_ok();
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
        let version = (before + 2) & VERSION_MASK;
        self.0[0].store(words[0], Relaxed);
        self.0[1].store(words[1], Relaxed);
        self.0[3].store(words[3], Relaxed);
        self.0[2].store(words[2] & !VERSION_MASK | version, Release);
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
