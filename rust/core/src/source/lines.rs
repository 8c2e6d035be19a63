//! Plain JSON Lines: any byte range of a file can be turned into the records that begin in it, without the ranges before.

use std::fs::File;

use super::{Chunk, MAX_RECORD_BYTES, RecordSpan, SourceFile, TOO_LARGE};
use crate::error::{ErrorKind, Position, Result};

impl Chunk {
    /// Makes records of the lines that begin in `bytes[start..end]`; the last of them may reach beyond `end`. If `is_cut`,
    /// the last line goes on where `bytes` ends, for too long.
    pub(super) fn split_lines(&mut self, start: usize, end: usize, is_cut: bool) {
        self.num_newlines = 0;
        let mut line_start = start;
        while line_start < end {
            let newline = memchr::memchr(b'\n', &self.bytes[line_start..]).map(|length| line_start + length);
            let line_end = newline.unwrap_or(self.bytes.len());
            let is_cut = is_cut && newline.is_none();
            if is_cut || self.bytes[line_start..line_end].iter().any(|byte| !byte.is_ascii_whitespace()) {
                self.records.push(RecordSpan {
                    range: line_start..line_end,
                    position: Position { line: self.num_newlines + 1, column: 1 },
                    flaw: is_cut.then_some((ErrorKind::RecordTooLarge, TOO_LARGE)),
                });
            }
            self.num_newlines += u64::from(newline.is_some() || is_cut);
            line_start = line_end + 1;
        }
    }
}

impl SourceFile {
    /// Takes the lines that begin in bytes `start..end` of the file; the last of them may reach beyond `end`.
    pub(super) fn read_lines(&self, start: u64, end: u64, chunk: &mut Chunk) -> Result<()> {
        let file = self.reopen()?;
        let end = end.min(self.stamp.num_bytes);
        // One byte more in front tells whether a line begins at `start`.
        let from = if start == 0 { (self.start as u64).min(end) } else { start - 1 };
        let bytes = &mut chunk.bytes;
        bytes.resize((end - from) as usize, 0);
        self.read_exact_at(&file, bytes, from)?;
        chunk.num_source_bytes = end - start;

        let line_start = match start {
            0 => 0,
            _ => match memchr::memchr(b'\n', bytes) {
                Some(newline) => newline + 1,
                None => bytes.len(),
            },
        };
        let num_own_bytes = bytes.len();
        let mut too_large = false;
        if line_start < num_own_bytes && bytes.last() != Some(&b'\n') {
            too_large = !self.read_rest_of_line(&file, from, bytes)?;
        }
        chunk.split_lines(line_start, num_own_bytes, too_large);
        Ok(())
    }

    /// Appends the bytes up to the next newline or the end of the file; false if that would pass [`MAX_RECORD_BYTES`].
    fn read_rest_of_line(&self, file: &File, from: u64, bytes: &mut Vec<u8>) -> Result<bool> {
        let mut step = 1 << 16;
        loop {
            let at = from + bytes.len() as u64;
            if at == self.stamp.num_bytes {
                return Ok(true);
            }
            if bytes.len() > MAX_RECORD_BYTES {
                return Ok(false);
            }
            let old = bytes.len();
            bytes.resize(old + (self.stamp.num_bytes - at).min(step) as usize, 0);
            self.read_exact_at(file, &mut bytes[old..], at)?;
            if let Some(newline) = memchr::memchr(b'\n', &bytes[old..]) {
                bytes.truncate(old + newline + 1);
                return Ok(true);
            }
            step *= 2;
        }
    }
}
