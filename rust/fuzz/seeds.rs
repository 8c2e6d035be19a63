//! `seeds DIR`: writes a few inputs for each fuzz target to `DIR/<target>/`.

use std::fs;
use std::path::Path;

use sft_fast_core::shard::TokenType;
use sft_fast_core::shard::write::{ShardIndex, ShardWriter};

#[path = "../core/src/tokenize/fast/families.rs"]
#[allow(dead_code)]
mod families;

const RECORDS: [&str; 8] = [
    r#"{"instruction": "Say \"hé\"\n", "input": "", "output": "\u00e9\ud83d\ude42 \\ \/ \b\f\r\t"}"#,
    r#"{"messages": [{"role": "user", "content": "你好"}, {"role": "assistant", "content": null}], "n": -12.5e+3}"#,
    "[{\"a\": [true, false, null]}, {}, [],\n 0, 1E9, \"x,]}\"]\n",
    "{\"a\": 1}\n\n \r\n{\"a\": 2}\r\n{\"b\": \"\u{2028}\"}",
    "\u{FEFF}{\"a\": 1}\n{\"a\": 2}\n",
    "\u{FEFF} [ 1 , 2 ] ",
    "[1, 2",
    "{\"a\": tru, 'b': 01, \"c\": \"\\x\"}",
];

fn main() -> std::io::Result<()> {
    let directory = std::env::args().nth(1).expect("seeds DIR");
    let write = |target: &str, number: usize, bytes: &[u8]| {
        let directory = Path::new(&directory).join(target);
        fs::create_dir_all(&directory)?;
        fs::write(directory.join(format!("seed-{number:02}")), bytes)
    };
    for (number, record) in RECORDS.iter().enumerate() {
        write("json", number, record.as_bytes())?;
        write("records", number, record.as_bytes())?;
    }
    let num_tokenizers = families::families().len() * families::VARIANTS.len();
    for number in 0..num_tokenizers {
        write("engine", 3 * number, &[&[number as u8, 0], families::SAMPLE.as_bytes()].concat())?;
        let fragments: Vec<u8> = (0..40).map(|index| (37 * index + 11 * number) as u8).collect();
        write("engine", 3 * number + 1, &[&[number as u8, 1], &*fragments].concat())?;
        write("engine", 3 * number + 2, &[&[number as u8, 2], &*fragments].concat())?;
    }
    for (number, token_type) in [TokenType::U16, TokenType::U32].into_iter().enumerate() {
        let bytes = small_shard(token_type)?;
        // The first byte is what is claimed: as in the header, then 2 samples of 10 tokens.
        write("shard", 2 * number, &[&[(number as u8) << 2 | (number as u8) << 3], &*bytes].concat())?;
        write("shard", 2 * number + 1, &[&[2 | (number as u8) << 2 | 10 << 4], &*bytes].concat())?;
    }
    Ok(())
}

/// The bytes of a shard of two samples, without the spaces that fill up its header.
fn small_shard(token_type: TokenType) -> std::io::Result<Vec<u8>> {
    let directory = tempfile::tempdir()?;
    let writer = ShardWriter::create(directory.path(), "shard".into(), token_type).expect("room");
    writer.write_tokens(0, &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]).expect("room");
    let mut index = ShardIndex::default();
    index.push(3, &[1..3], 0, 1);
    index.push(7, &[0..1, 4..7], 0, 2);
    writer.finish(index).expect("room");
    let bytes = fs::read(directory.path().join("shard"))?;
    let (length, rest) = bytes.split_at(8);
    let (header, tensors) = rest.split_at(u64::from_le_bytes(length.try_into().expect("8 bytes")) as usize);
    let header = header.trim_ascii_end();
    let filled = header.len().next_multiple_of(8);
    Ok([&(filled as u64).to_le_bytes(), header, &vec![b' '; filled - header.len()], tensors].concat())
}
