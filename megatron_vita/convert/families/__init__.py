"""What transformers' folders hold: decoders (a row each), towers and whole models (a file each), and one registry."""

from megatron_vita.convert.families.decoder_table import DECODERS
from megatron_vita.convert.families.registry import EXPORTS, MODELS, STOCK, TOWER_TYPES, TOWERS, Tower, WholeModel

__all__ = ["DECODERS", "EXPORTS", "MODELS", "STOCK", "TOWERS", "TOWER_TYPES", "Tower", "WholeModel"]
