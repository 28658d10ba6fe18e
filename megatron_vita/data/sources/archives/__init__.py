"""Archives and packed files: unpacked once where they must be, indexed, and read without trusting them."""

from megatron_vita.data.sources.archives.archive import Archive, is_archive, open_archive
from megatron_vita.data.sources.archives.packed import compression_of, decompress, unpack
from megatron_vita.data.sources.archives.workspace import build_once

__all__ = ["Archive", "build_once", "compression_of", "decompress", "is_archive", "open_archive", "unpack"]
