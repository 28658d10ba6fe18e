"""Model families of transformers: decoders (a row each), towers and whole models (a file each), and their registry."""

from megatron_vita.convert.families.decoder_table import DECODERS
from megatron_vita.convert.families.registry import EXPORTS, MODELS, STOCK, TOWER_TYPES, TOWERS, Tower, WholeModel

__all__ = ["DECODERS", "EXPORTS", "MODELS", "STOCK", "TOWERS", "TOWER_TYPES", "Tower", "WholeModel"]
