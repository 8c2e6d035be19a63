//! sft-fast-core: from raw conversations to packed training tokens.
//!
//! The way of the data is the order of the modules:
//! records ([`source`]) → conversations ([`conversation`]) → text and spans ([`template`]) → samples ([`tokenize`],
//! [`sample`]) → shards and manifest ([`shard`], [`manifest`]) → packs ([`pack`]) → steps ([`plan`]) → batches ([`batch`]).
//! [`preprocess`] drives the first half on all cores; [`assemble`] takes samples made elsewhere. No Python, no torch, no global state.

pub mod assemble;
pub mod batch;
pub mod conversation;
pub mod dataset;
pub mod error;
pub mod hash;
pub mod json;
pub mod listing;
pub mod manifest;
pub mod mix;
pub mod model;
pub mod pack;
pub mod plan;
pub mod preprocess;
mod random;
pub mod sample;
pub mod sampler;
pub mod shard;
pub mod source;
pub mod staging;
pub mod survey;
pub mod template;
pub mod tokenize;

pub use error::{Error, ErrorClass, ErrorKind, Position, Result};
