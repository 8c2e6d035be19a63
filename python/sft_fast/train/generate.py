"""What the model answers to prompts of the validation data: a few texts for people to read.

A prompt is a sample up to its first label token. Greedy, so that two validations differ by what was learned alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from sft_fast.data import Dataset
from sft_fast.train.model import plain_attention


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One answer, with control tokens."""

    source: str  # of the validation data
    sample: int  # number in that source
    prompt: str
    expected: str  # the sample's own first answer
    generated: str

    def values(self) -> dict[str, Any]:
        """Names and values, as they are written."""
        return asdict(self)


def generate_answers(
    hf: Any, datasets: dict[str, Dataset], tokenizer_file: str, num_answers: int, max_new_tokens: int
) -> list[Generation]:
    """Answers to prompts that are spread evenly over the validation data.

    Every rank has to call it, and all compute the same: at ZeRO-3 none can run the model alone.

    Args:
        hf: a model of transformers.
        datasets: the sources by name.
        tokenizer_file: the `tokenizer.json` that the samples were made with.
        num_answers: how many; fewer where there are fewer samples.
        max_new_tokens: longest answer.
    """
    tokenizer = Tokenizer.from_file(tokenizer_file)
    control_tokens = set(tokenizer.get_added_tokens_decoder())
    answers = []
    for source, number in _spread(datasets, num_answers):
        sample = datasets[source][number]
        ids = [int(token) for token in sample.input_ids]
        first, last = _first_answer(sample.label_mask)
        stops = _end_tokens(hf) | ({ids[last - 1]} & control_tokens)
        answer = greedy(hf, ids[:first], max_new_tokens, stops)
        texts = (tokenizer.decode(part, skip_special_tokens=False) for part in (ids[:first], ids[first:last], answer))
        prompt, expected, generated = texts
        answers.append(Generation(source=source, sample=number, prompt=prompt, expected=expected, generated=generated))
    return answers


def greedy(hf: Any, prompt: Sequence[int], max_new_tokens: int, stops: set[int]) -> list[int]:
    """The likeliest continuation of a prompt, token by token, up to and with the first of `stops`."""
    device = hf.get_input_embeddings().weight.device
    limit = getattr(hf.config, "max_position_embeddings", None) or len(prompt) + max_new_tokens
    answer: list[int] = []
    ids, cache = torch.tensor([list(prompt)], device=device), None
    was_training = hf.training
    hf.eval()
    try:
        with torch.no_grad(), plain_attention(hf):
            while len(answer) < max_new_tokens and len(prompt) + len(answer) < limit:
                output = hf(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache = output.past_key_values
                answer.append(int(output.logits[0, -1].argmax()))
                if answer[-1] in stops:
                    break
                ids = torch.tensor([answer[-1:]], device=device)
    finally:
        hf.train(was_training)
    return answer


def _spread(datasets: dict[str, Dataset], num_samples: int) -> Iterator[tuple[str, int]]:
    """Source and number of samples that are evenly spread over all sources, one after the other."""
    numbers = [(source, number) for source, dataset in datasets.items() for number in range(len(dataset))]
    num_samples = min(num_samples, len(numbers))
    for index in range(num_samples):
        yield numbers[index * len(numbers) // num_samples]


def _first_answer(label_mask: Any) -> tuple[int, int]:
    """Where the first run of label tokens begins and ends."""
    first = int(np.argmax(label_mask))
    rest = np.flatnonzero(~label_mask[first:])
    return first, first + int(rest[0]) if rest.size else len(label_mask)


def _end_tokens(hf: Any) -> set[int]:
    """The tokens that end an answer by the model's own configuration."""
    ends: set[int] = set()
    for config in (hf.config, getattr(hf, "generation_config", None)):
        value = getattr(config, "eos_token_id", None)
        ends.update(value if isinstance(value, list) else [] if value is None else [value])
    return ends
