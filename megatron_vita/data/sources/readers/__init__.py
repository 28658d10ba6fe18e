"""Containers of records: JSON and JSON Lines, packed or not, parquet, archives of JSON, WebDataset.

Whatever the container, `index` lists the places of its records and `read` gives any of them, in any process, in bounded
memory.
"""

from megatron_vita.data.sources.readers.base import Places, Reader, Record
from megatron_vita.data.sources.readers.open import KINDS, open_reader, prepare

__all__ = ["KINDS", "Places", "Reader", "Record", "open_reader", "prepare"]
