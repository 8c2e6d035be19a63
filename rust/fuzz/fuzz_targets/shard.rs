//! A file of any bytes is opened as a shard or refused; what is opened can be read whole.
//!
//! The first byte of the input is what the manifest claims: two bits the samples, two the tokens' type, the others the
//! tokens. A claim of 0 samples is taken from the file's own header instead, so that whole shards are opened too.

#![no_main]

use std::path::PathBuf;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use sft_fast_core::shard::{Shard, ShardInfo, TokenType};

static DIRECTORY: LazyLock<PathBuf> = LazyLock::new(|| {
    let parent = if std::path::Path::new("/dev/shm").is_dir() { "/dev/shm".into() } else { std::env::temp_dir() };
    tempfile::Builder::new().prefix("sft-fast-fuzz-").tempdir_in(parent).expect("a directory").keep()
});

/// `[S + 1]` and `[T]` of the header.
fn claimed_by_header(bytes: &[u8]) -> Option<(u64, u64)> {
    let length = u64::from_le_bytes(bytes.get(..8)?.try_into().ok()?);
    let header: serde_json::Value =
        serde_json::from_slice(bytes.get(8..usize::try_from(length).ok()?.checked_add(8)?)?).ok()?;
    let count = |name: &str| header[name]["shape"][0].as_u64();
    Some((count("sample_offsets")?.checked_sub(1)?, count("token_ids")?))
}

fuzz_target!(|data: &[u8]| {
    let [claim, bytes @ ..] = data else { return };
    let mut counts = (u64::from(claim & 3), u64::from(claim >> 4));
    if counts.0 == 0 {
        counts = claimed_by_header(bytes).unwrap_or_default();
    }
    let (token_type, vocab_size) =
        if claim & 4 == 0 { (TokenType::U16, 1000) } else { (TokenType::U32, 100_000 * u32::from(claim >> 3 & 1)) };
    let name = format!("shard-{}", std::process::id());
    let path = DIRECTORY.join(&name);
    std::fs::write(&path, bytes).expect("room");
    let info = ShardInfo {
        name,
        num_bytes: bytes.len() as u64,
        sha256: String::new(),
        num_samples: counts.0,
        num_tokens: counts.1,
    };
    let Ok(shard) = Shard::open(&DIRECTORY, &info, token_type, vocab_size) else { return };
    let num_samples = shard.sample_offsets().len() - 1;
    assert_eq!(info.num_samples, num_samples as u64);
    let mut num_tokens = 0;
    for index in 0..num_samples {
        let ids = shard.token_ids(index).to_vec();
        let mask: Vec<bool> = shard.label_mask(index).collect();
        assert!(!ids.is_empty() && ids.len() == mask.len());
        assert_eq!(shard.num_label_tokens(index), mask[1..].iter().filter(|&&is_label| is_label).count() as u64);
        let _ = shard.record(index);
        num_tokens += ids.len() as u64;
    }
    assert_eq!(info.num_tokens, num_tokens);
});
