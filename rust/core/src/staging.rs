//! How a directory comes to be all at once: lock, build beside it, rename. A crash leaves the old directory or the new one.

use std::fs::{self, File, TryLockError};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{CWD, RenameFlags, renameat_with};

use crate::error::{Error, ErrorKind, Result};

/// The exclusive right to make the directory `target`, and the hidden directory beside it in which that is done.
///
/// Both vanish when it is dropped. What a killed process left behind is removed by the next one that takes the lock.
#[derive(Debug)]
pub struct Staging {
    target: PathBuf,
    temporary: PathBuf,
    lock_path: PathBuf,
    _lock: File,
}

impl Staging {
    /// Waits for the lock of `target`, calling `while_waiting` about ten times a second; an error from it ends the wait.
    pub fn lock(target: &Path, mut while_waiting: impl FnMut() -> Result<()>) -> Result<Self> {
        let name = target.file_name().and_then(|name| name.to_str()).ok_or_else(|| {
            Error::new(ErrorKind::Argument, "expected the path of a directory with a name").with_path(target)
        })?;
        let parent = match target.parent() {
            Some(parent) if parent != Path::new("") => parent.to_path_buf(),
            _ => PathBuf::from("."),
        };
        fs::create_dir_all(&parent).map_err(|error| Error::io("make the directory", &parent, &error))?;
        let lock_path = parent.join(format!(".{name}.lock"));
        let lock = loop {
            let file = File::create(&lock_path).map_err(|error| Error::io("make the lock file", &lock_path, &error))?;
            match file.try_lock() {
                // The holder before us may have removed the file that we opened; then somebody else's lock counts.
                Ok(()) if is_same_file(&file, &lock_path) => break file,
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => {
                    while_waiting()?;
                    std::thread::sleep(Duration::from_millis(100));
                }
                Err(TryLockError::Error(error)) => return Err(Error::io("lock", &lock_path, &error)),
            }
        };
        let prefix = format!(".{name}.tmp-");
        for entry in fs::read_dir(&parent).map_err(|error| Error::io("read", &parent, &error))?.flatten() {
            if entry.file_name().to_str().is_some_and(|name| name.starts_with(&prefix)) {
                fs::remove_dir_all(entry.path()).map_err(|error| Error::io("remove", &entry.path(), &error))?;
            }
        }
        let temporary = parent.join(format!("{prefix}{}", std::process::id()));
        Ok(Self { target: target.into(), temporary, lock_path, _lock: lock })
    }

    /// Makes the directory to build in.
    pub fn create(&self) -> Result<&Path> {
        fs::create_dir(&self.temporary).map_err(|error| Error::io("make the directory", &self.temporary, &error))?;
        Ok(&self.temporary)
    }

    /// Puts what was built in the place of the target, at once; an old target is removed.
    pub fn publish(self) -> Result<()> {
        sync_directory(&self.temporary)?;
        let failed = |error: std::io::Error| Error::io("put the finished directory in place", &self.target, &error);
        if self.target.exists() {
            // An exchange leaves the old directory under the temporary name, where dropping removes it.
            renameat_with(CWD, &self.temporary, CWD, &self.target, RenameFlags::EXCHANGE)
                .map_err(|error| failed(error.into()))?;
        } else {
            fs::rename(&self.temporary, &self.target).map_err(failed)?;
        }
        sync_directory(self.lock_path.parent().unwrap_or(Path::new(".")))
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // Nothing can be done about a failure here; the next process that takes the lock tries again.
        let _ = fs::remove_dir_all(&self.temporary);
        let _ = fs::remove_file(&self.lock_path);
    }
}

fn is_same_file(file: &File, path: &Path) -> bool {
    match (file.metadata(), fs::metadata(path)) {
        (Ok(opened), Ok(named)) => (opened.dev(), opened.ino()) == (named.dev(), named.ino()),
        _ => false,
    }
}

fn sync_directory(path: &Path) -> Result<()> {
    File::open(path).and_then(|directory| directory.sync_all()).map_err(|error| Error::io("write", path, &error))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(directory: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    // Publishing replaces the target whole and leaves nothing else; giving up leaves the old target and nothing else.
    #[test]
    fn old_or_new() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("out");
        for (content, publish, expected) in [("1", true, "1"), ("2", false, "1"), ("3", true, "3")] {
            let staging = Staging::lock(&target, || Ok(())).unwrap();
            fs::write(staging.create().unwrap().join("file"), content).unwrap();
            if publish {
                staging.publish().unwrap()
            } else {
                drop(staging)
            }
            assert_eq!(vec!["out"], names(root.path()));
            assert_eq!(expected, fs::read_to_string(target.join("file")).unwrap());
        }
    }

    // Only one holder at a time; what a dead one left is removed by the next.
    #[test]
    fn locks_and_cleans() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("out");
        fs::create_dir(root.path().join(".out.tmp-1")).unwrap();
        let first = Staging::lock(&target, || Ok(())).unwrap();
        assert_eq!(vec![".out.lock"], names(root.path()));

        let mut num_waits = 0;
        let waited = Staging::lock(&target, || {
            num_waits += 1;
            Err(Error::new(ErrorKind::Interrupted, "stop"))
        });
        assert_eq!(ErrorKind::Interrupted, waited.unwrap_err().kind());
        assert_eq!(1, num_waits);
        drop(first);
        Staging::lock(&target, || panic!("the lock is free")).unwrap();
    }
}
