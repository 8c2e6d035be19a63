//! A shard that another process writes: what its tokens are and where they lie is known, and what stands around them too.
//!
//! The collector knows all of a shard but the token ids, which are in the files of parts. It leaves the bytes around them in
//! a file; whoever takes the order copies the ids between these, hashes what it writes, and gives the shard its name at the end.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::collect::ShardElsewhere;
use super::frames::{FrameReader, PendingFile, Piece};
use super::parts::part_path;
use crate::error::{Error, ErrorKind, Result};
use crate::hash::Sha256Writer;
use crate::manifest::shard_name;
use crate::shard::{ShardInfo, TokenType};

/// What another process needs to know to write a shard.
#[derive(Debug, Serialize, Deserialize)]
pub struct ShardOrder {
    /// Of this crate.
    pub version: String,
    number: usize,
    token_type: TokenType,
    num_samples: u64,
    num_tokens: u64,
    /// Bytes before the tokens, in the file of what stands around them.
    num_head_bytes: usize,
    /// Of that file.
    blake3: String,
    pieces: Vec<Piece>,
}

/// Where the finished shard `number` comes to be, in the directory of the parts.
pub fn shard_path(directory: &Path, number: usize) -> PathBuf {
    directory.join(shard_name(number))
}

fn around_path(directory: &Path, number: usize) -> PathBuf {
    directory.join(format!("around-{number:05}"))
}

impl ShardOrder {
    /// Writes what stands around the tokens into `directory`.
    pub fn prepare(shard: ShardElsewhere, directory: &Path) -> Result<Self> {
        let ShardElsewhere { number, token_type, index, pieces } = shard;
        let (num_samples, num_tokens) = (index.num_samples() as u64, index.num_tokens() as u64);
        let [head, tail] = index.around_tokens(token_type);
        let mut file = PendingFile::create(&around_path(directory, number), &std::process::id().to_string())?;
        let bytes = [head.as_slice(), &tail].concat();
        file.write(&bytes)?;
        file.finish()?;
        Ok(Self {
            version: env!("CARGO_PKG_VERSION").into(),
            number,
            token_type,
            num_samples,
            num_tokens,
            num_head_bytes: head.len(),
            blake3: blake3::hash(&bytes).to_hex().to_string(),
            pieces,
        })
    }

    /// Writes the shard. `unique` tells this process from all others that may do the same.
    ///
    /// # Errors
    /// [`ErrorKind::Dataset`] if a part is damaged; [`ErrorKind::Io`] if a file can't be read or written.
    pub fn write(&self, directory: &Path, unique: &str) -> Result<ShardInfo> {
        let path = around_path(directory, self.number);
        let around = std::fs::read(&path).map_err(|error| Error::io("read", &path, &error))?;
        if blake3::hash(&around).to_hex().as_str() != self.blake3 || around.len() < self.num_head_bytes {
            return Err(
                Error::new(ErrorKind::Io, "expected a file as it was written, found it damaged").with_path(&path)
            );
        }
        let (head, tail) = around.split_at(self.num_head_bytes);
        let mut file = PendingFile::create(&shard_path(directory, self.number), unique)?;
        let mut hash = Sha256Writer::default();
        let mut num_bytes = 0;
        let mut write = |bytes: &[u8]| {
            num_bytes += bytes.len() as u64;
            hash.update(bytes);
            file.write(bytes)
        };
        write(head)?;
        let mut part: Option<(u64, FrameReader)> = None;
        let mut ids = Vec::new();
        for piece in &self.pieces {
            if part.as_ref().is_none_or(|(number, _)| *number != piece.part) {
                part = Some((piece.part, FrameReader::open(&part_path(directory, piece.part), piece.part)?));
            }
            let (_, reader) = part.as_ref().expect("it was opened");
            reader.read_ids(piece.frame, &mut ids)?;
            write(&self.token_type.bytes_of(&ids[piece.ids.clone()]))?;
        }
        write(tail)?;
        file.finish()?;
        Ok(ShardInfo {
            name: shard_name(self.number),
            num_bytes,
            sha256: hash.finish(),
            num_samples: self.num_samples,
            num_tokens: self.num_tokens,
        })
    }
}
