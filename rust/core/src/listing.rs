//! JSON lines beside the shards: records that were left out, and segments.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::hash::sha256_of_file;

/// A file of JSON lines: size and checksum.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ListingInfo {
    /// Size in bytes.
    pub num_bytes: u64,
    /// SHA-256 of the file, in hexadecimal.
    pub sha256: String,
}

/// A file of JSON lines that is being written.
pub struct Listing {
    path: PathBuf,
    file: BufWriter<File>,
}

impl Listing {
    /// Makes the file `directory/name`.
    pub fn create(directory: &Path, name: &str) -> Result<Self> {
        let path = directory.join(name);
        let file = File::create_new(&path).map_err(|error| Error::io("make the file", &path, &error))?;
        Ok(Self { path, file: BufWriter::new(file) })
    }

    /// Adds a line.
    pub fn push(&mut self, line: &impl serde::Serialize) -> Result<()> {
        let written = serde_json::to_writer(&mut self.file, line).map_err(std::io::Error::from);
        written.and_then(|()| self.file.write_all(b"\n")).map_err(|error| Error::io("write", &self.path, &error))
    }

    /// Makes sure that all lines are on disk.
    pub fn finish(self) -> Result<ListingInfo> {
        let file = self.file.into_inner().map_err(std::io::IntoInnerError::into_error);
        let num_bytes = file.and_then(|file| {
            file.sync_all()?;
            Ok(file.metadata()?.len())
        });
        let num_bytes = num_bytes.map_err(|error| Error::io("write", &self.path, &error))?;
        Ok(ListingInfo { num_bytes, sha256: sha256_of_file(&self.path)? })
    }
}
