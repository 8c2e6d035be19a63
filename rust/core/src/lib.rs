//! sft-fast-core: from raw conversations to packed training tokens.
//!
//! The way of the data is the order of the modules:
//! records ([`source`]) → conversations ([`conversation`]) → text and spans ([`template`]) → samples ([`tokenize`],
//! [`sample`]) → shards and manifest ([`shard`], [`manifest`]) → packs ([`pack`]) → steps ([`plan`]) → batches ([`batch`]).
//! [`preprocess`] drives the first half on all cores. No Python, no torch, no global state.

pub mod conversation;
pub mod error;
pub mod json;

pub use error::{Error, ErrorClass, ErrorKind, Position, Result};
