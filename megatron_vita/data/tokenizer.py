"""The import path of scripts outside this repository; the code is in data/text/tokenizer.py."""

from megatron_vita.data.text.tokenizer import VitaTokenizer

__all__ = ["VitaTokenizer"]
