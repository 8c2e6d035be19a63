//! Files → chunks of records with their places. A first look finds hashes and segments (`survey`). Plain JSON Lines are then
//! read in parallel, segment by segment (`lines`); JSON arrays and compressed files by one scan (`scan`).
//!
//! A chunk is a buffer of whole records. Its lines are counted from the chunk's own start, since nobody has counted the
//! newlines before it yet; whoever takes the chunks in order adds them up ([`Chunk::num_newlines`]).

mod lines;
mod scan;
mod survey;

use std::fs::{File, Metadata};
use std::io::{BufReader, Read};
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use scan::Scan;
use serde::{Deserialize, Serialize};
pub use survey::Survey;

use crate::error::{Error, ErrorKind, Position, Result};

/// How many bytes a record may have. Larger ones are rejected, so that memory stays bounded.
pub const MAX_RECORD_BYTES: usize = 256 << 20;

/// One record in a [`Chunk`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecordSpan {
    /// Where the record lies in [`Chunk::bytes`].
    pub range: Range<usize>,
    /// The place of its first byte. Kept, so that finding the place of an error takes time in the record's length only.
    pub position: Position,
    /// Why these bytes are no record, where the reader knows already.
    pub flaw: Option<(ErrorKind, &'static str)>,
}

/// A part of a file that is the same wherever it stands: see [`Survey::segments`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Where it lies in [`Chunk::bytes`].
    pub bytes: Range<usize>,
    /// Which of the chunk's records it holds.
    pub records: Range<usize>,
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
    /// The segments, in order, that together hold all records; none where the file has no segments.
    pub segments: Vec<Segment>,
    /// Newlines in the part of the file that this chunk stands for.
    pub num_newlines: u64,
    /// Bytes of the file that this chunk stands for, for progress.
    pub num_source_bytes: u64,
}

impl Chunk {
    /// The place of byte `offset` of `record`; its line counts from the chunk's start.
    pub fn position(&self, record: &RecordSpan, offset: usize) -> Position {
        let bytes = &self.bytes[record.range.clone()];
        record.position.after(&bytes[..offset.min(bytes.len())])
    }
}

/// A part of a file, which can be read by another process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FilePart {
    number: u32,
    path: PathBuf,
    name: PathBuf,
    num_bytes: u64,
    modified: (i64, i64),
    /// Where the segments of the part begin; none where the part is a whole file that has no segments.
    segments: Vec<u64>,
    /// Where the last of them ends.
    end: u64,
}

impl FilePart {
    /// Bytes of the part.
    pub fn num_part_bytes(&self) -> u64 {
        self.end - self.segments.first().copied().unwrap_or(0)
    }
}

/// The input files, handed out chunk by chunk to any number of threads.
#[derive(Debug)]
pub struct Source {
    /// Number of the first file.
    first_file: u32,
    files: Vec<SourceFile>,
    chunk_bytes: usize,
    cursor: Mutex<Cursor>,
}

#[derive(Debug)]
struct SourceFile {
    path: PathBuf,
    /// What it is called where a user reads of it: its path, unless it was given a name.
    name: PathBuf,
    stamp: Stamp,
    compression: Compression,
    /// Bytes of the byte order mark.
    start: usize,
    is_array: bool,
    survey: Survey,
    /// Where the last segment ends.
    end: u64,
}

/// What tells a file from another one of that name, and from itself before a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    num_bytes: u64,
    /// Seconds and nanoseconds.
    modified: (i64, i64),
}

impl Stamp {
    fn new(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            num_bytes: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
        }
    }
}

/// How a file is compressed, told by its first bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Compression {
    None,
    Gzip,
    Zstd,
}

#[derive(Debug, Default)]
struct Cursor {
    sequence: u64,
    file: usize,
    /// Next segment of a JSON Lines file.
    segment: usize,
    scan: Option<Scan>,
}

impl Source {
    /// Opens `paths` and looks at them with `num_threads` threads. `chunk_bytes` is how much a chunk holds, about; it changes
    /// speed and memory, never the records.
    ///
    /// Once the files are open, `first` is done by a thread that then helps the others; where there is but one, it is another.
    /// `on_bytes` is told how many bytes were read since it was told last, and how many there are in all; an error from it
    /// ends the work.
    ///
    /// # Errors
    /// A path that is missing, unreadable or no regular file, and content that is compressed or binary.
    pub fn open(
        paths: &[PathBuf],
        chunk_bytes: usize,
        num_threads: usize,
        first: impl FnOnce() + Send,
        mut on_bytes: impl FnMut(u64, u64) -> Result<()>,
    ) -> Result<Self> {
        let files = paths.iter().map(|path| SourceFile::open(path)).collect::<Result<Vec<_>>>()?;
        if u32::try_from(files.len()).is_err() {
            return Err(Error::new(ErrorKind::Argument, "more files than a dataset can number (4,294,967,295)"));
        }
        let mut source = Self::new(0, files, chunk_bytes);
        let num_total_bytes = source.num_bytes();
        let surveys =
            survey::survey(&source.files, num_threads, first, |num_bytes| on_bytes(num_bytes, num_total_bytes))?;
        source.files.iter_mut().zip(surveys).for_each(|(file, survey)| file.survey = survey);
        Ok(source)
    }

    fn new(first_file: u32, files: Vec<SourceFile>, chunk_bytes: usize) -> Self {
        Self { first_file, files, chunk_bytes: chunk_bytes.clamp(16, 8 << 20), cursor: Mutex::default() }
    }

    /// Opens what [`parts`](Self::parts) cut from an input, which may have been seen by another machine.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] if the files are not those that it saw.
    pub fn of_part(parts: &[FilePart], chunk_bytes: usize) -> Result<Self> {
        let open = |part: &FilePart| {
            let mut file = SourceFile::open(&part.path)?;
            let (found, expected) = ((file.stamp.num_bytes, file.stamp.modified), (part.num_bytes, part.modified));
            if found != expected {
                let describe = |(num_bytes, (seconds, _)): (u64, (i64, i64))| {
                    format!("{num_bytes} bytes, written {seconds} s after 1970")
                };
                let message = format!("expected a file of {}, found {}", describe(expected), describe(found));
                return Err(Error::new(ErrorKind::Io, message).with_path(&part.path).with_hint(
                    "all machines have to see the input under the same path, and nothing may write to it meanwhile",
                ));
            }
            file.name.clone_from(&part.name);
            file.survey.segments.clone_from(&part.segments);
            file.end = part.end;
            Ok(file)
        };
        let files = parts.iter().map(open).collect::<Result<Vec<_>>>()?;
        Ok(Self::new(parts.first().map_or(0, |part| part.number), files, chunk_bytes))
    }

    /// Cuts the input into parts of about `part_bytes` bytes, at ends of segments. Small files share a part, and a file
    /// without segments is never divided.
    pub fn parts(&self, part_bytes: u64) -> Vec<Vec<FilePart>> {
        let (mut parts, mut part, mut num_bytes) = (Vec::new(), Vec::new(), 0);
        for (file, number) in self.files.iter().zip(self.first_file..) {
            let of_file = |segments: &[u64], end: u64| FilePart {
                number,
                path: std::path::absolute(&file.path).unwrap_or_else(|_| file.path.clone()),
                name: file.name.clone(),
                num_bytes: file.stamp.num_bytes,
                modified: file.stamp.modified,
                segments: segments.into(),
                end,
            };
            let mut rest = &file.survey.segments[..];
            loop {
                let start = rest.first().copied().unwrap_or(0);
                let limit = start + part_bytes.saturating_sub(num_bytes);
                let num_segments = rest.partition_point(|&segment| segment < limit);
                let end = rest.get(num_segments).copied().unwrap_or(file.end);
                let (segments, others) = rest.split_at(num_segments);
                part.push(of_file(segments, end));
                num_bytes += end - start;
                rest = others;
                if num_bytes >= part_bytes {
                    parts.push(std::mem::take(&mut part));
                    num_bytes = 0;
                }
                if rest.is_empty() {
                    break;
                }
            }
        }
        if !part.is_empty() {
            parts.push(part);
        }
        parts
    }

    /// Calls the files by `names`, in order, instead of by their paths.
    pub fn with_names(mut self, names: Option<&[PathBuf]>) -> Self {
        self.files.iter_mut().zip(names.into_iter().flatten()).for_each(|(file, name)| file.name.clone_from(name));
        self
    }

    /// Bytes of all files.
    pub fn num_bytes(&self) -> u64 {
        self.files.iter().map(|file| file.stamp.num_bytes).sum()
    }

    /// Number of files.
    pub fn num_files(&self) -> u32 {
        self.files.len() as u32
    }

    /// Refuses files that were written to or replaced meanwhile: what was hashed may not be what was read.
    pub fn check_unchanged(&self) -> Result<()> {
        self.files.iter().try_for_each(|file| file.reopen().map(drop))
    }

    /// Name and size in bytes of file `number`.
    pub fn file(&self, number: u32) -> (&Path, u64) {
        let file = &self.files[(number - self.first_file) as usize];
        (&file.name, file.stamp.num_bytes)
    }

    /// What the first look at file `number` found.
    pub fn survey(&self, number: u32) -> &Survey {
        &self.files[(number - self.first_file) as usize].survey
    }

    /// Puts the next chunk into `chunk`; false at the end of the input. Every chunk goes to exactly one caller.
    pub fn next(&self, chunk: &mut Chunk) -> Result<bool> {
        let mut cursor = self.cursor.lock().expect("no thread panics while it holds the cursor");
        chunk.records.clear();
        chunk.segments.clear();
        loop {
            let Some(file) = self.files.get(cursor.file) else { return Ok(false) };
            let number = self.first_file + cursor.file as u32;
            if !file.is_lines() {
                let mut scan = match cursor.scan.take() {
                    Some(scan) => scan,
                    None => Scan::new(file.reader()?, file.start, file.is_array),
                };
                if scan.next(self.chunk_bytes, chunk).map_err(|error| Error::io("read", &file.path, &error))? {
                    cursor.scan = Some(scan);
                    (chunk.file, chunk.sequence) = (number, cursor.sequence);
                    cursor.sequence += 1;
                    return Ok(true);
                }
            } else if cursor.segment < file.survey.segments.len() {
                let segments = file.next_segments(cursor.segment, self.chunk_bytes);
                cursor.segment = segments.end;
                (chunk.file, chunk.sequence) = (number, cursor.sequence);
                cursor.sequence += 1;
                drop(cursor); // The rest needs no order.
                file.read_segments(segments, chunk)?;
                return Ok(true);
            }
            cursor.file += 1;
            cursor.segment = 0;
        }
    }
}

impl SourceFile {
    /// Looks at a file. It is not kept open: an input may have more files than a process may have handles.
    fn open(path: &Path) -> Result<Self> {
        let failed = |error: std::io::Error| Error::io("read", path, &error);
        let metadata = std::fs::metadata(path).map_err(failed)?;
        if !metadata.is_file() {
            let what = if metadata.is_dir() { "a directory" } else { "a pipe or a device" };
            return Err(Error::new(ErrorKind::Io, format!("expected a file, found {what}")).with_path(path));
        }
        let stamp = Stamp::new(&metadata);
        let mut opened = Self {
            path: path.into(),
            name: path.into(),
            stamp,
            compression: Compression::None,
            start: 0,
            is_array: false,
            survey: Survey::default(),
            end: stamp.num_bytes,
        };
        let mut magic = Vec::new();
        opened.reopen()?.take(4).read_to_end(&mut magic).map_err(failed)?;
        opened.compression = match &magic[..] {
            [0x1F, 0x8B, ..] => Compression::Gzip,
            b"\x28\xb5\x2f\xfd" => Compression::Zstd,
            b"PAR1" => {
                return Err(Error::new(ErrorKind::InvalidJson, "expected JSON text, found a Parquet file")
                    .with_path(path)
                    .with_hint("convert it to JSON Lines first"));
            }
            _ => Compression::None,
        };
        let mut content = BufReader::new(opened.reader()?);
        let mut head = Vec::new();
        content.by_ref().take(3).read_to_end(&mut head).map_err(failed)?;
        if head == b"\xEF\xBB\xBF" {
            opened.start = 3;
            head.clear();
        }
        for byte in (&head[..]).chain(content).bytes() {
            let byte = byte.map_err(failed)?;
            if !byte.is_ascii_whitespace() {
                opened.is_array = byte == b'[';
                break;
            }
        }
        Ok(opened)
    }

    /// Whether it is plain JSON Lines.
    fn is_lines(&self) -> bool {
        !self.is_array && self.compression == Compression::None
    }

    /// Opens the file again, and refuses it if it is not what it was.
    fn reopen(&self) -> Result<File> {
        let failed = |error: std::io::Error| Error::io("read", &self.path, &error);
        let file = File::open(&self.path).map_err(failed)?;
        if Stamp::new(&file.metadata().map_err(failed)?) != self.stamp {
            return Err(Error::new(ErrorKind::Io, "the file changed while it was read")
                .with_path(&self.path)
                .with_hint("run again when nothing writes to it"));
        }
        Ok(file)
    }

    /// The decompressed content, from the start.
    fn reader(&self) -> Result<scan::Reader> {
        scan::Reader::new(self.reopen()?, self.compression).map_err(|error| Error::io("read", &self.path, &error))
    }

    fn read_exact_at(&self, file: &File, buffer: &mut [u8], offset: u64) -> Result<()> {
        file.read_exact_at(buffer, offset).map_err(|error| match error.kind() {
            std::io::ErrorKind::UnexpectedEof => {
                Error::new(ErrorKind::Io, "the file became shorter while it was read").with_path(&self.path)
            }
            _ => Error::io("read", &self.path, &error),
        })
    }
}

const TOO_LARGE: &str = "expected a record of at most 256 MiB, found a larger one";

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

    fn open(path: &Path, chunk_bytes: usize) -> Result<Source> {
        Source::open(&[path.to_path_buf()], chunk_bytes, 2, || (), |_, _| Ok(()))
    }

    /// Records as (text, line, column, flawed), from a file of `content` read in chunks of `chunk_bytes`.
    fn records(content: &[u8], chunk_bytes: usize) -> Vec<(String, u64, u64, bool)> {
        let file = file(content);
        let source = open(file.path(), chunk_bytes).unwrap();
        let (mut chunk, mut found, mut num_newlines, mut num_bytes) = (Chunk::default(), Vec::new(), 0, 0);
        while source.next(&mut chunk).unwrap() {
            for record in &chunk.records {
                let Position { line, column } = record.position;
                let text = String::from_utf8_lossy(&chunk.bytes[record.range.clone()]).into_owned();
                found.push((text, num_newlines + line, column, record.flaw.is_some()));
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
        let late = [&[b' '; 5000][..], b"\n[1]"].concat();
        assert_eq!(vec![clean("1", 2, 2)], records(&late, 16));
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
        let open = |path: &Path| open(path, 16).unwrap_err().to_string();
        assert!(open(directory.path()).contains("expected a file, found a directory"));
        assert!(open(&directory.path().join("none")).contains("could not read"));
        assert!(open(file(b"PAR1").path()).contains("found a Parquet file"));
        assert!(open(file(b"\x1f\x8b\x08rest").path()).contains("could not read"));
    }

    // A compressed file has the records of its content; one that is cut off is an error, never a shorter file.
    #[test]
    fn compressed_files_are_read() {
        for text in [&b"\xEF\xBB\xBF{\"a\": 1}\n\n {}\n[2]"[..], b"[{}, 1,\n \"long enough for two chunks\"]\n", b""] {
            let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            gzip.write_all(text).unwrap();
            let zstd = zstd::encode_all(text, 1).unwrap();
            for compressed in [gzip.finish().unwrap(), zstd] {
                assert_eq!(records(text, 16), records(&compressed, 16));
                let cut = file(&compressed[..compressed.len() - 3]);
                let source = open(cut.path(), 16);
                let read = |source: Source| {
                    let mut chunk = Chunk::default();
                    while source.next(&mut chunk)? {}
                    Ok(())
                };
                assert!(source.and_then(read).is_err());
            }
        }
    }

    // A file that is written to or replaced between two looks at it is refused.
    #[test]
    fn changes_are_noticed() {
        let mut file = file(b"{}\n");
        let open = || open(file.path(), 16).unwrap();
        let (appended, replaced) = (open(), open());
        appended.check_unchanged().unwrap();
        file.write_all(b"{}\n").unwrap();
        assert!(appended.check_unchanged().unwrap_err().to_string().contains("changed while it was read"));

        std::fs::remove_file(file.path()).unwrap();
        std::fs::write(file.path(), b"{}\n").unwrap();
        assert!(replaced.next(&mut Chunk::default()).unwrap_err().to_string().contains("changed while it was read"));
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
