//! What older datasets know already: samples of segments that stand in the input again.
//!
//! Every dataset lists the segments of its input with the hash of their bytes. By the same recipe the same bytes give the same
//! samples, so these are copied instead of made again. A segment is listed only if each of its records became a sample and
//! there is nothing else to report of it; and nothing is copied from a shard whose checksum is wrong.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use super::Place;
use crate::conversation::ShapeCounts;
use crate::dataset::{Dataset, Sample};
use crate::manifest::{MANIFEST_NAME, Manifest, Recipe};

/// How many datasets of a cache are looked into, the newest first.
const MAX_DATASETS: usize = 4;

/// The segments of older datasets.
#[derive(Default)]
pub struct Reuse {
    datasets: Vec<Known>,
    segments: HashMap<blake3::Hash, Samples>,
}

struct Known {
    dataset: Dataset,
    /// Whether the checksum of each shard is right, once somebody asked.
    is_whole: Vec<OnceLock<bool>>,
}

/// The samples of one segment.
#[derive(Clone, Copy)]
struct Samples {
    dataset: usize,
    first: usize,
    num: usize,
    shapes: ShapeCounts,
}

impl Reuse {
    /// Looks for datasets of the same recipe: the one that is to be replaced, or those in the same cache. One that can't be
    /// read is passed over.
    pub fn find(place: &Place, recipe: &Recipe) -> Self {
        let mut reuse = Self::default();
        // Told by the manifest alone: a cache may be full of others, and opening reads all their offsets.
        let is_alike = |directory: &PathBuf| Manifest::read(directory).is_ok_and(|manifest| manifest.recipe == *recipe);
        for directory in candidates(place).into_iter().filter(is_alike) {
            if reuse.datasets.len() == MAX_DATASETS {
                break;
            }
            let Ok(dataset) = Dataset::open(&directory) else { continue };
            let Ok(segments) = dataset.segments() else { continue };
            let mut first = 0;
            for segment in segments {
                let num = segment.num_samples as usize;
                let hash = segment.blake3.and_then(|hash| blake3::Hash::from_hex(hash).ok());
                let shapes = segment.shapes.and_then(|shapes| ShapeCounts::from_map(&shapes));
                if let (Some(hash), Some(shapes)) = (hash, shapes) {
                    reuse.segments.insert(hash, Samples { dataset: reuse.datasets.len(), first, num, shapes });
                }
                first += num;
            }
            let is_whole = vec![OnceLock::new(); dataset.manifest().shards.len()];
            reuse.datasets.push(Known { dataset, is_whole });
        }
        reuse
    }

    /// The shapes and samples of a segment of `num_records` records, if an older dataset has them.
    pub fn samples(
        &self,
        segment: &blake3::Hash,
        num_records: usize,
    ) -> Option<(ShapeCounts, impl Iterator<Item = Sample<'_>>)> {
        let Samples { dataset, first, num, shapes } = *self.segments.get(segment)?;
        let known = &self.datasets[dataset];
        let is_whole = |shard: usize| *known.is_whole[shard].get_or_init(|| known.dataset.verify_shard(shard).is_ok());
        let is_there = num == num_records && num > 0 && shapes.total() == num as u64;
        (is_there && known.dataset.shards_of(first..first + num).all(is_whole))
            .then(|| (shapes, (first..first + num).map(|number| known.dataset.sample(number))))
    }
}

/// Directories that may hold a dataset of use.
fn candidates(place: &Place) -> Vec<PathBuf> {
    let cache = match place {
        Place::Directory { path, .. } => return vec![path.clone()],
        Place::Cache(path) => path,
    };
    let modified = |directory: &Path| directory.join(MANIFEST_NAME).metadata().and_then(|file| file.modified()).ok();
    let entries = std::fs::read_dir(cache).into_iter().flatten().flatten();
    let mut found: Vec<_> = entries.filter_map(|entry| Some((modified(&entry.path())?, entry.path()))).collect();
    found.sort();
    found.into_iter().rev().map(|(_, path)| path).collect()
}
