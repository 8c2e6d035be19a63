//! The records of a file, with their places, do not depend on the chunk size or on compression; those of JSON Lines are its
//! lines, and those of a JSON array its elements.

#![no_main]

use std::io::Write;
use std::path::Path;

use libfuzzer_sys::fuzz_target;
use serde_json::value::RawValue;
use sft_fast_core::source::{Chunk, Source};

/// Bytes, line, column, and whether the reader knows that they are no record.
type Record = (Vec<u8>, u64, u64, bool);

fn records(path: &Path, chunk_bytes: usize) -> Result<Vec<Record>, String> {
    let source = Source::open(&[path.to_owned()], chunk_bytes, 1, || (), |_, _| Ok(())).map_err(|error| error.to_string())?;
    let (mut chunk, mut all, mut num_newlines) = (Chunk::default(), Vec::new(), 0);
    while source.next(&mut chunk).map_err(|error| error.to_string())? {
        for record in &chunk.records {
            let place = chunk.position(record, 0);
            let bytes = chunk.bytes[record.range.clone()].to_vec();
            all.push((bytes, num_newlines + place.line, place.column, record.flaw.is_some()));
        }
        num_newlines += chunk.num_newlines;
    }
    Ok(all)
}

fn file(bytes: &[u8]) -> tempfile::NamedTempFile {
    // In memory where the system has that.
    let directory = if Path::new("/dev/shm").is_dir() { "/dev/shm".into() } else { std::env::temp_dir() };
    let mut file = tempfile::NamedTempFile::new_in(directory).expect("a file");
    file.write_all(bytes).expect("room");
    file
}

/// The lines that are not blank; of a JSON array, its elements, if it is one.
fn oracle(bytes: &[u8]) -> Option<Vec<Vec<u8>>> {
    let text = bytes.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(bytes);
    if text.trim_ascii_start().starts_with(b"[") {
        let elements: Vec<&RawValue> = serde_json::from_slice(text).ok()?;
        return Some(elements.iter().map(|element| element.get().as_bytes().to_vec()).collect());
    }
    let lines = text.split(|&byte| byte == b'\n').filter(|line| !line.trim_ascii().is_empty());
    Some(lines.map(<[u8]>::to_vec).collect())
}

fuzz_target!(|data: &[u8]| {
    let plain = file(data);
    let expected = records(plain.path(), 1 << 20);
    for chunk_bytes in [16, 17, 37, 256] {
        assert_eq!(expected, records(plain.path(), chunk_bytes), "chunks of {chunk_bytes}");
    }
    let Ok(expected) = expected else { return };
    let is_array = data.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(data).trim_ascii_start().starts_with(b"[");
    if let Some(oracle) = oracle(data) {
        let found: Vec<_> = expected
            .iter()
            .map(|record| if is_array { record.0.trim_ascii().to_vec() } else { record.0.clone() })
            .collect();
        assert_eq!(oracle, found);
        assert!(expected.iter().all(|record| !record.3));
    }
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(data).expect("memory");
    for compressed in [gzip.finish().expect("memory"), zstd::encode_all(data, 1).expect("memory")] {
        for chunk_bytes in [16, 1 << 20] {
            assert_eq!(Ok(&expected), records(file(&compressed).path(), chunk_bytes).as_ref());
        }
    }
});
