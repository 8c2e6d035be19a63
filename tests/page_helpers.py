"""Pages about data sets, for the tests that read them and those that open them in a browser."""

from pathlib import Path
from typing import Any

from sft_fast import Dataset
from sft_fast.inspect.page import write_page
from sft_fast.inspect.tokens import Reader
from tests.data_helpers import make_dataset, random_records

# What a record may say that a page must not believe.
HOSTILE = [
    "</script><script>window.broken = 1</script>",
    "<img src=x onerror='window.broken = 2'>",
    '"><svg onload=alert(1)>',
    "{{script}} &lt;b&gt; <!-- \u2028 ]]>",
    "a\u202eb\x1bc",
    "<|im_end|>",
]
BAD = {"instruction": "no answer", "<b>window</b>": 1}


def make_page(
    directory: Path, tokenizer: Path, records: list[Any] | None = None, **options: Any
) -> tuple[Dataset, Path]:
    """A data set with hostile, repeated and rejected records among others, and its page."""
    hostile = [{"instruction": text, "output": f"{text}\n\n{text}"} for text in HOSTILE]
    records = [*random_records(60), *hostile, hostile[1], BAD] if records is None else records
    dataset = make_dataset(directory, tokenizer, records, on_error="skip")
    path = directory / "page.html"
    write_page(dataset, str(path), Reader(str(tokenizer)), **options)
    return dataset, path
