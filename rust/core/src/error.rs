//! The one error type of the crate: what went wrong, where, and what to do about it.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// What kind of thing went wrong. Each has a stable [code](ErrorKind::code) that reports, `rejected.jsonl` and users rely on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum ErrorKind {
    /// The bytes of a record are not UTF-8.
    InvalidUtf8,
    /// The record is not JSON.
    InvalidJson,
    /// One record is larger than a record may be.
    RecordTooLarge,
    /// A key that the record needs is not there.
    MissingKey,
    /// The record has another shape than the settings say.
    WrongShape,
    /// A value has another type than expected.
    WrongType,
    /// An object names the same key twice.
    DuplicateKey,
    /// A message has a role that nobody knows.
    UnknownRole,
    /// There is no user text at all.
    EmptyPrompt,
    /// An answer is empty: there is nothing to learn.
    EmptyAnswer,
    /// The conversation has no assistant message.
    NoAnswer,
    /// The chat template refused the conversation or can't be rendered.
    TemplateFailed,
    /// The text before an answer is not what the model would see when it generates that answer.
    MaskUnproved,
    /// The template leaves out the thinking of the answers, and nothing else is to be learned.
    ThinkingDropped,
    /// The record spells a control token, and `control_tokens` says to leave such records out, or the text can't be kept
    /// from becoming one.
    ControlText,
    /// The sample has more tokens than `sequence_length`.
    TooLong,
    /// No token of the sample would be trained on.
    NoLabelTokens,
    /// The tokenizer failed on a text.
    EncodeFailed,
    /// The same samples came from a record before it.
    Duplicate,
    /// Nothing is left to make a dataset of.
    NoRecords,
    /// A chat template that can't be compiled or rendered faithfully.
    Template,
    /// A tokenizer that is missing or can't be loaded.
    Tokenizer,
    /// An argument or a configuration value is wrong.
    Argument,
    /// A dataset on disk is damaged, foreign or of another version.
    Dataset,
    /// The operating system refused to read or write.
    Io,
    /// The caller asked to stop.
    Interrupted,
}

/// The family of an [`ErrorKind`]: decides the Python class and the exit status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorClass {
    /// A record is wrong; the run may leave it out and go on.
    Input,
    /// See [`ErrorKind::Template`].
    Template,
    /// See [`ErrorKind::Tokenizer`].
    Tokenizer,
    /// See [`ErrorKind::Argument`].
    Argument,
    /// See [`ErrorKind::Dataset`].
    Dataset,
    /// See [`ErrorKind::Io`].
    File,
    /// See [`ErrorKind::Interrupted`].
    Interrupted,
}

impl ErrorKind {
    /// Why records are left out by a policy, though nothing is wrong with them.
    pub const LEFT_OUT: [Self; 4] = [Self::ControlText, Self::TooLong, Self::NoLabelTokens, Self::Duplicate];

    /// The stable name of the kind, as written to `rejected.jsonl` and counted in the manifest.
    pub fn code(self) -> &'static str {
        match self {
            Self::InvalidUtf8 => "invalid_utf8",
            Self::InvalidJson => "invalid_json",
            Self::RecordTooLarge => "record_too_large",
            Self::MissingKey => "missing_key",
            Self::WrongShape => "wrong_shape",
            Self::WrongType => "wrong_type",
            Self::DuplicateKey => "duplicate_key",
            Self::UnknownRole => "unknown_role",
            Self::EmptyPrompt => "empty_prompt",
            Self::EmptyAnswer => "empty_answer",
            Self::NoAnswer => "no_answer",
            Self::TemplateFailed => "template_failed",
            Self::MaskUnproved => "mask_unproved",
            Self::ControlText => "control_text",
            Self::ThinkingDropped => "thinking_dropped",
            Self::TooLong => "too_long",
            Self::NoLabelTokens => "no_label_tokens",
            Self::Duplicate => "duplicate",
            Self::EncodeFailed => "encode_failed",
            Self::NoRecords => "no_records",
            Self::Template => "template",
            Self::Tokenizer => "tokenizer",
            Self::Argument => "config",
            Self::Dataset => "dataset",
            Self::Io => "file",
            Self::Interrupted => "interrupted",
        }
    }

    /// The family the kind belongs to.
    pub fn class(self) -> ErrorClass {
        match self {
            Self::Template => ErrorClass::Template,
            Self::Tokenizer => ErrorClass::Tokenizer,
            Self::Argument => ErrorClass::Argument,
            Self::Dataset => ErrorClass::Dataset,
            Self::Io => ErrorClass::File,
            Self::Interrupted => ErrorClass::Interrupted,
            _ => ErrorClass::Input,
        }
    }
}

/// A place in a file. Lines and columns count from 1; a column counts Unicode characters, as Python's `json` does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// Line, from 1.
    pub line: u64,
    /// Character in the line, from 1.
    pub column: u64,
}

impl Position {
    /// The place of byte `offset` of `bytes`, taking `bytes` for the start of a file.
    ///
    /// A byte that does not begin a UTF-8 character belongs to the column of the character before it.
    pub fn find(bytes: &[u8], offset: usize) -> Self {
        Self { line: 1, column: 1 }.after(&bytes[..offset.min(bytes.len())])
    }

    /// The place of the byte behind `bytes`, the first of which is here.
    pub fn after(self, bytes: &[u8]) -> Self {
        let num_characters = |bytes: &[u8]| bytes.iter().filter(|&&byte| byte & 0xC0 != 0x80).count() as u64;
        match memchr::memrchr(b'\n', bytes) {
            None => Self { line: self.line, column: self.column + num_characters(bytes) },
            Some(newline) => Self {
                line: self.line + memchr::memchr_iter(b'\n', bytes).count() as u64,
                column: 1 + num_characters(&bytes[newline + 1..]),
            },
        }
    }
}

/// An error with everything its reader needs; see [`Error::new`] and the `with_…` and `at_…` methods.
#[derive(Debug, Serialize, Deserialize)]
pub struct Error(Box<Repr>);

#[derive(Debug, Serialize, Deserialize)]
struct Repr {
    kind: ErrorKind,
    message: String,
    path: Option<PathBuf>,
    position: Option<Position>,
    /// Byte offset in the record while the position is not known yet.
    offset: Option<usize>,
    location: Option<String>,
    hint: Option<String>,
}

/// `Result` with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An error of `kind`; `message` is a sentence without a full stop that says what was expected and what was found.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self(Box::new(Repr {
            kind,
            message: readable(message.into()),
            path: None,
            position: None,
            offset: None,
            location: None,
            hint: None,
        }))
    }

    /// A failed system call on `path`; `doing` completes "could not …".
    pub fn io(doing: &str, path: &Path, error: &std::io::Error) -> Self {
        Self::new(ErrorKind::Io, format!("could not {doing}: {error}")).with_path(path)
    }

    /// Says what the reader can do.
    pub fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.0.hint = Some(hint.into());
        self
    }

    /// Names the file, unless one is named already.
    pub fn with_path(mut self, path: &Path) -> Self {
        self.0.path.get_or_insert_with(|| path.to_path_buf());
        self
    }

    /// Gives the place in the file.
    pub fn with_position(mut self, position: Position) -> Self {
        self.0.position = Some(position);
        self
    }

    /// Gives the byte offset in the record; whoever knows the file turns it into a [`Position`].
    pub fn at_offset(mut self, offset: usize) -> Self {
        self.0.offset.get_or_insert(offset);
        self
    }

    /// Gives the place inside the value, such as `messages[3].role`.
    pub fn at_location(mut self, location: impl Into<String>) -> Self {
        self.0.location.get_or_insert_with(|| readable(location.into()));
        self
    }

    /// Puts the place inside the value into that of a larger value, such as `conversations[7]`.
    pub fn inside(mut self, outer: &str) -> Self {
        let inner = self.0.location.take().map(|location| format!(".{location}")).unwrap_or_default();
        self.0.location = Some(format!("{outer}{inner}"));
        self
    }

    /// What kind of thing went wrong.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// The bare sentence, without place and hint.
    pub fn message(&self) -> &str {
        &self.0.message
    }

    /// The file, where there is one.
    pub fn path(&self) -> Option<&Path> {
        self.0.path.as_deref()
    }

    /// The place in the file, where there is one.
    pub fn position(&self) -> Option<Position> {
        self.0.position
    }

    /// The byte offset in the record, where there is one.
    pub fn offset(&self) -> Option<usize> {
        self.0.offset
    }

    /// The place inside the value, where there is one.
    pub fn location(&self) -> Option<&str> {
        self.0.location.as_deref()
    }

    /// What the reader can do, where we know.
    pub fn hint(&self) -> Option<&str> {
        self.0.hint.as_deref()
    }
}

/// A text that may quote a record, fit to be shown: one line, not too long, and nothing that a terminal obeys.
fn readable(text: String) -> String {
    const MAX_CHARACTERS: usize = 500;
    if text.len() <= MAX_CHARACTERS && !text.contains(char::is_control) {
        return text;
    }
    let mut shown = String::new();
    for character in text.chars().take(MAX_CHARACTERS) {
        match character.is_control() {
            true => shown.extend(character.escape_default()),
            false => shown.push(character),
        }
    }
    if text.chars().nth(MAX_CHARACTERS).is_some() {
        shown.push('…');
    }
    shown
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Repr { message, path, position, location, hint, .. } = &*self.0;
        if let Some(path) = path {
            write!(f, "{}:", path.display())?;
            if let Some(position) = position {
                write!(f, "{}:{}:", position.line, position.column)?;
            }
            write!(f, " ")?;
        }
        write!(f, "{message}")?;
        if let Some(location) = location {
            write!(f, " (at {location})")?;
        }
        if let Some(hint) = hint {
            write!(f, "\n  {hint}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {}

#[cfg(test)]
mod tests {
    use super::*;

    // A position counts lines and characters from 1, and never panics past the end.
    #[test]
    fn position_counts_characters() {
        let bytes = "é{\n\"ü\": x".as_bytes();

        assert_eq!(Position { line: 1, column: 1 }, Position::find(bytes, 0));
        assert_eq!(Position { line: 1, column: 2 }, Position::find(bytes, 2));
        assert_eq!(Position { line: 2, column: 6 }, Position::find(bytes, bytes.len() - 1));
        assert_eq!(Position { line: 2, column: 7 }, Position::find(bytes, 1000));
        for cut in 0..bytes.len() {
            assert_eq!(Position::find(bytes, 1000), Position::find(bytes, cut).after(&bytes[cut..]));
        }
    }

    // What an error quotes from a record is on one line, bounded, and without control characters.
    #[test]
    fn quotes_are_readable() {
        let message = |text: &str| Error::new(ErrorKind::UnknownRole, text).message().to_owned();
        assert_eq!("found 'ü 漢字'", message("found 'ü 漢字'"));
        assert_eq!(r"found '\u{1b}[2J\n\u{9b}\u{0}'", message("found '\u{1b}[2J\n\u{9b}\0'"));
        assert_eq!("漢".repeat(500), message(&"漢".repeat(500)));
        assert_eq!("漢".repeat(500) + "…", message(&"漢".repeat(1 << 20)));
        let located = Error::new(ErrorKind::DuplicateKey, "x").at_location("a".repeat(1 << 20));
        assert_eq!(Some(501), located.location().map(|location| location.chars().count()));
    }

    // An error prints as path:line:column, the sentence, the place in the value and the hint.
    #[test]
    fn display_has_every_part() {
        let error = Error::new(ErrorKind::WrongType, "expected a string, found null")
            .with_path(Path::new("a.jsonl"))
            .with_position(Position { line: 3, column: 9 })
            .at_location("messages[1].content")
            .with_hint("write a text");

        assert_eq!(
            "a.jsonl:3:9: expected a string, found null (at messages[1].content)\n  write a text",
            error.to_string()
        );
        assert_eq!("wrong_type", error.kind().code());
        assert_eq!(ErrorClass::Input, error.kind().class());
    }
}
