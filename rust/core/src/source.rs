//! Files → chunks of records with their places. JSON Lines is read in parallel, a JSON array by one scan.
//!
//! A chunk is a buffer of whole records. Its lines are counted from the chunk's own start, since nobody has counted the
//! newlines before it yet; whoever takes the chunks in order adds them up ([`Chunk::num_newlines`]).

use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::SystemTime;

use crate::error::{Error, ErrorKind, Position, Result};

/// How many bytes a record may have. Larger ones are rejected, so that memory stays bounded.
pub const MAX_RECORD_BYTES: usize = 256 << 20;

/// One record in a [`Chunk`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecordSpan {
    /// Where the record lies in [`Chunk::bytes`].
    pub range: Range<usize>,
    /// Newlines of the chunk before the record.
    pub num_newlines_before: u64,
    /// Why these bytes are no record, where the reader knows already.
    pub flaw: Option<(ErrorKind, &'static str)>,
}

/// Some successive records of one file.
#[derive(Debug, Default)]
pub struct Chunk {
    /// The chunk's number in the input, from 0.
    pub sequence: u64,
    /// Number of the file.
    pub file: u32,
    /// The bytes of the records, and what stands between them.
    pub bytes: Vec<u8>,
    /// The records, in order.
    pub records: Vec<RecordSpan>,
    /// Newlines in the part of the file that this chunk stands for.
    pub num_newlines: u64,
    /// Bytes of the file that this chunk stands for, for progress.
    pub num_source_bytes: u64,
    /// Where in `bytes` the chunk begins; what stands before belongs to the chunk before.
    start: usize,
    /// Characters between the last newline before the chunk and the chunk.
    start_column: u64,
}

impl Chunk {
    /// The place of byte `offset` of `bytes`; its line counts from the chunk's start.
    pub fn position(&self, offset: usize) -> Position {
        let mut position = Position::find(&self.bytes[self.start..], offset.saturating_sub(self.start));
        if position.line == 1 {
            position.column += self.start_column;
        }
        position
    }
}

/// The opened input files, handed out chunk by chunk to any number of threads.
#[derive(Debug)]
pub struct Source {
    files: Vec<SourceFile>,
    chunk_bytes: usize,
    cursor: Mutex<Cursor>,
}

#[derive(Debug)]
struct SourceFile {
    path: PathBuf,
    file: File,
    num_bytes: u64,
    modified: Option<SystemTime>,
    /// Bytes of the byte order mark.
    start: u64,
    is_array: bool,
}

#[derive(Debug, Default)]
struct Cursor {
    sequence: u64,
    file: usize,
    /// Next byte of a JSON Lines file.
    offset: u64,
    array: Option<ArrayScan>,
}

impl Source {
    /// Opens `paths`. `chunk_bytes` is how much a chunk holds, about; it changes speed and memory, never the records.
    ///
    /// # Errors
    /// A path that is missing, unreadable or no regular file, and content that is compressed or binary.
    pub fn open(paths: &[PathBuf], chunk_bytes: usize) -> Result<Self> {
        let files = paths.iter().map(|path| SourceFile::open(path)).collect::<Result<Vec<_>>>()?;
        if u32::try_from(files.len()).is_err() {
            return Err(Error::new(ErrorKind::Argument, "more files than a dataset can number (4,294,967,295)"));
        }
        Ok(Self { files, chunk_bytes: chunk_bytes.max(16), cursor: Mutex::default() })
    }

    /// Bytes of all files.
    pub fn num_bytes(&self) -> u64 {
        self.files.iter().map(|file| file.num_bytes).sum()
    }

    /// Number of files.
    pub fn num_files(&self) -> u32 {
        self.files.len() as u32
    }

    /// Refuses files that were written to since they were opened: what was hashed may not be what was read.
    pub fn check_unchanged(&self) -> Result<()> {
        for file in &self.files {
            let metadata = file.file.metadata().map_err(|error| Error::io("read", &file.path, &error))?;
            if (metadata.len(), metadata.modified().ok()) != (file.num_bytes, file.modified) {
                return Err(Error::new(ErrorKind::Io, "the file changed while it was read")
                    .with_path(&file.path)
                    .with_hint("run again when nothing writes to it"));
            }
        }
        Ok(())
    }

    /// Path and size in bytes of file `number`.
    pub fn file(&self, number: u32) -> (&Path, u64) {
        let file = &self.files[number as usize];
        (&file.path, file.num_bytes)
    }

    /// BLAKE3 hash of the bytes of file `number`, in hexadecimal.
    pub fn hash(&self, number: u32, mut on_bytes: impl FnMut(usize) -> Result<()>) -> Result<String> {
        let file = &self.files[number as usize];
        let mut hasher = blake3::Hasher::new();
        let mut buffer = vec![0; 1 << 20];
        let mut offset = 0;
        while offset < file.num_bytes {
            let wanted = buffer.len().min((file.num_bytes - offset) as usize);
            file.read_exact_at(&mut buffer[..wanted], offset)?;
            hasher.update(&buffer[..wanted]);
            offset += wanted as u64;
            on_bytes(wanted)?;
        }
        Ok(hasher.finalize().to_hex().to_string())
    }

    /// Puts the next chunk into `chunk`; false at the end of the input. Every chunk goes to exactly one caller.
    pub fn next(&self, chunk: &mut Chunk) -> Result<bool> {
        let mut cursor = self.cursor.lock().expect("no thread panics while it holds the cursor");
        chunk.records.clear();
        loop {
            let Some(file) = self.files.get(cursor.file) else { return Ok(false) };
            let number = cursor.file as u32;
            if file.is_array {
                let mut scan = match cursor.array.take() {
                    Some(scan) => scan,
                    None => ArrayScan::new(file)?,
                };
                if scan.next(self.chunk_bytes, chunk).map_err(|error| Error::io("read", &file.path, &error))? {
                    cursor.array = Some(scan);
                    (chunk.file, chunk.sequence) = (number, cursor.sequence);
                    cursor.sequence += 1;
                    return Ok(true);
                }
            } else if cursor.offset < file.num_bytes {
                let start = cursor.offset;
                cursor.offset += self.chunk_bytes as u64;
                (chunk.file, chunk.sequence) = (number, cursor.sequence);
                cursor.sequence += 1;
                drop(cursor); // The rest needs no order.
                file.read_lines(start, start + self.chunk_bytes as u64, chunk)?;
                return Ok(true);
            }
            cursor.file += 1;
            cursor.offset = 0;
        }
    }
}

impl SourceFile {
    fn open(path: &Path) -> Result<Self> {
        let metadata = std::fs::metadata(path).map_err(|error| Error::io("read", path, &error))?;
        if !metadata.is_file() {
            let what = if metadata.is_dir() { "a directory" } else { "a pipe or a device" };
            return Err(Error::new(ErrorKind::Io, format!("expected a file, found {what}")).with_path(path));
        }
        let file = File::open(path).map_err(|error| Error::io("read", path, &error))?;
        let (num_bytes, modified) = (metadata.len(), metadata.modified().ok());
        let mut opened = Self { path: path.into(), file, num_bytes, modified, start: 0, is_array: false };
        let mut head = vec![0; opened.num_bytes.min(4096) as usize];
        opened.read_exact_at(&mut head, 0)?;
        for (magic, what) in [(&b"\x1f\x8b"[..], "gzip"), (b"\x28\xb5\x2f\xfd", "Zstandard"), (b"PAR1", "Parquet")] {
            if head.starts_with(magic) {
                return Err(Error::new(ErrorKind::InvalidJson, format!("expected JSON text, found a {what} file"))
                    .with_path(path)
                    .with_hint("decompress or convert it to JSON Lines first"));
            }
        }
        if head.starts_with(b"\xEF\xBB\xBF") {
            opened.start = 3;
        }
        let first = head[opened.start as usize..].iter().find(|byte| !byte.is_ascii_whitespace());
        opened.is_array = first == Some(&b'[');
        Ok(opened)
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        self.file.read_exact_at(buffer, offset).map_err(|error| match error.kind() {
            std::io::ErrorKind::UnexpectedEof => {
                Error::new(ErrorKind::Io, "the file became shorter while it was read").with_path(&self.path)
            }
            _ => Error::io("read", &self.path, &error),
        })
    }

    /// Takes the lines that begin in bytes `start..end` of the file; the last of them may reach beyond `end`.
    fn read_lines(&self, start: u64, end: u64, chunk: &mut Chunk) -> Result<()> {
        let end = end.min(self.num_bytes);
        // One byte more in front tells whether a line begins at `start`.
        let from = if start == 0 { self.start.min(end) } else { start - 1 };
        let bytes = &mut chunk.bytes;
        bytes.resize((end - from) as usize, 0);
        self.read_exact_at(bytes, from)?;
        chunk.num_source_bytes = end - start;
        chunk.start_column = 0;
        chunk.num_newlines = 0;

        let mut line_start = match start {
            0 => 0,
            _ => match memchr::memchr(b'\n', bytes) {
                Some(newline) => newline + 1,
                None => bytes.len(),
            },
        };
        chunk.start = line_start;
        let num_own_bytes = bytes.len();
        let mut too_large = false;
        if line_start < num_own_bytes && bytes.last() != Some(&b'\n') {
            too_large = !self.read_rest_of_line(from, bytes)?;
        }
        while line_start < num_own_bytes {
            let newline = memchr::memchr(b'\n', &bytes[line_start..]).map(|length| line_start + length);
            let line_end = newline.unwrap_or(bytes.len());
            let is_cut = too_large && newline.is_none();
            if is_cut || bytes[line_start..line_end].iter().any(|byte| !byte.is_ascii_whitespace()) {
                chunk.records.push(RecordSpan {
                    range: line_start..line_end,
                    num_newlines_before: chunk.num_newlines,
                    flaw: is_cut.then_some((ErrorKind::RecordTooLarge, TOO_LARGE)),
                });
            }
            chunk.num_newlines += u64::from(newline.is_some() || is_cut);
            line_start = line_end + 1;
        }
        Ok(())
    }

    /// Appends the bytes up to the next newline or the end of the file; false if that would pass [`MAX_RECORD_BYTES`].
    fn read_rest_of_line(&self, from: u64, bytes: &mut Vec<u8>) -> Result<bool> {
        let mut step = 1 << 16;
        loop {
            let at = from + bytes.len() as u64;
            if at == self.num_bytes {
                return Ok(true);
            }
            if bytes.len() > MAX_RECORD_BYTES {
                return Ok(false);
            }
            let old = bytes.len();
            bytes.resize(old + (self.num_bytes - at).min(step) as usize, 0);
            self.read_exact_at(&mut bytes[old..], at)?;
            if let Some(newline) = memchr::memchr(b'\n', &bytes[old..]) {
                bytes.truncate(old + newline + 1);
                return Ok(true);
            }
            step *= 2;
        }
    }
}

const TOO_LARGE: &str = "expected a record of at most 256 MiB, found a larger one";

/// Cuts a JSON array into its elements, without reading the elements: it only follows strings and brackets.
#[derive(Debug)]
struct ArrayScan {
    file: File,
    /// Bytes read and not handed out yet.
    carry: Vec<u8>,
    is_file_read: bool,
    is_done: bool,
    is_first: bool,
    column: u64,
}

impl ArrayScan {
    fn new(file: &SourceFile) -> Result<Self> {
        let reopened = File::open(&file.path).map_err(|error| Error::io("read", &file.path, &error))?;
        let mut scan =
            Self { file: reopened, carry: Vec::new(), is_file_read: false, is_done: false, is_first: true, column: 0 };
        scan.read(4096).map_err(|error| Error::io("read", &file.path, &error))?;
        scan.carry.drain(..(file.start as usize).min(scan.carry.len()));
        Ok(scan)
    }

    fn read(&mut self, num_bytes: usize) -> std::io::Result<()> {
        let old = self.carry.len();
        self.carry.resize(old + num_bytes, 0);
        let mut filled = old;
        while filled < self.carry.len() {
            match self.file.read(&mut self.carry[filled..]) {
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
    fn byte(&mut self, at: usize, chunk_bytes: usize) -> std::io::Result<Option<u8>> {
        while at >= self.carry.len() && !self.is_file_read {
            self.read(chunk_bytes)?;
        }
        Ok(self.carry.get(at).copied())
    }

    fn skip_space(&mut self, mut at: usize, chunk_bytes: usize) -> std::io::Result<usize> {
        while matches!(self.byte(at, chunk_bytes)?, Some(b' ' | b'\n' | b'\r' | b'\t')) {
            at += 1;
        }
        Ok(at)
    }

    /// The end of the element at `at`: the `,` or `]` behind it, or the end of the file. None: it is too large.
    fn element_end(&mut self, start: usize, chunk_bytes: usize) -> std::io::Result<Option<usize>> {
        let (mut at, mut depth) = (start, 0usize);
        loop {
            match self.byte(at, chunk_bytes)? {
                None => return Ok(Some(at)),
                Some(b',' | b']') if depth == 0 => return Ok(Some(at)),
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
                                    return Ok(Some(self.carry.len()));
                                }
                            }
                        }
                        if at - start > MAX_RECORD_BYTES {
                            return Ok(None);
                        }
                    }
                }
                Some(_) => {}
            }
            at += 1;
            if at - start > MAX_RECORD_BYTES {
                return Ok(None);
            }
        }
    }

    fn next(&mut self, chunk_bytes: usize, chunk: &mut Chunk) -> std::io::Result<bool> {
        if self.is_done {
            return Ok(false);
        }
        let mut spans: Vec<(Range<usize>, Option<(ErrorKind, &'static str)>)> = Vec::new();
        let flaw = |message| Some((ErrorKind::InvalidJson, message));
        let mut at = 0;
        if self.is_first {
            at = self.skip_space(at, chunk_bytes)? + 1; // the opening bracket
            let next = self.skip_space(at, chunk_bytes)?;
            if self.byte(next, chunk_bytes)? == Some(b']') {
                self.is_done = true;
                at = next + 1;
            }
            self.is_first = false;
        }
        while !self.is_done && (at < chunk_bytes || spans.is_empty()) {
            let start = self.skip_space(at, chunk_bytes)?;
            let Some(end) = self.element_end(start, chunk_bytes)? else {
                // Nobody knows where the next element begins: the rest of the array is lost with this one.
                spans.push((start..start + 1, Some((ErrorKind::RecordTooLarge, TOO_LARGE))));
                self.is_done = true;
                at = self.carry.len();
                break;
            };
            let closing = self.byte(end, chunk_bytes)?;
            if closing.is_some() || end > start {
                spans.push((start..end, None));
            }
            at = end + 1;
            match closing {
                Some(b',') => {}
                Some(_) => self.is_done = true,
                None => {
                    spans.push((end..end, flaw("invalid JSON: expected ',' or ']', found the end of the file")));
                    self.is_done = true;
                    at = end;
                }
            }
        }
        if self.is_done {
            at = self.skip_space(at, chunk_bytes)?;
            if at < self.carry.len() {
                let message = "invalid JSON: expected the end of the file after ']'";
                spans.push((at..at + 1, flaw(message)));
                at = self.carry.len();
            }
        }

        std::mem::swap(&mut chunk.bytes, &mut self.carry);
        self.carry.clear();
        self.carry.extend_from_slice(&chunk.bytes[at..]);
        chunk.bytes.truncate(at);
        (chunk.start, chunk.start_column) = (0, self.column);
        chunk.num_source_bytes = at as u64;
        let (mut counted, mut num_newlines) = (0, 0);
        for (range, flaw) in spans {
            num_newlines += memchr::memchr_iter(b'\n', &chunk.bytes[counted..range.start]).count() as u64;
            counted = range.start;
            chunk.records.push(RecordSpan { range, num_newlines_before: num_newlines, flaw });
        }
        chunk.num_newlines = num_newlines + memchr::memchr_iter(b'\n', &chunk.bytes[counted..]).count() as u64;
        self.column = chunk.position(chunk.bytes.len()).column - 1;
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Write;

    fn file(content: &[u8]) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(content).unwrap();
        file
    }

    /// Records as (text, line, column, flawed), from a file of `content` read in chunks of `chunk_bytes`.
    fn records(content: &[u8], chunk_bytes: usize) -> Vec<(String, u64, u64, bool)> {
        let file = file(content);
        let source = Source::open(&[file.path().to_path_buf()], chunk_bytes).unwrap();
        let (mut chunk, mut found, mut num_newlines, mut num_bytes) = (Chunk::default(), Vec::new(), 0, 0);
        while source.next(&mut chunk).unwrap() {
            for record in &chunk.records {
                let position = chunk.position(record.range.start);
                assert_eq!(record.num_newlines_before + 1, position.line);
                let text = String::from_utf8_lossy(&chunk.bytes[record.range.clone()]).into_owned();
                found.push((text, num_newlines + position.line, position.column, record.flaw.is_some()));
            }
            num_newlines += chunk.num_newlines;
            num_bytes += chunk.num_source_bytes;
        }
        assert!(num_bytes <= content.len() as u64);
        found
    }

    fn clean(text: &str, line: u64, column: u64) -> (String, u64, u64, bool) {
        (text.into(), line, column, false)
    }

    // A JSON array is cut at its own commas only, whatever strings and nested values hold.
    #[test]
    fn array_elements_are_found() {
        let text = b"\xEF\xBB\xBF [ {\"a\": \"],}\\\"\"},\n [1,2] ,\"x\"\n]\n";
        for chunk_bytes in [16, 20, 1000] {
            let expected = vec![clean(r#"{"a": "],}\""}"#, 1, 4), clean("[1,2] ", 2, 2), clean("\"x\"\n", 2, 9)];
            assert_eq!(expected, records(text, chunk_bytes));
        }
        assert!(records(b"[ \n ]", 16).is_empty());
    }

    // An array that is cut off, or followed by something, ends in a flawed record: it is never taken for whole.
    #[test]
    fn broken_arrays_are_flawed() {
        let flaws = |text: &str| records(text.as_bytes(), 16).iter().filter(|record| record.3).count();
        assert_eq!(1, flaws("[{}"));
        assert_eq!(1, flaws("["));
        assert_eq!(1, flaws("[{},"));
        assert_eq!(1, flaws("[\"abc"));
        assert_eq!(1, flaws("[{}] {}"));
        assert_eq!(1, flaws("[]x"));
        assert_eq!(0, flaws("[{}]      \n  \n                 \n"));
    }

    // What can't hold JSON text is refused by name before anything is read from it.
    #[test]
    fn foreign_files_are_refused() {
        let directory = tempfile::tempdir().unwrap();
        let open = |path: &Path| Source::open(&[path.to_path_buf()], 16).unwrap_err().to_string();
        assert!(open(directory.path()).contains("expected a file, found a directory"));
        assert!(open(&directory.path().join("none")).contains("could not read"));
        assert!(open(file(b"\x1f\x8b\x08rest").path()).contains("found a gzip file"));
    }

    proptest! {
        // The records of a JSON Lines file, with their lines, do not depend on the chunk size.
        #[test]
        fn lines_do_not_depend_on_chunks(text in "(\u{FEFF})?([a-z ü\r]{0,9}\n{0,3}){0,12}", chunk_bytes in 16usize..40) {
            prop_assume!(!text.trim_start_matches('\u{FEFF}').trim_start().starts_with('['));
            let expected: Vec<_> = text.trim_start_matches('\u{FEFF}').split('\n').enumerate()
                .filter(|(_, line)| !line.trim_ascii().is_empty())
                .map(|(number, line)| clean(line, number as u64 + 1, 1))
                .collect();
            prop_assert_eq!(expected, records(text.as_bytes(), chunk_bytes));
        }

        // The elements of a JSON array do not depend on the chunk size either, nor on the white space around them.
        #[test]
        fn elements_do_not_depend_on_chunks(
            elements in prop::collection::vec(r#"\{"a":"([a-z,\[\]{}é]|\\"|\\\\){0,12}"\}|[0-9]{1,3}|\[\[1\],"x"\]"#, 0..12),
            space in "[ \n]{0,3}", chunk_bytes in 16usize..40,
        ) {
            let text = format!("[{space}{}]{space}", elements.join(&format!(",{space}")));
            let found: Vec<_> = records(text.as_bytes(), chunk_bytes).into_iter().map(|record| record.0).collect();
            prop_assert_eq!(elements, found);
        }
    }
}
