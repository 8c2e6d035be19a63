"""Credentials in an address, such as `https://user:password@host/data?token=…`: nothing that is written has them."""

from __future__ import annotations

import re

MASK = "***"

_USER = re.compile(r"(?<=://)[^/@\s?'\"]+(?=@)")
_QUERY = re.compile(r"(?P<address>[a-z][a-z0-9+.-]*://[^\s?'\"]*)\?(?P<query>[\w.%-]+=[^\s'\"<>]*)", re.IGNORECASE)
_VALUE = re.compile(r"(?<==)[^&#,;)]+")


def without_secrets(text: str) -> str:
    """The text, with what may be a secret in the addresses in it replaced: users, passwords, and values of queries.

    Examples:
        >>> from sft_fast.redact import without_secrets
        >>> without_secrets("could not read https://me:secret@host/a.jsonl?token=secret (403)")
        'could not read https://***@host/a.jsonl?token=*** (403)'
        >>> without_secrets("s3://bucket/part-?.jsonl")
        's3://bucket/part-?.jsonl'
    """
    if "://" not in text:
        return text
    text = _USER.sub(MASK, text)
    return _QUERY.sub(lambda match: f"{match['address']}?{_VALUE.sub(MASK, match['query'])}", text)


def has_secrets(text: str) -> bool:
    """Whether `without_secrets` is another text."""
    return without_secrets(text) != text


def without_query(address: str) -> str:
    """The address up to its query; a `?` of a glob stays."""
    return _QUERY.sub(lambda match: match["address"], address)
