"""What was moved from and to object storage, counted; shared by the threads that move it."""

from __future__ import annotations

import threading
from dataclasses import dataclass

_lock = threading.Lock()


@dataclass
class Transfer:
    """Counts of one piece of work."""

    num_fetched_bytes: int = 0
    """Bytes that came from object storage."""
    num_cached_bytes: int = 0
    """Bytes that were wanted and already in the cache of this machine."""
    num_sent_bytes: int = 0
    """Bytes that went to object storage."""
    num_retries: int = 0
    """Requests that failed and were made again: cut off, refused for now, too slow, of a wrong length or checksum."""

    def __post_init__(self) -> None:
        self.is_stopped = False

    def count(self, *, fetched: int = 0, cached: int = 0, sent: int = 0, retries: int = 0) -> None:
        """Adds to the counts."""
        with _lock:
            self.num_fetched_bytes += fetched
            self.num_cached_bytes += cached
            self.num_sent_bytes += sent
            self.num_retries += retries

    def add(self, other: Transfer) -> None:
        """Adds the counts of other work."""
        self.count(
            fetched=other.num_fetched_bytes,
            cached=other.num_cached_bytes,
            sent=other.num_sent_bytes,
            retries=other.num_retries,
        )

    def stop(self) -> None:
        """Lets no request begin any more: whoever waits for this work has gone."""
        self.is_stopped = True

    @property
    def is_nothing(self) -> bool:
        """Whether object storage was not asked for anything that counts."""
        return self == Transfer()
