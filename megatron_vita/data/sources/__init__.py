"""Open datasets: readers x mappers x media rules, and the table that names them.

A *reader* knows a container and gives records, a *mapper* knows a record's fields and gives turns, a *media rule* says
which fields hold pictures and where their files lie, and *fixes* repair what a publisher is known to get wrong. A dataset
is one row of table.yaml that names one of each.
"""

from megatron_vita.data.sources.mix import MixFile, load_mix, read_samples
from megatron_vita.data.sources.readers import open_reader
from megatron_vita.data.sources.registry import DatasetSpec, detect_row, load_table
from megatron_vita.data.sources.to_sample import record_to_sample

__all__ = [
    "DatasetSpec",
    "MixFile",
    "detect_row",
    "load_mix",
    "load_table",
    "open_reader",
    "read_samples",
    "record_to_sample",
]
