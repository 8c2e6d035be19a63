//! Added tokens: strings such as `<|im_end|>` that are found in the text before anything else and never cut.
//!
//! `tokenizers` looks for the leftmost added token, the longest of those that start there, and goes on after it. Tokens with
//! `normalized: false` are looked for in the text as given, the others in the normalised pieces that remain. A token with
//! `single_word` counts only between non-word characters; `lstrip` and `rstrip` also take the whitespace on that side.

use std::ops::Range;

/// An added token and the flags that decide where it matches.
#[derive(Clone, Debug, PartialEq)]
pub struct AddedToken {
    pub content: String,
    pub id: u32,
    pub single_word: bool,
    pub lstrip: bool,
    pub rstrip: bool,
}

/// Finds the added tokens of one kind (as given, or normalised).
pub struct AddedTokens {
    tokens: Vec<AddedToken>,
    /// A byte trie over the contents; node 0 is the root.
    nodes: Vec<Node>,
    first_bytes: Vec<u8>,
    /// A bit for each two bytes, the first high, that a token may start with.
    first_two: Box<[u64]>,
}

#[derive(Default)]
struct Node {
    /// Byte and child, by byte.
    edges: Vec<(u8, u32)>,
    token: Option<u32>,
}

/// A piece of text: an added token, or text between added tokens.
#[derive(Debug, PartialEq)]
pub enum Piece {
    Token { id: u32, range: Range<usize> },
    Text(Range<usize>),
}

impl AddedTokens {
    /// Contents are not empty and differ from each other.
    pub fn new(tokens: Vec<AddedToken>) -> Self {
        let mut nodes = vec![Node::default()];
        for (number, token) in tokens.iter().enumerate() {
            let mut node = 0;
            for &byte in token.content.as_bytes() {
                let at = nodes[node].edges.binary_search_by_key(&byte, |edge| edge.0);
                node = match at {
                    Ok(at) => nodes[node].edges[at].1 as usize,
                    Err(at) => {
                        let child = nodes.len();
                        nodes[node].edges.insert(at, (byte, child as u32));
                        nodes.push(Node::default());
                        child
                    }
                };
            }
            nodes[node].token = Some(number as u32);
        }
        let first_bytes = nodes[0].edges.iter().map(|edge| edge.0).collect();
        let mut first_two = vec![0; 1 << 10].into_boxed_slice();
        for token in &tokens {
            match *token.content.as_bytes() {
                [first, second, ..] => first_two[(first as usize) << 2 | second as usize >> 6] |= 1 << (second & 63),
                [first] => first_two[(first as usize) << 2..][..4].fill(u64::MAX),
                [] => {}
            }
        }
        Self { tokens, nodes, first_bytes, first_two }
    }

    /// Calls `take` with each piece of `text`, in order; together they make up `text` and none is empty.
    ///
    /// No token is found that has a byte in one of the `plain` ranges (ascending, disjoint).
    pub fn split(&self, text: &str, plain: &[Range<usize>], mut take: impl FnMut(Piece)) {
        let (mut done, mut i) = (0, 0);
        while let Some((found, token)) = self.find(text.as_bytes(), i, plain) {
            i = found.end;
            let Range { mut start, mut end } = found;
            if token.single_word
                && (text[..start].chars().next_back().is_some_and(is_word)
                    || text[end..].chars().next().is_some_and(is_word))
            {
                continue;
            }
            if token.lstrip {
                start = text[..start].trim_end().len().max(done);
            }
            if token.rstrip {
                end = text.len() - text[end..].trim_start().len();
            }
            if done < start {
                take(Piece::Text(done..start));
            }
            take(Piece::Token { id: token.id, range: start..end });
            done = end;
        }
        if done < text.len() {
            take(Piece::Text(done..text.len()));
        }
    }

    /// The leftmost longest token at or after `i`.
    pub fn find(&self, text: &[u8], mut i: usize, plain: &[Range<usize>]) -> Option<(Range<usize>, &AddedToken)> {
        loop {
            i += self.find_first_byte(&text[i..])?;
            if let [first, second, ..] = text[i..]
                && self.first_two[(first as usize) << 2 | second as usize >> 6] >> (second & 63) & 1 == 0
            {
                i += 1;
                continue;
            }
            let next_plain = plain.iter().find(|range| range.end > i);
            if let Some(range) = next_plain.filter(|range| range.start <= i) {
                i = range.end.min(text.len());
                continue;
            }
            let limit = next_plain.map_or(text.len(), |range| range.start);
            if let Some((len, token)) = self.longest(&text[i..limit]) {
                return Some((i..i + len, token));
            }
            i += 1;
        }
    }

    fn find_first_byte(&self, text: &[u8]) -> Option<usize> {
        match *self.first_bytes {
            [] => None,
            [a] => memchr::memchr(a, text),
            [a, b] => memchr::memchr2(a, b, text),
            [a, b, c] => memchr::memchr3(a, b, c, text),
            _ => text.iter().position(|byte| self.first_bytes.contains(byte)),
        }
    }

    /// The longest token that `text` starts with, and its length.
    fn longest(&self, text: &[u8]) -> Option<(usize, &AddedToken)> {
        let mut node = &self.nodes[0];
        let mut longest = None;
        for (i, byte) in text.iter().enumerate() {
            let Ok(at) = node.edges.binary_search_by_key(byte, |edge| edge.0) else { break };
            node = &self.nodes[node.edges[at].1 as usize];
            if let Some(number) = node.token {
                longest = Some((i + 1, &self.tokens[number as usize]));
            }
        }
        longest
    }
}

/// `\w`: letters, marks, decimal digits, connectors, joiners.
fn is_word(c: char) -> bool {
    regex_syntax::is_word_character(c)
}
