//! One thread's way from a conversation to samples, by the policies of the dataset.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::conversation::{Answers, Content, Conversation, PlainText};
use crate::error::{Error, ErrorKind, Result};
use crate::model::Model;
use crate::sample::{Fit, TooLong, fit};
use crate::template::{DroppedThinking, Rendered};
use crate::tokenize::control::{ControlPolicy, ControlTokens};
use crate::tokenize::{Encode, Input, Tokens};

/// What decides the samples of a conversation, besides its model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policies {
    /// What becomes of text that spells a control token.
    pub control_tokens: ControlPolicy,
    /// Which answers are trained on.
    pub answers: Answers,
    /// Are answers trained on that call tools?
    pub trains_on_tool_calls: bool,
    /// Is the thinking of an answer trained on?
    pub trains_on_thinking: bool,
    /// What becomes of an answer whose thinking the template leaves out.
    pub dropped_thinking: DroppedThinking,
}

impl Default for Policies {
    fn default() -> Self {
        Self {
            control_tokens: ControlPolicy::default(),
            answers: Answers::default(),
            trains_on_tool_calls: true,
            trains_on_thinking: true,
            dropped_thinking: DroppedThinking::default(),
        }
    }
}

/// What is to be reported of samples, besides themselves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tally {
    /// Samples of a conversation beyond its first.
    pub num_split_samples: u64,
    /// Samples that lost their end to the sequence length.
    pub num_truncated: u64,
    /// Samples whose last answer lost its end.
    pub num_cut_answers: u64,
    /// Samples with text that spells a control token and was encoded as ordinary text.
    pub num_control_text: u64,
    /// Answers that are not trained on because the template leaves out their thinking.
    pub num_skipped_answers: u64,
}

impl std::ops::AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.num_split_samples += other.num_split_samples;
        self.num_truncated += other.num_truncated;
        self.num_cut_answers += other.num_cut_answers;
        self.num_control_text += other.num_control_text;
        self.num_skipped_answers += other.num_skipped_answers;
    }
}

impl std::ops::SubAssign for Tally {
    fn sub_assign(&mut self, other: Self) {
        self.num_split_samples -= other.num_split_samples;
        self.num_truncated -= other.num_truncated;
        self.num_cut_answers -= other.num_cut_answers;
        self.num_control_text -= other.num_control_text;
        self.num_skipped_answers -= other.num_skipped_answers;
    }
}

/// One thread's buffers on the way from a conversation to tokens.
pub struct Sampler<'a> {
    encoder: Box<dyn Encode + 'a>,
    policies: Policies,
    /// The last text and its label spans.
    pub rendered: Rendered,
    /// Where the record spells control tokens in the last text; empty if they are allowed.
    pub control_text: Vec<Range<usize>>,
    /// The tokens of the last text.
    pub tokens: Tokens,
}

impl<'a> Sampler<'a> {
    /// Buffers for `model`.
    pub fn new(model: &'a Model, policies: Policies) -> Self {
        Self {
            encoder: model.tokenizer.encoder(),
            policies,
            rendered: Rendered::default(),
            control_text: Vec::new(),
            tokens: Tokens::default(),
        }
    }

    /// Makes the samples of a record; see [`samples`](Self::samples) and [`plain_sample`](Self::plain_sample).
    ///
    /// # Errors
    /// What is wrong with the record.
    pub fn record_samples(
        &mut self,
        model: &Model,
        content: &mut Content<'_>,
        sequence_length: u32,
        too_long: TooLong,
        take: impl FnMut(&[u32], &[Range<u32>]),
    ) -> Result<Tally> {
        match content {
            Content::Chat(conversation) => self.samples(model, conversation, sequence_length, too_long, take),
            Content::Text(text) => self.plain_sample(model, text, sequence_length, too_long, take),
        }
    }

    /// Makes the sample of `plain`: its prompt and text as they are, the token that ends a text unless it ends with that
    /// already, and around them what the tokenizer adds by itself.
    ///
    /// # Errors
    /// What is wrong with the text; [`ErrorKind::Tokenizer`] where no token ends a text.
    fn plain_sample(
        &mut self,
        model: &Model,
        plain: &PlainText<'_>,
        sequence_length: u32,
        too_long: TooLong,
        mut take: impl FnMut(&[u32], &[Range<u32>]),
    ) -> Result<Tally> {
        let frame = &model.text_frame;
        let Some(end) = &frame.end else {
            let message = "expected a tokenizer with an eos_token, which ends plain text, found none";
            return Err(Error::new(ErrorKind::Tokenizer, message)
                .with_path(&model.directory)
                .with_hint("name one in tokenizer_config.json"));
        };
        let text = plain.text.strip_suffix(&**end).unwrap_or(&plain.text);
        let prompt_bytes = plain.prompt.len();
        self.rendered.set_plain(&[&plain.prompt, text], end, prompt_bytes);
        self.find_control_text(model)?;
        self.encode()?;
        let Tokens { ids, runs } = &mut self.tokens;
        ids.splice(0..0, frame.before.iter().copied());
        let num_before = frame.before.len() as u32;
        runs.iter_mut().for_each(|run| *run = run.start + num_before..run.end + num_before);
        let num_tokens = ids.len() as u32;
        ids.extend(&frame.behind);
        if let (Some(first), true) = (runs.first_mut(), prompt_bytes == 0) {
            first.start = 0;
        }
        if let Some(last) = runs.last_mut().filter(|last| last.end == num_tokens) {
            last.end = ids.len() as u32;
        }
        let fit = fit(ids.len(), runs, sequence_length, too_long)?;
        take(&ids[..fit.num_tokens], runs);
        Ok(Tally {
            num_truncated: u64::from(fit.is_cut),
            num_cut_answers: u64::from(fit.is_answer_cut),
            num_control_text: u64::from(!self.control_text.is_empty()),
            ..Tally::default()
        })
    }

    /// Makes the samples of `conversation`, of at most `sequence_length` tokens, and hands the tokens of each to `take`. They
    /// count only if all of them come to be.
    ///
    /// # Errors
    /// What is wrong with the conversation; [`ErrorKind::ThinkingDropped`] where nothing is left to train on.
    pub fn samples(
        &mut self,
        model: &Model,
        conversation: &mut Conversation<'_>,
        sequence_length: u32,
        too_long: TooLong,
        mut take: impl FnMut(&[u32], &[Range<u32>]),
    ) -> Result<Tally> {
        conversation.train_on(self.policies.answers, self.policies.trains_on_tool_calls);
        let mut tally = Tally::default();
        let mut num_samples = 0;
        let mut skipped = None;
        loop {
            let num_messages = conversation.messages.len();
            self.sample(model, conversation)?;
            if !self.rendered.spans.is_empty() || self.rendered.dropped.is_empty() {
                let fit = self.fit(model, conversation, sequence_length, too_long)?;
                take(&self.tokens.ids[..fit.num_tokens], &self.tokens.runs);
                num_samples += 1;
                tally.num_truncated += u64::from(fit.is_cut || conversation.messages.len() < num_messages);
                tally.num_cut_answers += u64::from(fit.is_answer_cut);
                tally.num_control_text += u64::from(!self.control_text.is_empty());
            }
            // What is left out even at the end of its conversation is shown nowhere.
            let mut dropped = std::mem::take(&mut self.rendered.dropped);
            let is_split = self.policies.dropped_thinking == DroppedThinking::Split;
            let shown = dropped.iter().filter(|index| is_split && **index + 1 < conversation.messages.len()).count();
            skipped = skipped.or(dropped.get(shown).copied());
            tally.num_skipped_answers += dropped.drain(shown..).count() as u64;
            let Some(last) = dropped.last() else { break };
            conversation.messages.truncate(last + 1);
            for (index, message) in conversation.messages.iter_mut().enumerate() {
                message.is_trained = dropped.contains(&index);
            }
        }
        tally.num_split_samples = num_samples.max(1) - 1;
        match skipped {
            Some(index) if num_samples == 0 => Err(model.template.dropped_thinking(index)),
            _ => Ok(tally),
        }
    }

    /// Makes the sample in the buffers fit. To cut at a turn is to leave out the messages behind an answer and to render
    /// what is left anew.
    fn fit(
        &mut self,
        model: &Model,
        conversation: &mut Conversation<'_>,
        sequence_length: u32,
        too_long: TooLong,
    ) -> Result<Fit> {
        while too_long == TooLong::TruncateTurns && self.tokens.ids.len() > sequence_length as usize {
            let Rendered { spans, answers, .. } = &self.rendered;
            let runs = &self.tokens.runs;
            // Answers that touch share a run: then nothing tells their ends, and the last one is left out.
            let is_known = runs.len() == spans.len();
            let ends = answers.iter().enumerate().filter(|(at, _)| !is_known || runs[*at].end <= sequence_length);
            let ends = ends.filter_map(|(_, answer)| Some((*answer)? + 1));
            let Some(num_kept) = ends.filter(|num| *num < conversation.messages.len()).max() else { break };
            conversation.messages.truncate(num_kept);
            self.sample(model, conversation)?;
        }
        fit(self.tokens.ids.len(), &mut self.tokens.runs, sequence_length, too_long)
    }

    /// Renders and encodes `conversation` into the buffers.
    pub fn sample(&mut self, model: &Model, conversation: &Conversation<'_>) -> Result<()> {
        self.render(model, conversation)?;
        self.encode().map_err(|error| match error.kind() {
            ErrorKind::ControlText => in_message(error, conversation, model.tokenizer.control_tokens()),
            _ => error,
        })
    }

    /// Encodes the text in the buffers.
    fn encode(&mut self) -> Result<()> {
        let Rendered { text, spans, stretches, .. } = &self.rendered;
        let source = match self.policies.control_tokens {
            ControlPolicy::Allow => Input { text, spans, ..Input::default() },
            _ => Input { text, spans, plain: &self.control_text, stretches },
        };
        self.encoder.encode(source, &mut self.tokens)
    }

    /// Renders `conversation` into the buffers, and finds in its text what spells a control token.
    pub fn render(&mut self, model: &Model, conversation: &Conversation<'_>) -> Result<()> {
        let Policies { dropped_thinking, trains_on_thinking, .. } = self.policies;
        model.template.render(conversation, &mut self.rendered)?;
        model.template.review(conversation, &mut self.rendered, dropped_thinking, trains_on_thinking)?;
        self.find_control_text(model).map_err(|error| in_message(error, conversation, model.tokenizer.control_tokens()))
    }

    /// Finds in the text in the buffers where the record spells a control token.
    fn find_control_text(&mut self, model: &Model) -> Result<()> {
        let Rendered { text, stretches, .. } = &self.rendered;
        if self.policies.control_tokens == ControlPolicy::Allow {
            return Ok(());
        }
        model.tokenizer.control_tokens().find(text, stretches, &mut self.control_text)?;
        match (self.policies.control_tokens, self.control_text.first()) {
            (ControlPolicy::Reject, Some(found)) => {
                let message =
                    format!("expected no control token in the text of a record, found '{}'", &text[found.clone()]);
                Err(Error::new(ErrorKind::ControlText, message))
            }
            _ => Ok(()),
        }
    }
}

/// Places an error at the first text of a message that spells a control token.
fn in_message(error: Error, conversation: &Conversation<'_>, control: &ControlTokens) -> Error {
    for (index, message) in conversation.messages.iter().enumerate() {
        for member in &message.fields {
            if member.value.as_str().is_some_and(|text| control.is_in(text)) {
                return error.at_offset(member.value.offset).at_location(format!("messages[{index}].{}", member.key));
            }
        }
    }
    error
}
