"""Archives and compressed files: unpacked once where needed, indexed, and checked as untrusted input."""

from megatron_vita.data.sources.media_store.archive import Archive, is_archive, open_archive
from megatron_vita.data.sources.media_store.cache import build_once
from megatron_vita.data.sources.media_store.compressed import compression_of, decompress, unpack

__all__ = ["Archive", "build_once", "compression_of", "decompress", "is_archive", "open_archive", "unpack"]
