"""Packed shards: the format, its reader, and (writer/) what makes them."""

from megatron_vita.data.shards.reader import ShardSet

__all__ = ["ShardSet"]
