#!/usr/bin/env python
"""Weights between Hugging Face folders and checkpoints.

convert_ckpt.py import --llm HF_DIR [--vision HF_DIR] --output CKPT     parts -> a fresh model (or the decoder alone)
convert_ckpt.py import --model HF_DIR --output CKPT                     a whole model, its format found out
    --config RUN.yaml                                                   either: the model that this recipe trains
convert_ckpt.py export --checkpoint CKPT --output HF_DIR --format {internvl,long_vita,llm}
convert_ckpt.py verify A B [--logits]                                   two models, in any two formats
"""

from __future__ import annotations

import sys

from megatron_vita.convert.cli import main

if __name__ == "__main__":
    sys.exit(main())
