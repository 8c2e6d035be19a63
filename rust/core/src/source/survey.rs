//! The first look at the input, by all threads at once: the hash of each file, and where its segments begin.
//!
//! BLAKE3 hashes a tree, so blocks are hashed apart and put together at the end. A segment is a run of whole lines of a JSON
//! Lines file whose ends are decided by the lines alone: where lines are added, removed or changed, the segments before and
//! behind are the same as before, and need not be encoded again.

use std::fs::File;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Sender, channel};

use blake3::hazmat::{ChainingValue, HasherExt, Mode, left_subtree_len, merge_subtrees_non_root, merge_subtrees_root};

use super::SourceFile;
use crate::error::Result;

/// A power of two, so that each block is a subtree.
const BLOCK_BYTES: u64 = 1 << 20;
/// How many bytes at the end of a line decide whether a segment ends with it. Many lines end alike.
const TAIL_BYTES: u64 = 512;
/// One line of so many ends a segment.
const LINES_PER_SEGMENT: u64 = 64;
/// A segment that would become longer ends at the first line of the next block.
const MAX_SEGMENT_BYTES: u64 = 2 << 20;

/// What the look at a file found out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Survey {
    /// BLAKE3 of the file, in hexadecimal.
    pub blake3: String,
    /// Where each segment begins, in bytes; none where the file is not plain JSON Lines, or empty.
    pub segments: Vec<u64>,
}

/// What was found in one block.
#[derive(Clone, Default)]
struct Block {
    /// The chaining value; of the only block of a file, the hash.
    value: ChainingValue,
    /// Where the first line begins that begins in the block, if one does.
    first_line: Option<u64>,
    /// Where lines begin that follow an end of a segment.
    cuts: Vec<u64>,
}

/// Looks at all files. One thread does something else `first`, and then helps the others; where there is but one, it is another.
/// `on_bytes` is told how many bytes were read since it was told last; an error from it ends the work.
pub(super) fn survey(
    files: &[SourceFile],
    num_threads: usize,
    first: impl FnOnce() + Send,
    mut on_bytes: impl FnMut(u64) -> Result<()>,
) -> Result<Vec<Survey>> {
    let num_blocks = |file: &SourceFile| file.stamp.num_bytes.div_ceil(BLOCK_BYTES);
    // The first block of each file, counted through all files.
    let mut num_all = 0;
    let start_of = |file| {
        num_all += num_blocks(file);
        num_all - num_blocks(file)
    };
    let starts: Vec<u64> = files.iter().map(start_of).collect();
    let mut blocks = vec![Block::default(); num_all as usize];
    let next = AtomicU64::new(0);
    std::thread::scope(|scope| {
        let (sender, receiver) = channel();
        let (starts, next) = (&starts, &next);
        let look = move |sender: Sender<_>| {
            let mut buffer = Vec::new();
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if number >= num_all {
                    return;
                }
                // Of files that start at the same block all but the last are empty.
                let file = starts.partition_point(|&start| start <= number) - 1;
                let block = files[file].survey_block(number - starts[file], &mut buffer);
                if sender.send(block.map(|(block, num_bytes)| (number, block, num_bytes))).is_err() {
                    return; // something is wrong elsewhere
                }
            }
        };
        for _ in 1..num_threads.max(2) {
            let sender = sender.clone();
            scope.spawn(move || look(sender));
        }
        scope.spawn(move || {
            first();
            if num_threads > 1 {
                look(sender);
            }
        });
        receiver.into_iter().try_for_each(|found| {
            let (number, block, num_bytes) = found?;
            blocks[number as usize] = block;
            on_bytes(num_bytes)
        })
    })?;
    let surveys = files.iter().zip(starts).map(|(file, start)| {
        let blocks = &blocks[start as usize..(start + num_blocks(file)) as usize];
        let values: Vec<_> = blocks.iter().map(|block| block.value).collect();
        Survey {
            blake3: hash(&values, file.stamp.num_bytes).to_hex().to_string(),
            segments: if file.is_lines() { segments(blocks, file.stamp.num_bytes) } else { Vec::new() },
        }
    });
    Ok(surveys.collect())
}

impl SourceFile {
    /// What is in a block, and how many bytes it has.
    fn survey_block(&self, number: u64, buffer: &mut Vec<u8>) -> Result<(Block, u64)> {
        let file_bytes = self.stamp.num_bytes;
        let Range { start, end } = number * BLOCK_BYTES..file_bytes.min((number + 1) * BLOCK_BYTES);
        // The end of the line that the block before left open belongs to the question whether it ends a segment.
        let from = start.saturating_sub(TAIL_BYTES);
        buffer.resize((end - from) as usize, 0);
        let file: File = self.reopen()?;
        self.read_exact_at(&file, buffer, from)?;
        let own = &buffer[(start - from) as usize..];
        let value = match file_bytes <= BLOCK_BYTES {
            // The root is hashed otherwise than a block below it.
            true => *blake3::hash(own).as_bytes(),
            false => blake3::Hasher::new().set_input_offset(start).update(own).finalize_non_root(),
        };
        let mut block = Block { value, ..Block::default() };
        if self.is_lines() {
            let mut line_start = 0;
            for newline in memchr::memchr_iter(b'\n', buffer) {
                let begins_at = from + newline as u64 + 1;
                if begins_at > start && begins_at < file_bytes {
                    block.first_line.get_or_insert(begins_at);
                    if ends_segment(&buffer[line_start..newline]) {
                        block.cuts.push(begins_at);
                    }
                }
                line_start = newline + 1;
            }
        }
        Ok((block, end - start))
    }
}

/// Whether a segment ends with a line, told by a few words near the end of the line.
fn ends_segment(line: &[u8]) -> bool {
    let mut hash = 0u64;
    let mut distance = 8;
    while distance <= TAIL_BYTES as usize && distance <= line.len() {
        let word = &line[line.len() - distance..][..8];
        hash ^= u64::from_le_bytes(word.try_into().expect("the slice has 8 bytes"));
        hash = hash.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
        distance *= 2;
    }
    hash % LINES_PER_SEGMENT == 1
}

/// Where the segments begin.
fn segments(blocks: &[Block], file_bytes: u64) -> Vec<u64> {
    let mut starts = Vec::new();
    if file_bytes > 0 {
        starts.push(0);
    }
    for (block, block_end) in blocks.iter().zip((1..).map(|number| number * BLOCK_BYTES)) {
        let last = starts.last().copied().unwrap_or(0);
        let is_long = block.cuts.first().copied().unwrap_or(block_end) - last > MAX_SEGMENT_BYTES;
        starts.extend(block.first_line.filter(|first| is_long && block.cuts.first() != Some(first)));
        starts.extend(&block.cuts);
    }
    starts
}

/// The hash of a file of `num_bytes` bytes.
fn hash(blocks: &[ChainingValue], num_bytes: u64) -> blake3::Hash {
    match blocks {
        [] => blake3::hash(b""),
        [block] => blake3::Hash::from_bytes(*block),
        _ => {
            let (left, right) = halves(blocks, num_bytes);
            merge_subtrees_root(&left, &right, Mode::Hash)
        }
    }
}

/// The chaining values of the two subtrees below a node.
fn halves(blocks: &[ChainingValue], num_bytes: u64) -> (ChainingValue, ChainingValue) {
    let left_bytes = left_subtree_len(num_bytes);
    let (left, right) = blocks.split_at((left_bytes / BLOCK_BYTES) as usize);
    (subtree(left, left_bytes), subtree(right, num_bytes - left_bytes))
}

fn subtree(blocks: &[ChainingValue], num_bytes: u64) -> ChainingValue {
    if let [block] = blocks {
        return *block;
    }
    let (left, right) = halves(blocks, num_bytes);
    merge_subtrees_non_root(&left, &right, Mode::Hash)
}

#[cfg(test)]
mod tests {
    use super::super::Source;
    use super::*;

    fn survey_of(contents: &[Vec<u8>], num_threads: usize) -> Vec<Survey> {
        let directory = tempfile::tempdir().unwrap();
        let paths: Vec<_> = (0..contents.len()).map(|number| directory.path().join(number.to_string())).collect();
        paths.iter().zip(contents).for_each(|(path, content)| std::fs::write(path, content).unwrap());
        let mut num_bytes = 0;
        let count = |bytes, total| {
            num_bytes += bytes;
            assert!(num_bytes <= total);
            Ok(())
        };
        let mut num_first = 0;
        let source = Source::open(&paths, 16, num_threads, || num_first += 1, count).unwrap();
        assert_eq!((1, source.num_bytes()), (num_first, num_bytes));
        (0..source.num_files()).map(|file| source.survey(file).clone()).collect()
    }

    // The hash is that of the whole file, however many blocks and threads there are.
    #[test]
    fn blocks_give_the_hash_of_the_whole() {
        let block = BLOCK_BYTES as usize;
        let sizes = [0, 1, block - 1, block, block + 1, 0, 2 * block, 3 * block + 5, 4 * block + 1, 7 * block, 0];
        let content = |(number, size)| (0..size).map(|at: usize| (at * 31 % 251 + number) as u8).collect();
        let contents: Vec<Vec<u8>> = sizes.into_iter().enumerate().map(content).collect();
        let expected: Vec<_> = contents.iter().map(|content| blake3::hash(content).to_hex().to_string()).collect();
        for num_threads in [1, 3] {
            let found: Vec<_> = survey_of(&contents, num_threads).into_iter().map(|survey| survey.blake3).collect();
            assert_eq!(expected, found);
        }
    }

    fn line(number: usize) -> String {
        let word = (number as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_string();
        format!("{{\"text\": \"{}\"}}\n", word.repeat(number * 7919 % 40))
    }

    fn texts<'a>(content: &'a [u8], survey: &Survey) -> Vec<&'a [u8]> {
        let ends = survey.segments[1..].iter().copied().chain([content.len() as u64]);
        survey.segments.iter().zip(ends).map(|(&start, end)| &content[start as usize..end as usize]).collect()
    }

    // Segments are whole lines and tile the file; a line that is put in, taken out or changed changes only the segments
    // around it.
    #[test]
    fn a_change_stays_in_its_segments() {
        let lines: Vec<String> = (0..6000).map(line).collect();
        let whole = lines.concat().into_bytes();
        for at in [0, 1, 2999, 5999, 6000] {
            let (before, behind) = lines.split_at(at);
            let inserted = [before.concat(), line(9999), behind.concat()].concat().into_bytes();
            let [old, new] = &survey_of(&[whole.clone(), inserted.clone()], 2)[..] else { unreachable!() };
            let (old, new) = (texts(&whole, old), texts(&inserted, new));
            assert!(old.len() > 40 && old.iter().all(|text| text.ends_with(b"\n")), "{}", old.len());
            assert_eq!((whole.clone(), inserted.clone()), (old.concat(), new.concat()));
            assert!(new.iter().filter(|text| !old.contains(text)).count() <= 2, "at line {at}");
        }
    }

    // Where no line ends a segment, it ends at its longest, unless a single line is longer.
    #[test]
    fn segments_are_bounded() {
        let same = b"{\"a\": 1}\n".repeat(BLOCK_BYTES as usize);
        let long = [vec![b' '; 5 * BLOCK_BYTES as usize], b"\n".to_vec(), same.clone()].concat();
        let [same_survey, long_survey] = &survey_of(&[same.clone(), long.clone()], 2)[..] else { unreachable!() };
        let limit = (MAX_SEGMENT_BYTES + BLOCK_BYTES) as usize;
        assert!(!ends_segment(b"{\"a\": 1}") && texts(&same, same_survey).iter().all(|text| text.len() <= limit));
        let texts = texts(&long, long_survey);
        assert_eq!(5 * BLOCK_BYTES as usize + 1, texts[0].len());
        assert!(texts[1..].iter().all(|text| text.len() <= limit && text.ends_with(b"}\n")));
    }
}
