//! Byte-pair merges: from the bytes of one pretoken to its token ids.
//!
//! Byte-level BPE (Sennrich et al. 2016; Radford et al. 2019): a pretoken starts as its bytes, and as long as some neighbouring
//! pair of tokens has a merge, the pair whose merge has the lowest rank (of equal ones, the leftmost) becomes one token.
//!
//! Pretokens are short, so their symbols live in two small arrays, ids and the rank of each pair, and the lowest rank is found by
//! looking at all of them. Long pretokens (runs of letters without a space, minified code) take a heap, so that time stays
//! n log n. Ranks come from an open-addressing table of eight bytes an entry, those of two single bytes from a dense table. Most
//! pairs have no merge: a bit filter small enough for the second-level cache answers for nearly all of these.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// No merge.
const NONE: u32 = u32::MAX;
/// In the place of the id of a byte: the model has no token for the byte, which is left out.
pub const LEFT_OUT: u32 = u32::MAX;
/// Ids take 21 bits and ranks 22, so that a pair and its rank fit into 64 bits.
const ID_BITS: u32 = 21;
const RANK_BITS: u32 = 22;
const EMPTY: u64 = u64::MAX;
/// Up to this many bytes the arrays are used, beyond it the heap.
const SHORT: usize = 1 << PLACE_BITS;
const PLACE_BITS: u32 = 6;

/// The merges of a model.
pub struct Merges {
    id_of_byte: [u32; 256],
    /// Rank of the merge of two single bytes.
    byte_pairs: Box<[u32]>,
    /// `left << 43 | right << 22 | rank`.
    slots: Box<[u64]>,
    shift: u32,
    /// Bits, by hash, of the pairs that have a merge.
    filter: Box<[u64]>,
    filter_shift: u32,
    ids: IdsOfRanks,
    leaves_out: bool,
}

/// The ids of the tokens that merges make.
enum IdsOfRanks {
    /// They follow the ranks, as most vocabularies list them: this is what to add. Nothing has to be fetched for it.
    Following(u32),
    /// By rank.
    Listed(Box<[u32]>),
}

/// Memory that merging needs, kept between calls.
#[derive(Default)]
pub struct Workspace {
    kept: Vec<u8>,
    symbols: Vec<Symbol>,
    heap: BinaryHeap<Reverse<(u32, u32, u32)>>,
}

struct Symbol {
    id: u32,
    /// Number of bytes; 0 once merged into the symbol before it.
    len: u32,
    previous: u32,
}

impl Merges {
    /// `merges` are (left id, right id, id of the two together) by rank.
    ///
    /// # Errors
    /// An id or rank is too large for the packed table.
    pub fn new(id_of_byte: [u32; 256], merges: &[(u32, u32, u32)]) -> Result<Self, String> {
        if merges.len() >= 1 << RANK_BITS || merges.iter().any(|(a, b, c)| (a | b | c) >> ID_BITS != 0) {
            return Err(format!(
                "model: {} merges or an id of {ID_BITS} bits are more than the packed table holds",
                merges.len()
            ));
        }
        let num_slots = (merges.len() * 3 / 2).next_power_of_two().max(2);
        let num_filter_bits = (merges.len() * 4).next_power_of_two().max(64);
        let mut table = Self {
            id_of_byte,
            byte_pairs: Box::default(),
            slots: vec![EMPTY; num_slots].into(),
            shift: 64 - num_slots.trailing_zeros(),
            filter: vec![0; num_filter_bits / 64].into(),
            filter_shift: 64 - num_filter_bits.trailing_zeros(),
            ids: match merges.first() {
                Some(first) if (first.2..).zip(merges).all(|(id, merge)| id == merge.2) => {
                    IdsOfRanks::Following(first.2)
                }
                _ => IdsOfRanks::Listed(merges.iter().map(|merge| merge.2).collect()),
            },
            leaves_out: (0..=255).any(|byte| can_occur(byte) && id_of_byte[byte as usize] == LEFT_OUT),
        };
        for (rank, (left, right, _)) in merges.iter().enumerate() {
            let pair = pair(*left, *right);
            let hash = hash(pair);
            let bit = hash >> table.filter_shift;
            table.filter[bit as usize / 64] |= 1 << (bit % 64);
            let mut slot = (hash >> table.shift) as usize;
            // A pair listed twice has its last rank, as in the hash map that the reference fills.
            while table.slots[slot] != EMPTY && table.slots[slot] >> RANK_BITS != pair {
                slot = (slot + 1) & (num_slots - 1);
            }
            table.slots[slot] = pair << RANK_BITS | rank as u64;
        }
        let pair_of = |at: usize| (id_of_byte[at >> 8], id_of_byte[at & 255]);
        let byte_pairs =
            (0..1 << 16).map(pair_of).map(|(a, b)| if a.max(b) == LEFT_OUT { NONE } else { table.rank(a, b) });
        table.byte_pairs = byte_pairs.collect();
        Ok(table)
    }

    /// The rank of the merge of two tokens, or `NONE`.
    #[inline]
    fn rank(&self, left: u32, right: u32) -> u32 {
        let pair = pair(left, right);
        let hash = hash(pair);
        let bit = hash >> self.filter_shift;
        if self.filter[bit as usize / 64] >> (bit % 64) & 1 == 0 {
            return NONE;
        }
        let mut slot = (hash >> self.shift) as usize;
        loop {
            let entry = self.slots[slot];
            if entry >> RANK_BITS == pair {
                return entry as u32 & ((1 << RANK_BITS) - 1);
            }
            if entry == EMPTY {
                return NONE;
            }
            slot = (slot + 1) & (self.slots.len() - 1);
        }
    }

    fn byte_pair_rank(&self, left: u8, right: u8) -> u32 {
        self.byte_pairs[(left as usize) << 8 | right as usize]
    }

    /// The id of the two tokens of a merge together.
    #[inline]
    fn id_of_rank(&self, rank: u32) -> u32 {
        match &self.ids {
            IdsOfRanks::Following(first) => first + rank,
            IdsOfRanks::Listed(ids) => ids[rank as usize],
        }
    }

    /// Whether some byte of a text may have no token.
    pub fn leaves_out(&self) -> bool {
        self.leaves_out
    }

    /// Whether a byte becomes (part of) a token.
    pub fn keeps(&self, byte: u8) -> bool {
        self.id_of_byte[byte as usize] != LEFT_OUT
    }

    /// Appends the tokens of one pretoken to `out`.
    pub fn encode(&self, pretoken: &[u8], work: &mut Workspace, out: &mut Vec<u32>) {
        if self.leaves_out && pretoken.iter().any(|byte| !self.keeps(*byte)) {
            let mut kept = std::mem::take(&mut work.kept);
            kept.clear();
            kept.extend(pretoken.iter().copied().filter(|byte| self.keeps(*byte)));
            self.encode_kept(&kept, work, out);
            work.kept = kept;
        } else {
            self.encode_kept(pretoken, work, out);
        }
    }

    fn encode_kept(&self, pretoken: &[u8], work: &mut Workspace, out: &mut Vec<u32>) {
        match pretoken {
            [] => {}
            [byte] => out.push(self.id_of_byte[*byte as usize]),
            _ if pretoken.len() <= 16 => self.encode_short::<16>(pretoken, out),
            _ if pretoken.len() <= SHORT => self.encode_short::<SHORT>(pretoken, out),
            _ => self.encode_long(pretoken, work, out),
        }
    }

    /// At most `N` (64 or less) bytes. A symbol stands at the place of its first byte; `alive` has a bit for each.
    fn encode_short<const N: usize>(&self, pretoken: &[u8], out: &mut Vec<u32>) {
        let num = pretoken.len();
        let mut ids = [0; N];
        // For the pair of each symbol and the next: rank and place in one number.
        let mut keys = [NONE; N];
        let mut alive = u64::MAX >> (64 - num);
        for (id, byte) in ids.iter_mut().zip(pretoken) {
            *id = self.id_of_byte[*byte as usize];
        }
        for (i, two) in pretoken.windows(2).enumerate() {
            keys[i] = key(self.byte_pair_rank(two[0], two[1]), i);
        }
        loop {
            let lowest = keys[..num - 1].iter().copied().fold(NONE, u32::min);
            if lowest == NONE {
                break;
            }
            let i = lowest as usize % N;
            let right = i + 1 + (alive >> (i + 1)).trailing_zeros() as usize;
            ids[i] = self.id_of_rank(lowest >> PLACE_BITS);
            keys[i] = NONE;
            keys[right] = NONE;
            alive &= !(1 << right);
            let after = alive >> right;
            if after != 0 {
                let next = right + after.trailing_zeros() as usize;
                keys[i] = key(self.rank(ids[i], ids[next]), i);
            }
            let before = alive & ((1 << i) - 1);
            if before != 0 {
                let previous = 63 - before.leading_zeros() as usize;
                keys[previous] = key(self.rank(ids[previous], ids[i]), previous);
            }
        }
        while alive != 0 {
            out.push(ids[alive.trailing_zeros() as usize]);
            alive &= alive - 1;
        }
    }

    fn encode_long(&self, pretoken: &[u8], work: &mut Workspace, out: &mut Vec<u32>) {
        let Workspace { symbols, heap, .. } = work;
        symbols.clear();
        heap.clear();
        for (i, byte) in pretoken.iter().enumerate() {
            symbols.push(Symbol { id: self.id_of_byte[*byte as usize], len: 1, previous: (i as u32).wrapping_sub(1) });
        }
        // An entry is (rank, left symbol, length of both): the length tells whether the pair is still the one that was entered.
        heap.extend(pretoken.windows(2).enumerate().filter_map(|(i, two)| {
            let rank = self.byte_pair_rank(two[0], two[1]);
            (rank != NONE).then_some(Reverse((rank, i as u32, 2)))
        }));
        while let Some(Reverse((rank, left, len))) = heap.pop() {
            let left = left as usize;
            let left_len = symbols[left].len;
            let right = left + left_len as usize;
            if left_len == 0 || right >= symbols.len() || left_len + symbols[right].len != len {
                continue;
            }
            symbols[left].id = self.id_of_rank(rank);
            symbols[left].len = len;
            symbols[right].len = 0;
            let next = left + len as usize;
            if next < symbols.len() {
                symbols[next].previous = left as u32;
                let rank = self.rank(symbols[left].id, symbols[next].id);
                if rank != NONE {
                    heap.push(Reverse((rank, left as u32, len + symbols[next].len)));
                }
            }
            if left > 0 {
                let previous = symbols[left].previous as usize;
                let rank = self.rank(symbols[previous].id, symbols[left].id);
                if rank != NONE {
                    heap.push(Reverse((rank, previous as u32, symbols[previous].len + len)));
                }
            }
        }
        out.extend(symbols.iter().filter(|symbol| symbol.len != 0).map(|symbol| symbol.id));
    }
}

/// Orders pairs by rank, then by place.
fn key(rank: u32, place: usize) -> u32 {
    if rank == NONE { NONE } else { rank << PLACE_BITS | place as u32 }
}

/// Whether UTF-8 has the byte.
pub fn can_occur(byte: u8) -> bool {
    !matches!(byte, 0xc0 | 0xc1 | 0xf5..)
}

fn pair(left: u32, right: u32) -> u64 {
    (left as u64) << ID_BITS | right as u64
}

fn hash(pair: u64) -> u64 {
    pair.wrapping_mul(0x9e37_79b9_7f4a_7c15)
}
