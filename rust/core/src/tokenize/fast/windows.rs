//! Pre-tokenising ASCII: the pretokens of 64 bytes at once, by arithmetic on bit masks.
//!
//! A window is 64 bytes that begin where a pretoken begins. Each character class becomes a mask, bit `i` for byte `i`, and shifts,
//! ands and additions of the masks say where pretokens start: what the matchers of [`super::pretokenize`] decide character by
//! character. A window knows only its own bytes, up to the first that is not ASCII; of the starts it finds, those that do not
//! depend on what follows are *sure*. The last of them is where the next window begins, so nothing is carried from one to the next.
//!
//! Masks are made with AVX-512, AVX2 or NEON where the CPU has it, else byte by byte; all ways give the same masks, and a test
//! says so.

/// What a window needs to know of a tokenizer family.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Shape {
    /// A character leads a word; contractions; digits in groups of at most `max_digits` (1 or 3).
    Cl100k { max_digits: u32 },
    /// The same; words also start at a capital after a small letter; contractions end words.
    O200k,
    /// The same without contractions; before a digit the text seems to end.
    DeepSeek3,
    /// Only a space leads; if digits stand apart, before one the text seems to end.
    Gpt2 { digits_apart: bool },
}

/// Bytes of a window, by class.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Masks {
    letter: u64,
    upper: u64,
    digit: u64,
    /// `\s`
    space: u64,
    newline: u64,
    blank: u64,
    apostrophe: u64,
    slash: u64,
    /// Controls that are not whitespace.
    control: u64,
    not_ascii: u64,
}

/// How masks are made on this CPU.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Level {
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "aarch64")]
    Neon,
    Plain,
}

impl Level {
    /// The best that this CPU can do.
    pub fn detect() -> Self {
        *Self::all().first().expect("plain is always there")
    }

    /// The instruction set, for people.
    pub fn name(self) -> &'static str {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => "avx512",
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => "avx2",
            #[cfg(target_arch = "aarch64")]
            Self::Neon => "neon",
            Self::Plain => "plain",
        }
    }

    /// All that this CPU can do, the best first.
    pub fn all() -> Vec<Self> {
        let mut levels = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("bmi2")
                && is_x86_feature_detected!("lzcnt")
            {
                levels.push(Self::Avx512);
            }
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("bmi2") && is_x86_feature_detected!("lzcnt")
            {
                levels.push(Self::Avx2);
            }
        }
        #[cfg(target_arch = "aarch64")]
        if std::arch::is_aarch64_feature_detected!("neon") {
            levels.push(Self::Neon);
        }
        levels.push(Self::Plain);
        levels
    }

    /// The sure starts among the first `len` bytes of a window (1 to 64); bit 0 is always one.
    #[inline]
    pub fn starts(self, window: &[u8; 64], len: usize, shape: Shape) -> u64 {
        match self {
            // SAFETY: `detect` and `all` give this level only if the CPU has the features.
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => unsafe { x86::starts_avx512(window, len, shape) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => unsafe { x86::starts_avx2(window, len, shape) },
            // SAFETY: as above.
            #[cfg(target_arch = "aarch64")]
            Self::Neon => unsafe { arm::starts_neon(window, len, shape) },
            Self::Plain => starts(&plain_masks(window), window, len, shape),
        }
    }
}

fn plain_masks(window: &[u8; 64]) -> Masks {
    let mut masks = Masks::default();
    for (i, byte) in window.iter().enumerate() {
        let mask = match byte {
            b'a'..=b'z' => &mut masks.letter,
            b'A'..=b'Z' => {
                masks.upper |= 1 << i;
                &mut masks.letter
            }
            b'0'..=b'9' => &mut masks.digit,
            b'\n' | b'\r' => {
                masks.newline |= 1 << i;
                &mut masks.space
            }
            b' ' => {
                masks.blank |= 1 << i;
                &mut masks.space
            }
            b'\t' | 0x0b | 0x0c => &mut masks.space,
            b'\'' => &mut masks.apostrophe,
            b'/' => &mut masks.slash,
            0..0x20 | 0x7f => &mut masks.control,
            0x80.. => &mut masks.not_ascii,
            _ => continue,
        };
        *mask |= 1 << i;
    }
    masks
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Masks, Shape, starts};
    use std::arch::x86_64::*;

    #[target_feature(enable = "avx512f,avx512bw,bmi1,bmi2,lzcnt,popcnt")]
    pub fn starts_avx512(window: &[u8; 64], len: usize, shape: Shape) -> u64 {
        starts(&masks_avx512(window), window, len, shape)
    }

    #[target_feature(enable = "avx2,bmi1,bmi2,lzcnt,popcnt")]
    pub fn starts_avx2(window: &[u8; 64], len: usize, shape: Shape) -> u64 {
        starts(&masks_avx2(window), window, len, shape)
    }

    #[target_feature(enable = "avx512f,avx512bw")]
    pub fn masks_avx512(window: &[u8; 64]) -> Masks {
        // SAFETY: the array has the 64 bytes that are read.
        let bytes = unsafe { _mm512_loadu_si512(window.as_ptr().cast()) };
        let is = |byte: u8| _mm512_cmpeq_epi8_mask(bytes, _mm512_set1_epi8(byte as i8));
        let within = |bytes: __m512i, first: u8, last: u8| {
            let offset = _mm512_sub_epi8(bytes, _mm512_set1_epi8(first as i8));
            _mm512_cmple_epu8_mask(offset, _mm512_set1_epi8((last - first) as i8))
        };
        let small = _mm512_or_si512(bytes, _mm512_set1_epi8(0x20));
        let blank = is(b' ');
        let space = blank | within(bytes, b'\t', b'\r');
        Masks {
            letter: within(small, b'a', b'z'),
            upper: within(bytes, b'A', b'Z'),
            digit: within(bytes, b'0', b'9'),
            space,
            newline: is(b'\n') | is(b'\r'),
            blank,
            apostrophe: is(b'\''),
            slash: is(b'/'),
            control: (within(bytes, 0, 0x1f) | is(0x7f)) & !space,
            not_ascii: _mm512_movepi8_mask(bytes),
        }
    }

    #[target_feature(enable = "avx2")]
    pub fn masks_avx2(window: &[u8; 64]) -> Masks {
        let mut all = Masks::default();
        for half in 0..2 {
            // SAFETY: the array has 64 bytes, of which 32 are read from 0 or 32 on.
            let bytes = unsafe { _mm256_loadu_si256(window.as_ptr().add(32 * half).cast()) };
            let mask = |found: __m256i| (_mm256_movemask_epi8(found) as u32 as u64) << (32 * half);
            let is = |byte: u8| mask(_mm256_cmpeq_epi8(bytes, _mm256_set1_epi8(byte as i8)));
            let within = |bytes: __m256i, first: u8, last: u8| {
                let offset = _mm256_sub_epi8(bytes, _mm256_set1_epi8(first as i8));
                mask(_mm256_cmpeq_epi8(_mm256_min_epu8(offset, _mm256_set1_epi8((last - first) as i8)), offset))
            };
            let small = _mm256_or_si256(bytes, _mm256_set1_epi8(0x20));
            let blank = is(b' ');
            let space = blank | within(bytes, b'\t', b'\r');
            all.letter |= within(small, b'a', b'z');
            all.upper |= within(bytes, b'A', b'Z');
            all.digit |= within(bytes, b'0', b'9');
            all.space |= space;
            all.newline |= is(b'\n') | is(b'\r');
            all.blank |= blank;
            all.apostrophe |= is(b'\'');
            all.slash |= is(b'/');
            all.control |= (within(bytes, 0, 0x1f) | is(0x7f)) & !space;
            all.not_ascii |= mask(bytes);
        }
        all
    }
}

#[cfg(target_arch = "aarch64")]
mod arm {
    use super::{Masks, Shape, starts};
    use std::arch::aarch64::*;

    #[target_feature(enable = "neon")]
    pub fn starts_neon(window: &[u8; 64], len: usize, shape: Shape) -> u64 {
        starts(&masks_neon(window), window, len, shape)
    }

    #[target_feature(enable = "neon")]
    pub fn masks_neon(window: &[u8; 64]) -> Masks {
        // SAFETY: the array has 64 bytes, of which 16 are read from 0, 16, 32 and 48 on.
        let bytes: [uint8x16_t; 4] = std::array::from_fn(|i| unsafe { vld1q_u8(window.as_ptr().add(16 * i)) });
        // A bit for each of the eight bytes of a half vector; neighbours are added until a byte holds eight bits.
        let bits = vcombine_u8(vcreate_u8(0x8040_2010_0804_0201), vcreate_u8(0x8040_2010_0804_0201));
        let mask = |found: [uint8x16_t; 4]| {
            let [a, b, c, d] = found.map(|found| vandq_u8(found, bits));
            let sums = vpaddq_u8(vpaddq_u8(a, b), vpaddq_u8(c, d));
            vgetq_lane_u64::<0>(vreinterpretq_u64_u8(vpaddq_u8(sums, sums)))
        };
        let is = |byte: u8| mask(bytes.map(|bytes| vceqq_u8(bytes, vdupq_n_u8(byte))));
        let within = |bytes: [uint8x16_t; 4], first: u8, last: u8| {
            mask(bytes.map(|bytes| vcleq_u8(vsubq_u8(bytes, vdupq_n_u8(first)), vdupq_n_u8(last - first))))
        };
        let small = bytes.map(|bytes| vorrq_u8(bytes, vdupq_n_u8(0x20)));
        let blank = is(b' ');
        let space = blank | within(bytes, b'\t', b'\r');
        Masks {
            letter: within(small, b'a', b'z'),
            upper: within(bytes, b'A', b'Z'),
            digit: within(bytes, b'0', b'9'),
            space,
            newline: is(b'\n') | is(b'\r'),
            blank,
            apostrophe: is(b'\''),
            slash: is(b'/'),
            control: (within(bytes, 0, 0x1f) | is(0x7f)) & !space,
            not_ascii: within(bytes, 0x80, 0xff),
        }
    }
}

/// The lowest `num` bits (0 to 64).
#[inline(always)]
fn low(num: u32) -> u64 {
    if num >= 64 { u64::MAX } else { (1 << num) - 1 }
}

/// The mask of what stands one before the bits of `mask`, seen from there: bit `i` says whether byte `i - 1` is in `mask`.
#[inline(always)]
fn before(mask: u64) -> u64 {
    mask << 1
}

/// Bit `i` says whether byte `i + 1` is in `mask`.
#[inline(always)]
fn after(mask: u64) -> u64 {
    mask >> 1
}

#[inline(always)]
fn starts(masks: &Masks, window: &[u8; 64], len: usize, shape: Shape) -> u64 {
    let mut unknown = masks.not_ascii | !low(len as u32);
    match shape {
        // Controls may stand apart or lead: rare enough to be left to the matcher.
        Shape::DeepSeek3 => unknown |= masks.control,
        // So is a slash after newlines, which may belong to the punctuation before them.
        Shape::O200k => unknown |= masks.slash & before(masks.newline),
        _ => {}
    }
    let known = unknown.trailing_zeros();
    if known == 0 {
        return 1;
    }
    let of = |mask: u64| mask & low(known);
    let (letter, digit, space) = (of(masks.letter), of(masks.digit), of(masks.space));
    let (newline, blank, apostrophe) = (of(masks.newline), of(masks.blank), of(masks.apostrophe));
    let sign = of(!(letter | digit | space));
    // Signs begin where no sign is before, but a blank leads them.
    let signs = sign & !before(sign) & !before(blank);

    let (mut found, free) = match shape {
        Shape::Gpt2 { digits_apart } => {
            let (digits, held) = if digits_apart { (digit, after(digit)) } else { (digit & !before(digit | blank), 0) };
            let words = letter & !before(letter | blank);
            let runs = space & !before(space) | space & !after(space) & !held;
            (signs | digits | words | runs, space)
        }
        Shape::Cl100k { .. } | Shape::O200k | Shape::DeepSeek3 => {
            // Newlines right after signs belong to them. (An addition runs through a block of ones from its lowest bit.)
            let first = newline & before(sign);
            let attached = newline & !newline.wrapping_add(first);
            let free = space & !attached;
            let free_newline = newline & free;
            let tail = free & !newline;
            // What follows the last newline of a run of whitespace starts anew: all that is not followed by a newline again.
            let mut reset = tail & before(free_newline);
            let mut joined = tail.wrapping_add(reset) & !tail & free_newline;
            while joined != 0 {
                let below = reset & low(joined.trailing_zeros());
                reset &= !(1 << (63 - below.leading_zeros()));
                joined &= joined - 1;
            }
            // So does the last character of a run, which leads what comes.
            let held = if shape == Shape::DeepSeek3 { after(digit) } else { 0 };
            let last = tail & !after(space) & !held;
            let mut words = letter & !before(letter) & !before(signs | tail);
            if shape == Shape::O200k {
                words |= of(masks.upper) & before(letter & !masks.upper);
            }
            let digits = if shape == (Shape::Cl100k { max_digits: 1 }) { digit } else { thirds(digit) };
            (signs | free & !before(free) | reset | last | words | digits, free)
        }
    };
    let mut limit = known;
    // A run of whitespace that reaches the end of what is known is sure in its start only.
    if free >> (known - 1) & 1 == 1 {
        limit = 65 - (!free & low(known)).leading_zeros();
    }
    let quoted = apostrophe & after(letter) & low(limit);
    match shape {
        Shape::Cl100k { .. } if quoted & signs != 0 => split_contractions(&mut found, quoted & signs, letter, window),
        Shape::Gpt2 { .. } if quoted & signs != 0 => {
            limit = limit.min(gpt2_contractions(&mut found, quoted & signs, letter, window, known))
        }
        Shape::O200k if apostrophe & before(letter) != 0 => {
            limit = limit.min(trailing_contractions(&mut found, apostrophe & before(letter), letter, window, known));
        }
        _ => {}
    }
    (found | 1) & low(limit)
}

/// The starts of groups of three in each run of ones.
#[inline(always)]
fn thirds(digit: u64) -> u64 {
    let mut groups = digit & !before(digit);
    // Bit `i`: it and the three before are digits.
    let inner = digit & digit << 1 & digit << 2 & digit << 3;
    if inner == 0 {
        return groups;
    }
    loop {
        let more = groups | groups << 3 & inner;
        if more == groups {
            return groups;
        }
        groups = more;
    }
}

/// Length of the contraction at `at`, an apostrophe, in a window: `None` if there is none, `Some(0)` if it may go on past `known`.
#[inline(always)]
fn contraction(window: &[u8; 64], at: u32, known: u32, fold: u8) -> Option<u32> {
    let letter = |k: u32| window.get((at + k) as usize).map_or(0, |byte| byte | fold);
    match letter(1) {
        b's' | b't' | b'm' | b'd' if at + 1 < known => Some(2),
        b'r' | b'v' | b'l' if at + 2 >= known => Some(0),
        b'r' | b'v' if letter(2) == b'e' => Some(3),
        b'l' if letter(2) == b'l' => Some(3),
        _ if at + 1 >= known => Some(0),
        _ => None,
    }
}

/// cl100k: after the contractions at `quoted`, where pretokens start, a letter starts anew.
#[inline(always)]
fn split_contractions(found: &mut u64, mut quoted: u64, letter: u64, window: &[u8; 64]) {
    while quoted != 0 {
        let at = quoted.trailing_zeros();
        quoted &= quoted - 1;
        if let Some(len @ 2..) = contraction(window, at, 64, 0x20) {
            *found |= 1u64.checked_shl(at + len).unwrap_or(0) & letter;
        }
    }
}

/// GPT-2: a contraction at `quoted` keeps its letters together. Returns up to where starts are sure.
#[inline(always)]
fn gpt2_contractions(found: &mut u64, mut quoted: u64, letter: u64, window: &[u8; 64], known: u32) -> u32 {
    while quoted != 0 {
        let at = quoted.trailing_zeros();
        quoted &= quoted - 1;
        match contraction(window, at, known, 0) {
            Some(0) => return at + 1,
            Some(len) => {
                *found &= !(1 << (at + 1));
                *found |= 1u64.checked_shl(at + len).unwrap_or(0) & letter;
            }
            None => {}
        }
    }
    64
}

/// o200k: a contraction at `quoted`, after a letter, belongs to the word before. Returns up to where starts are sure.
#[inline(always)]
fn trailing_contractions(found: &mut u64, mut quoted: u64, letter: u64, window: &[u8; 64], known: u32) -> u32 {
    let mut previous_end = 0;
    while quoted != 0 {
        let at = quoted.trailing_zeros();
        quoted &= quoted - 1;
        // A word takes one contraction only: right after one, the apostrophe leads a word of its own.
        if at == previous_end {
            continue;
        }
        match contraction(window, at, known, 0x20) {
            Some(0) => return at,
            Some(len) => {
                previous_end = at + len;
                *found &= !(low(previous_end) & !low(at));
                *found |= 1u64.checked_shl(previous_end).unwrap_or(0) & letter;
            }
            None => {}
        }
    }
    64
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The CPU's ways to make masks give those made byte by byte, for each byte at each place.
    #[test]
    fn masks_equal_plain_masks() {
        for byte in 0..=255u8 {
            for place in 0..64 {
                let mut window: [u8; 64] = std::array::from_fn(|i| (i as u8).wrapping_mul(37).wrapping_add(byte));
                window[place] = byte;
                let expected = plain_masks(&window);
                for level in Level::all() {
                    let masks = match level {
                        // SAFETY: the CPU has what the level needs, or `all` would not give it.
                        #[cfg(target_arch = "x86_64")]
                        Level::Avx512 => unsafe { x86::masks_avx512(&window) },
                        // SAFETY: as above.
                        #[cfg(target_arch = "aarch64")]
                        Level::Neon => unsafe { arm::masks_neon(&window) },
                        // SAFETY: as above.
                        #[cfg(target_arch = "x86_64")]
                        Level::Avx2 => unsafe { x86::masks_avx2(&window) },
                        Level::Plain => continue,
                    };
                    assert_eq!(expected, masks, "{level:?}");
                }
            }
        }
    }
}
