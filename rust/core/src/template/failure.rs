//! Why a template is refused when it is loaded, and why one rendering stops.

/// A template that can't be rendered faithfully: where and why.
#[derive(Debug, PartialEq)]
pub(super) struct Refusal {
    /// Line of the template, from 1.
    pub line: u32,
    /// A sentence without a full stop.
    pub reason: String,
}

/// Shorthand for a failed result.
pub(super) fn refuse<T>(line: u32, reason: impl Into<String>) -> Result<T, Refusal> {
    Err(Refusal { line, reason: reason.into() })
}

/// Why a rendering stopped.
#[derive(Debug)]
pub(super) enum Cause {
    /// The template called `raise_exception` with this message.
    Raised(String),
    /// An operation that Python refuses too, or that we don't know to be the same.
    Impossible(String),
}

/// A stopped rendering; small, because every evaluation may return one.
#[derive(Debug)]
pub(super) struct Failure(Box<(Cause, u32)>);

/// What evaluations return.
pub(super) type Eval<T> = Result<T, Failure>;

impl Failure {
    /// A failure whose line is not known yet.
    pub fn new(cause: Cause) -> Self {
        Self(Box::new((cause, 0)))
    }

    /// Gives the line, unless an inner statement gave its own.
    pub fn at_line(mut self, line: u32) -> Self {
        if self.0.1 == 0 {
            self.0.1 = line;
        }
        self
    }

    pub fn cause(&self) -> &Cause {
        &self.0.0
    }

    /// Line of the template; 0 where none is known.
    pub fn line(&self) -> u32 {
        self.0.1
    }
}

/// Shorthand for an operation that can't be done.
pub(super) fn impossible<T>(message: impl Into<String>) -> Eval<T> {
    Err(Failure::new(Cause::Impossible(message.into())))
}
