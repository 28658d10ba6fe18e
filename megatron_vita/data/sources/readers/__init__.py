"""Containers of records: JSON and JSON Lines, packed or not, parquet, archives of JSON, WebDataset.

Every reader lists the offsets of all records (`index`) and reads the records at any of them (`read`), in any process
and in bounded memory.
"""

from megatron_vita.data.sources.readers.base import Reader, Record, RecordOffsets
from megatron_vita.data.sources.readers.open import KINDS, open_reader, prepare

__all__ = ["KINDS", "Reader", "Record", "RecordOffsets", "open_reader", "prepare"]
