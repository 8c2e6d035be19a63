//! BLAKE3 of the input files, by all threads at once: a hash tree is hashed block by block and put together at the end.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::channel;

use blake3::hazmat::{ChainingValue, HasherExt, Mode, left_subtree_len, merge_subtrees_non_root, merge_subtrees_root};

use super::Source;
use crate::error::Result;

/// A power of two, so that each block is a subtree.
const BLOCK_BYTES: u64 = 1 << 20;

impl Source {
    /// BLAKE3 hash of the bytes of each file, in hexadecimal. `on_bytes` is told how many bytes were hashed since it was
    /// asked last; an error from it ends the work.
    ///
    /// # Errors
    /// A file that can't be read or has changed.
    pub fn hash(&self, num_threads: usize, mut on_bytes: impl FnMut(u64) -> Result<()>) -> Result<Vec<String>> {
        let num_blocks = |file: u32| self.file(file).1.div_ceil(BLOCK_BYTES);
        // The first block of each file, counted through all files.
        let starts: Vec<u64> = (0..self.num_files())
            .scan(0, |next, file| {
                *next += num_blocks(file);
                Some(*next - num_blocks(file))
            })
            .collect();
        let num_all = starts.last().map_or(0, |last| last + num_blocks(self.num_files() - 1));
        let mut blocks = vec![[0; 32]; num_all as usize];
        let next = AtomicU64::new(0);
        std::thread::scope(|scope| {
            let (sender, receiver) = channel();
            for _ in 0..num_threads {
                let (sender, starts, next) = (sender.clone(), &starts, &next);
                scope.spawn(move || {
                    let mut buffer = Vec::new();
                    loop {
                        let block = next.fetch_add(1, Ordering::Relaxed);
                        if block >= num_all {
                            return;
                        }
                        // Of files that start at the same block all but the last are empty.
                        let file = starts.partition_point(|&start| start <= block) - 1;
                        let hashed = self.hash_block(file as u32, block - starts[file], &mut buffer);
                        if sender.send(hashed.map(|value| (block, value, buffer.len() as u64))).is_err() {
                            return; // something is wrong elsewhere
                        }
                    }
                });
            }
            drop(sender);
            receiver.into_iter().try_for_each(|hashed| {
                let (block, value, num_bytes) = hashed?;
                blocks[block as usize] = value;
                on_bytes(num_bytes)
            })
        })?;
        let hash = |file: u32| {
            let (start, num_bytes) = (starts[file as usize] as usize, self.file(file).1);
            match num_blocks(file) {
                0 => blake3::hash(b""),
                // The root is hashed otherwise than a block below it.
                1 => blake3::Hash::from_bytes(blocks[start]),
                _ => root(&blocks[start..start + num_blocks(file) as usize], num_bytes),
            }
        };
        Ok((0..self.num_files()).map(|file| hash(file).to_hex().to_string()).collect())
    }

    /// The chaining value of a block; of the only block of a file, the hash.
    fn hash_block(&self, file: u32, block: u64, buffer: &mut Vec<u8>) -> Result<ChainingValue> {
        let file = &self.files[file as usize];
        let num_bytes = file.stamp.num_bytes;
        let Range { start, end } = block * BLOCK_BYTES..num_bytes.min((block + 1) * BLOCK_BYTES);
        buffer.resize((end - start) as usize, 0);
        file.read_exact_at(&file.reopen()?, buffer, start)?;
        Ok(match num_bytes <= BLOCK_BYTES {
            true => *blake3::hash(buffer).as_bytes(),
            false => blake3::Hasher::new().set_input_offset(start).update(buffer).finalize_non_root(),
        })
    }
}

/// The hash of `num_bytes` bytes in two or more blocks.
fn root(blocks: &[ChainingValue], num_bytes: u64) -> blake3::Hash {
    let left_bytes = left_subtree_len(num_bytes);
    let (left, right) = blocks.split_at((left_bytes / BLOCK_BYTES) as usize);
    merge_subtrees_root(&subtree(left, left_bytes), &subtree(right, num_bytes - left_bytes), Mode::Hash)
}

fn subtree(blocks: &[ChainingValue], num_bytes: u64) -> ChainingValue {
    if let [block] = blocks {
        return *block;
    }
    let left_bytes = left_subtree_len(num_bytes);
    let (left, right) = blocks.split_at((left_bytes / BLOCK_BYTES) as usize);
    merge_subtrees_non_root(&subtree(left, left_bytes), &subtree(right, num_bytes - left_bytes), Mode::Hash)
}

#[cfg(test)]
mod tests {
    use super::*;

    // The hash is that of the whole file, however many blocks and threads there are.
    #[test]
    fn blocks_give_the_hash_of_the_whole() {
        let block = BLOCK_BYTES as usize;
        let sizes = [0, 1, block - 1, block, block + 1, 0, 2 * block, 3 * block + 5, 4 * block + 1, 7 * block, 0];
        let directory = tempfile::tempdir().unwrap();
        let (mut paths, mut expected) = (Vec::new(), Vec::new());
        for (number, size) in sizes.into_iter().enumerate() {
            let content: Vec<u8> = (0..size).map(|at| (at * 31 % 251 + number) as u8).collect();
            paths.push(directory.path().join(number.to_string()));
            std::fs::write(&paths[number], &content).unwrap();
            expected.push(blake3::hash(&content).to_hex().to_string());
        }
        let source = Source::open(&paths, 16).unwrap();
        for num_threads in [1, 3] {
            let mut num_bytes = 0;
            let count = |bytes| {
                num_bytes += bytes;
                Ok(())
            };
            assert_eq!(expected, source.hash(num_threads, count).unwrap());
            assert_eq!(source.num_bytes(), num_bytes);
        }
    }
}
