"""Object storage: what is at an address such as `s3://bucket/name` comes here whole and checked, or not at all.

`store` makes requests, `fetch` brings bytes in, `cache` keeps them here within a limit, `datasets` reads and publishes
data sets. Nothing here is loaded unless an address is used.
"""

from sft_fast.objects.address import is_address, local_path
from sft_fast.objects.transfer import Transfer

__all__ = ["Transfer", "is_address", "local_path"]
