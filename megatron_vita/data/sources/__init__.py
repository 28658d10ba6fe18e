"""Open datasets: readers x mappers x media rules, and the table that names them.

A *reader* reads the records of a container, a *mapper* converts a record's fields to turns, a *media rule* names the
fields that hold media and the folders and archives of their files, and *fixes* repair known defects of a publisher's
records. A dataset is a row of table.yaml that names one of each.
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
