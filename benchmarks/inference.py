"""Inference: cache over ranks, what moves, memory, decode and prefill on two ranks, batching, transformers' generate.

    OMP_NUM_THREADS=1 python benchmarks/inference.py [--quick] [--sections cache memory …]

Models with random weights, float32, one thread a rank, gloo. Times are CPU seconds of all ranks, except where the unit
says otherwise: decode attention is wall time, since two ranks at once are the point. Sides are interleaved and the
least of the repeats counts. Sections:

* cache: bytes of keys and values that the ranks' blocks hold; the prompts' cache compared before and after decoding,
  and all writes counted; bytes that torch.distributed delivers in a decode step, against the formula in
  parallel/cached_attention.py.
* memory: peak resident memory (VmHWM) of a rank during prefill, beyond that of its start, with the cache already
  resident; the same from the hidden states of a prompt's last step on, for the output head and sampling.
* time: cached_attention of decoding tokens on one rank and on two; prefill of a prompt on one rank and on two.
* batching: the same requests in groups, each as long as its longest answer, and all at once.
* prefix: questions on one video, with and without --enable-prefix-caching.
* generate: our engine and transformers' generate on the same exported weights, prompts and lengths.

`--quick` runs everything at sizes that say nothing, and judges only what does not depend on size.
"""

from __future__ import annotations

import argparse
import sys

import inference_engine
import inference_layout

SECTIONS = {
    "cache": inference_layout.cache_figures,
    "memory": inference_layout.memory_figures,
    "time": inference_layout.time_figures,
    "batching": inference_engine.batching_figures,
    "prefix": inference_engine.prefix_figures,
    "generate": inference_engine.generate_figures,
}


def main() -> int:
    """Print a line for each figure; 0 where the bars are kept."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that everything runs")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    arguments = parser.parse_args()
    kept = True
    for section in arguments.sections:
        print(f"-- {section}")
        for figure in SECTIONS[section](quick=arguments.quick):
            print(figure.line(), flush=True)
            kept &= figure.kept is not False
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
