//! JSON arrays and compressed files: one pass over the content, cut into records without reading them. For arrays it only
//! follows strings and brackets.

use std::fs::File;
use std::io::{BufReader, Read, Result};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::{Chunk, Compression, MAX_RECORD_BYTES, RecordSpan, TOO_LARGE};
use crate::error::{ErrorKind, Position};

/// The decompressed content of a file.
pub struct Reader {
    content: Box<dyn Read + Send>,
    num_source_bytes: Arc<AtomicU64>,
}

impl Reader {
    /// Reads `file` from where it is.
    pub fn new(file: File, compression: Compression) -> Result<Self> {
        let num_source_bytes = Arc::new(AtomicU64::new(0));
        let file = Counted { file, count: num_source_bytes.clone() };
        let content: Box<dyn Read + Send> = match compression {
            Compression::None => Box::new(file),
            Compression::Gzip => {
                Box::new(flate2::bufread::MultiGzDecoder::new(BufReader::with_capacity(1 << 16, file)))
            }
            Compression::Zstd => Box::new(zstd::Decoder::new(file)?),
        };
        Ok(Self { content, num_source_bytes })
    }
}

impl Read for Reader {
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize> {
        self.content.read(buffer)
    }
}

impl std::fmt::Debug for Reader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reader").field("num_source_bytes", &self.num_source_bytes).finish_non_exhaustive()
    }
}

/// Counts the bytes that are read from the file itself, which is what progress is measured by.
struct Counted {
    file: File,
    count: Arc<AtomicU64>,
}

impl Read for Counted {
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize> {
        let count = self.file.read(buffer)?;
        self.count.fetch_add(count as u64, Ordering::Relaxed);
        Ok(count)
    }
}

/// Where the scan of a file is.
#[derive(Debug)]
pub struct Scan {
    reader: Reader,
    /// Bytes read and not handed out yet.
    carry: Vec<u8>,
    is_array: bool,
    is_file_read: bool,
    is_done: bool,
    is_first: bool,
    /// Bytes of the byte order mark.
    start: usize,
    /// Column of the next byte to hand out.
    column: u64,
    num_source_bytes: u64,
}

impl Scan {
    /// A scan from the start of `reader`, whose first `start` bytes are a byte order mark.
    pub fn new(reader: Reader, start: usize, is_array: bool) -> Self {
        Self {
            reader,
            carry: Vec::new(),
            is_array,
            is_file_read: false,
            is_done: false,
            is_first: true,
            start,
            column: 1,
            num_source_bytes: 0,
        }
    }

    fn read(&mut self, num_bytes: usize) -> Result<()> {
        let old = self.carry.len();
        self.carry.resize(old + num_bytes, 0);
        let mut filled = old;
        while filled < self.carry.len() {
            match self.reader.read(&mut self.carry[filled..]) {
                Ok(0) => {
                    self.is_file_read = true;
                    break;
                }
                Ok(count) => filled += count,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.carry.truncate(filled);
        Ok(())
    }

    /// The byte at `at`, read from the file if need be.
    fn byte(&mut self, at: usize, chunk_bytes: usize) -> Result<Option<u8>> {
        while at >= self.carry.len() && !self.is_file_read {
            self.read(chunk_bytes)?;
        }
        Ok(self.carry.get(at).copied())
    }

    fn skip_space(&mut self, start: usize, chunk_bytes: usize) -> Result<usize> {
        let mut at = start;
        while matches!(self.byte(at, chunk_bytes)?, Some(b' ' | b'\n' | b'\r' | b'\t')) {
            at += 1;
            if at - start > MAX_RECORD_BYTES {
                return Err(too_large());
            }
        }
        Ok(at)
    }

    /// The end of the element at `start`: the `,` or `]` behind it, or the end of the file.
    fn element_end(&mut self, start: usize, chunk_bytes: usize) -> Result<usize> {
        let (mut at, mut depth) = (start, 0usize);
        loop {
            match self.byte(at, chunk_bytes)? {
                None => return Ok(at),
                Some(b',' | b']') if depth == 0 => return Ok(at),
                Some(b'[' | b'{') => depth += 1,
                Some(b']' | b'}') => depth = depth.saturating_sub(1),
                Some(b'"') => {
                    at += 1;
                    loop {
                        match memchr::memchr2(b'"', b'\\', self.carry.get(at..).unwrap_or_default()) {
                            Some(length) if self.carry[at + length] == b'"' => {
                                at += length;
                                break;
                            }
                            Some(length) => at += length + 2,
                            None => {
                                at = at.max(self.carry.len());
                                if self.byte(at, chunk_bytes)?.is_none() {
                                    return Ok(self.carry.len());
                                }
                            }
                        }
                        if at - start > MAX_RECORD_BYTES {
                            return Err(too_large());
                        }
                    }
                }
                Some(_) => {}
            }
            at += 1;
            if at - start > MAX_RECORD_BYTES {
                return Err(too_large());
            }
        }
    }

    /// Puts the next records into `chunk`; false if there are none.
    pub fn next(&mut self, chunk_bytes: usize, chunk: &mut Chunk) -> Result<bool> {
        if self.is_done {
            return Ok(false);
        }
        if self.is_array {
            self.next_elements(chunk_bytes, chunk)?
        } else {
            self.next_lines(chunk_bytes, chunk)?
        }
        let num_source_bytes = self.reader.num_source_bytes.load(Ordering::Relaxed);
        chunk.num_source_bytes = num_source_bytes - self.num_source_bytes;
        self.num_source_bytes = num_source_bytes;
        Ok(true)
    }

    fn next_lines(&mut self, chunk_bytes: usize, chunk: &mut Chunk) -> Result<()> {
        let mut searched = 0;
        let newline = loop {
            if self.carry.len() < chunk_bytes.max(searched + 1) && !self.is_file_read {
                self.read(chunk_bytes)?;
            }
            let newline = memchr::memrchr(b'\n', &self.carry[searched..]).map(|at| searched + at + 1);
            searched = self.carry.len();
            if newline.is_some() || self.is_file_read || searched > MAX_RECORD_BYTES {
                break newline;
            }
        };
        if newline.is_none() && !self.is_file_read {
            return Err(too_large());
        }
        let end = newline.filter(|_| !self.is_file_read).unwrap_or(self.carry.len());
        self.is_done = self.is_file_read;
        let start = std::mem::take(&mut self.start).min(end);
        self.hand_out(end, chunk);
        chunk.num_newlines = 0;
        chunk.split_lines(start..end, false);
        Ok(())
    }

    /// Moves the first `end` bytes into `chunk`.
    fn hand_out(&mut self, end: usize, chunk: &mut Chunk) {
        std::mem::swap(&mut chunk.bytes, &mut self.carry);
        self.carry.clear();
        self.carry.extend_from_slice(&chunk.bytes[end..]);
        chunk.bytes.truncate(end);
    }

    fn next_elements(&mut self, chunk_bytes: usize, chunk: &mut Chunk) -> Result<()> {
        let span = |range: Range<usize>, flaw: Option<&'static str>| RecordSpan {
            range,
            position: Position { line: 0, column: 0 }, // counted below, when the bytes stay where they are
            flaw: flaw.map(|message| (ErrorKind::InvalidJson, message)),
        };
        let mut at = 0;
        if self.is_first {
            at = self.skip_space(self.start, chunk_bytes)? + 1; // the opening bracket
            let next = self.skip_space(at, chunk_bytes)?;
            if self.byte(next, chunk_bytes)? == Some(b']') {
                self.is_done = true;
                at = next + 1;
            }
            self.is_first = false;
        }
        while !self.is_done && (at < chunk_bytes || chunk.records.is_empty()) {
            let start = self.skip_space(at, chunk_bytes)?;
            let end = self.element_end(start, chunk_bytes)?;
            let closing = self.byte(end, chunk_bytes)?;
            if closing.is_some() || end > start {
                chunk.records.push(span(start..end, None));
            }
            at = end + 1;
            match closing {
                Some(b',') => {}
                Some(_) => self.is_done = true,
                None => {
                    let message = "invalid JSON: expected ',' or ']', found the end of the file";
                    chunk.records.push(span(end..end, Some(message)));
                    self.is_done = true;
                    at = end;
                }
            }
        }
        if self.is_done {
            at = self.skip_space(at, chunk_bytes)?;
            if at < self.carry.len() {
                let message = "invalid JSON: expected the end of the file after ']'";
                chunk.records.push(span(at..at + 1, Some(message)));
                at = self.carry.len();
            }
        }

        self.hand_out(at, chunk);
        let mut counted = std::mem::take(&mut self.start);
        let mut position = Position { line: 1, column: self.column };
        for record in &mut chunk.records {
            position = position.after(&chunk.bytes[counted..record.range.start]);
            counted = record.range.start;
            record.position = position;
        }
        position = position.after(&chunk.bytes[counted..]);
        (chunk.num_newlines, self.column) = (position.line - 1, position.column);
        Ok(())
    }
}

/// Without the end of a record the ones behind it can't be found: they would be lost without being counted.
fn too_large() -> std::io::Error {
    std::io::Error::other(TOO_LARGE)
}
