//! What stands around plain text, which no chat template frames: the tokens that the tokenizer puts before and behind a text
//! by itself, and the token that ends it.
//!
//! The reference is a call of the tokenizer in `transformers` 5, where the post-processor of `tokenizer.json` alone decides:
//! `add_bos_token` and `add_eos_token` of `tokenizer_config.json` count only for tokenizers without such a file.

use tokenizers::{Encoding, PostProcessor, PostProcessorWrapper, Token};

/// The frame of plain text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TextFrame {
    /// Tokens before it.
    pub before: Vec<u32>,
    /// Tokens behind it and its end.
    pub behind: Vec<u32>,
    /// The text of the token that ends a training text; without one, plain text can't be trained on.
    pub end: Option<String>,
}

/// Stands for the text while a post-processor puts tokens around it.
const TEXT: u32 = u32::MAX;

impl TextFrame {
    /// The frame by a tokenizer's post-processor, with `end` for the token that ends a text.
    ///
    /// # Errors
    /// A message, where the post-processor refuses a text.
    pub fn new(post_processor: Option<PostProcessorWrapper>, end: Option<&str>) -> Result<Self, String> {
        let end = end.map(str::to_owned);
        let Some(post_processor) = post_processor else { return Ok(Self { end, ..Self::default() }) };
        let text = Encoding::from_tokens(vec![Token::new(TEXT, "a".into(), (0, 1))], 0);
        let framed = post_processor.process(text, None, true).map_err(|error| error.to_string())?;
        let mut parts = framed.get_ids().split(|&id| id == TEXT);
        let mut next = || parts.next().unwrap_or_default().to_vec();
        Ok(Self { before: next(), behind: next(), end })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // What a post-processor puts around a text is found, on both sides; without one, nothing is added.
    #[test]
    fn the_frame_is_that_of_the_tokenizer() {
        let found = |post_processor: &str| {
            let frame = TextFrame::new(serde_json::from_str(post_processor).unwrap(), Some("</s>")).unwrap();
            assert_eq!(Some("</s>"), frame.end.as_deref());
            (frame.before, frame.behind)
        };
        let both = r#"{"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}, "</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}}}"#;
        let bytes = r#"{"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": false, "use_regex": true}"#;
        assert_eq!((vec![0], vec![1]), found(both));
        assert_eq!((vec![0], vec![1]), found(&format!(r#"{{"type": "Sequence", "processors": [{bytes}, {both}]}}"#)));
        assert_eq!((vec![], vec![]), found(bytes));
        assert_eq!((vec![], vec![]), found("null"));
    }
}
