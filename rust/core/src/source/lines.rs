//! Plain JSON Lines: segments of a file → records, without what stands before them.

use std::ops::Range;

use super::{Chunk, MAX_RECORD_BYTES, RecordSpan, Segment, SourceFile, TOO_LARGE};
use crate::error::{ErrorKind, Position, Result};

impl Chunk {
    /// Makes records of the lines in `bytes`, which follow those that are there. If `is_cut`, the last line goes on where
    /// `bytes` ends.
    pub(super) fn split_lines(&mut self, bytes: Range<usize>, is_cut: bool) {
        let mut line_start = bytes.start;
        while line_start < bytes.end {
            let newline = memchr::memchr(b'\n', &self.bytes[line_start..bytes.end]).map(|length| line_start + length);
            let line_end = newline.unwrap_or(bytes.end);
            let is_cut = is_cut && newline.is_none();
            let is_too_large = is_cut || line_end - line_start > MAX_RECORD_BYTES;
            if is_too_large || self.bytes[line_start..line_end].iter().any(|byte| !byte.is_ascii_whitespace()) {
                self.records.push(RecordSpan {
                    range: line_start..line_end,
                    position: Position { line: self.num_newlines + 1, column: 1 },
                    flaw: is_too_large.then_some((ErrorKind::RecordTooLarge, TOO_LARGE)),
                });
            }
            self.num_newlines += u64::from(newline.is_some() || is_cut);
            line_start = line_end + 1;
        }
    }
}

impl SourceFile {
    /// As many segments from `first` on as a chunk of about `chunk_bytes` holds, at least one.
    pub(super) fn next_segments(&self, first: usize, chunk_bytes: usize) -> Range<usize> {
        let limit = self.survey.segments[first] + chunk_bytes as u64;
        let others = &self.survey.segments[first + 1..];
        first..first + 1 + others.partition_point(|&start| start < limit)
    }

    /// Takes the records of some segments.
    pub(super) fn read_segments(&self, segments: Range<usize>, chunk: &mut Chunk) -> Result<()> {
        let start_of = |segment: usize| self.survey.segments.get(segment).copied().unwrap_or(self.end);
        let start = start_of(segments.start);
        let num_bytes = start_of(segments.end) - start;
        // Only a line that is too large can make a segment so long, and it is the last: the rest of it is not read.
        let kept = num_bytes.min(MAX_CHUNK_BYTES);
        chunk.bytes.resize(kept as usize, 0);
        self.read_exact_at(&self.reopen()?, &mut chunk.bytes, start)?;
        chunk.num_source_bytes = num_bytes;
        chunk.num_newlines = 0;
        for segment in segments {
            let place = |segment: usize| (start_of(segment) - start).min(kept) as usize;
            let mark = if start_of(segment) == 0 { self.start } else { 0 };
            let bytes = place(segment)..place(segment + 1);
            let first_record = chunk.records.len();
            chunk.split_lines(bytes.start + mark..bytes.end, start_of(segment + 1) - start > kept);
            chunk.segments.push(Segment { bytes, records: first_record..chunk.records.len() });
        }
        Ok(())
    }
}

/// The largest record, and what may stand before it in a chunk.
const MAX_CHUNK_BYTES: u64 = MAX_RECORD_BYTES as u64 + (16 << 20);
