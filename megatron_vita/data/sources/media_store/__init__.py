"""Archives and packed files: unpacked once where they must be, indexed, and read without trusting them."""

from megatron_vita.data.sources.media_store.archive import Archive, is_archive, open_archive
from megatron_vita.data.sources.media_store.cache import build_once
from megatron_vita.data.sources.media_store.compressed import compression_of, decompress, unpack

__all__ = ["Archive", "build_once", "compression_of", "decompress", "is_archive", "open_archive", "unpack"]
