//! A vocabulary: byte strings to ids, in one block of memory.

use std::hash::BuildHasher;

/// Byte strings and their ids, by open addressing.
pub struct Vocab {
    bytes: Vec<u8>,
    /// End of the string in `bytes`, and id, by order of insertion.
    entries: Vec<(u32, u32)>,
    /// Number of the entry plus one; 0 is empty.
    slots: Vec<u32>,
    hasher: foldhash::fast::FixedState,
}

impl Vocab {
    /// Room for `num` strings.
    pub fn with_capacity(num: usize) -> Self {
        let slots = vec![0; (num * 2).next_power_of_two().max(2)];
        Self {
            bytes: Vec::new(),
            entries: Vec::with_capacity(num),
            slots,
            hasher: foldhash::fast::FixedState::with_seed(0),
        }
    }

    /// The slot of `key`, or the empty one where it would go.
    fn slot(&self, key: &[u8]) -> usize {
        let mask = self.slots.len() - 1;
        let mut slot = self.hasher.hash_one(key) as usize & mask;
        while let Some(entry) = (self.slots[slot] as usize).checked_sub(1) {
            let start = entry.checked_sub(1).map_or(0, |before| self.entries[before].0 as usize);
            if self.bytes[start..self.entries[entry].0 as usize] == *key {
                break;
            }
            slot = (slot + 1) & mask;
        }
        slot
    }

    /// Adds a string; false if it is there already. No more strings than `with_capacity` was told.
    pub fn insert(&mut self, key: &[u8], id: u32) -> bool {
        let slot = self.slot(key);
        if self.slots[slot] != 0 {
            return false;
        }
        self.bytes.extend_from_slice(key);
        self.entries.push((self.bytes.len() as u32, id));
        self.slots[slot] = self.entries.len() as u32;
        true
    }

    /// All strings.
    pub fn keys(&self) -> impl Iterator<Item = &[u8]> {
        let mut start = 0;
        self.entries.iter().map(move |(end, _)| {
            let key = &self.bytes[start..*end as usize];
            start = *end as usize;
            key
        })
    }

    pub fn get(&self, key: &[u8]) -> Option<u32> {
        let entry = (self.slots[self.slot(key)] as usize).checked_sub(1)?;
        Some(self.entries[entry].1)
    }
}
