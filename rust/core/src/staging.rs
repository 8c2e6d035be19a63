//! How a directory comes to be all at once: lock, build beside it, rename. A crash leaves the old directory or the new one.

use std::ffi::OsStr;
use std::fs::{self, File, TryLockError};
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{CWD, RenameFlags, renameat_with};

use crate::error::{self, Error, Result};

/// The exclusive right to make the directory `target`, and the hidden directory beside it in which that is done.
///
/// Both vanish when it is dropped, and so do directories above the target that were made for it and hold nothing. What a
/// killed process left behind is removed by the next one that takes the lock.
#[derive(Debug)]
pub struct Staging {
    target: PathBuf,
    temporary: PathBuf,
    _lock: Lock,
}

/// A locked file beside the target.
#[derive(Debug)]
struct Lock {
    path: PathBuf,
    _file: File,
    _parents: Parents,
}

impl Staging {
    /// Waits for the lock of `target`, calling `while_waiting` about ten times a second; an error from it ends the wait.
    ///
    /// A target that is a symbolic link stands for what it points to.
    pub fn lock(target: &Path, mut while_waiting: impl FnMut() -> Result<()>) -> Result<Self> {
        let target = match target.is_symlink() {
            true => fs::canonicalize(target).map_err(|error| Error::io("follow the link", target, &error))?,
            false => target.components().collect(), // without "." at the end, which can't be renamed to
        };
        let name = target.file_name().and_then(OsStr::to_str).ok_or_else(|| {
            Error::new(error::ErrorKind::Argument, "expected the path of a directory with a name").with_path(&target)
        })?;
        let parent = parent(&target);
        let lock = Lock::take(parent.join(format!(".{name}.lock")), &mut while_waiting)?;
        let prefix = format!(".{name}.tmp-");
        for entry in fs::read_dir(parent).map_err(|error| Error::io("read", parent, &error))?.flatten() {
            let name = entry.file_name();
            let process = name.to_str().and_then(|name| name.strip_prefix(&prefix));
            if process.is_some_and(|process| process.bytes().all(|byte| byte.is_ascii_digit())) {
                fs::remove_dir_all(entry.path()).map_err(|error| Error::io("remove", &entry.path(), &error))?;
            }
        }
        let temporary = parent.join(format!("{prefix}{}", std::process::id()));
        Ok(Self { target, temporary, _lock: lock })
    }

    /// A path beside the target, hidden, with a name of its own.
    pub fn beside(&self, suffix: &str) -> PathBuf {
        let name = self.target.file_name().and_then(OsStr::to_str).expect("checked when the lock was taken");
        parent(&self.target).join(format!(".{name}.{suffix}"))
    }

    /// Makes the directory to build in.
    pub fn create(&self) -> Result<&Path> {
        fs::create_dir(&self.temporary).map_err(|error| Error::io("make the directory", &self.temporary, &error))?;
        Ok(&self.temporary)
    }

    /// Puts what was built in the place of the target, at once; an old target is removed.
    pub fn publish(self) -> Result<()> {
        sync_directory(&self.temporary)?;
        // Every file system can put a directory where there is none or an empty one; exchanging two takes a newer one.
        let failed = |error: std::io::Error| Error::io("put the finished directory in place", &self.target, &error);
        match fs::rename(&self.temporary, &self.target) {
            // File systems differ in what they say of a directory that is not empty.
            Err(error) if matches!(error.kind(), ErrorKind::DirectoryNotEmpty | ErrorKind::AlreadyExists) => {
                // An exchange leaves the old directory under the temporary name, where dropping removes it.
                renameat_with(CWD, &self.temporary, CWD, &self.target, RenameFlags::EXCHANGE).map_err(|error| {
                    failed(error.into()).with_hint("if the file system can't exchange directories, remove the old one")
                })?;
            }
            other => other.map_err(failed)?,
        }
        sync_directory(parent(&self.target))
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // Nothing can be done about a failure here; the next process that takes the lock tries again.
        let _ = fs::remove_dir_all(&self.temporary);
    }
}

impl Lock {
    fn take(path: PathBuf, while_waiting: &mut dyn FnMut() -> Result<()>) -> Result<Self> {
        loop {
            let parents = Parents::make(parent(&path))?;
            let file = match File::create(&path) {
                // Another process may have removed a directory that it had made and that we found there.
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                other => other.map_err(|error| Error::io("make the lock file", &path, &error))?,
            };
            match file.try_lock() {
                // The holder before us may have removed the file that we opened; then somebody else's lock counts.
                Ok(()) if is_same_file(&file, &path) => return Ok(Self { path, _file: file, _parents: parents }),
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => {
                    while_waiting()?;
                    std::thread::sleep(Duration::from_millis(100));
                }
                Err(TryLockError::Error(error)) => return Err(Error::io("lock", &path, &error)),
            }
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// The directories above a target that had to be made, the innermost first.
#[derive(Debug)]
struct Parents(Vec<PathBuf>);

impl Parents {
    fn make(directory: &Path) -> Result<Self> {
        let is_missing = |directory: &&Path| *directory != Path::new("") && !directory.exists();
        let missing = directory.ancestors().take_while(is_missing).map(Path::to_path_buf).collect();
        fs::create_dir_all(directory).map_err(|error| Error::io("make the directory", directory, &error))?;
        Ok(Self(missing))
    }
}

impl Drop for Parents {
    fn drop(&mut self) {
        // One that holds something can't be removed, which is just what is wanted.
        let _ = self.0.iter().try_for_each(fs::remove_dir);
    }
}

/// The directory that holds `path`.
fn parent(path: &Path) -> &Path {
    path.parent().filter(|parent| *parent != Path::new("")).unwrap_or(Path::new("."))
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
            Err(Error::new(error::ErrorKind::Interrupted, "stop"))
        });
        assert_eq!(error::ErrorKind::Interrupted, waited.unwrap_err().kind());
        assert_eq!(1, num_waits);
        drop(first);
        Staging::lock(&target, || panic!("the lock is free")).unwrap();
    }

    // What a link points to is replaced, not the link.
    #[test]
    fn links_are_followed() {
        let root = tempfile::tempdir().unwrap();
        let (link, target) = (root.path().join("link"), root.path().join("disk/out"));
        fs::create_dir_all(&target).unwrap();
        std::os::unix::fs::symlink(&target, &link).unwrap();
        let staging = Staging::lock(&link, || Ok(())).unwrap();
        fs::write(staging.create().unwrap().join("file"), "new").unwrap();
        staging.publish().unwrap();
        assert!(link.is_symlink());
        assert_eq!("new", fs::read_to_string(target.join("file")).unwrap());
        assert_eq!(vec!["out"], names(target.parent().unwrap()));
    }

    // Directories above the target that were made for nothing are removed; those that were there stay, and so does a
    // directory of somebody else whose name only begins as ours do.
    #[test]
    fn leaves_no_directories() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("there")).unwrap();
        let target = root.path().join("there/a/b/out");
        drop(Staging::lock(&target, || Ok(())).unwrap());
        assert_eq!(vec!["there"], names(root.path()));
        assert!(names(&root.path().join("there")).is_empty());

        let staging = Staging::lock(&target, || Ok(())).unwrap();
        fs::create_dir(target.with_file_name(".out.tmp-x")).unwrap();
        staging.create().unwrap();
        staging.publish().unwrap();
        drop(Staging::lock(&target, || Ok(())).unwrap());
        assert_eq!(vec![".out.tmp-x", "out"], names(target.parent().unwrap()));
    }
}
