"""Train the stages of a recipe, one after the other, on the ranks that torchrun has started.

torchrun --nproc-per-node 8 pretrain_vita.py --config examples/.../run.yaml [--stage K] [--seq-length N ...]

--dry-run instead tries a step at full size without a GPU; see pretrain_vita.py --dry-run --help.
"""

from __future__ import annotations

import argparse
import os
import sys

from megatron_vita import log
from megatron_vita.config import load_run
from megatron_vita.errors import VitaError


def main() -> int:
    """Train; 0 on success, 2 for a usage or configuration error, 1 otherwise."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", required=True, help="YAML recipe; settings may follow as flags in Megatron's names")
    parser.add_argument("--stage", type=int, help="run this stage alone (1 is the first)")
    arguments, flags = parser.parse_known_args()
    log.configure()
    rank = os.environ.get("RANK", "0")
    try:
        run = load_run(arguments.config, flags)
        run.check(int(os.environ.get("WORLD_SIZE", "1")))
        from megatron_vita.training.stages import run_stages  # imports torch: after the recipe has been checked

        finished = run_stages(run, only=arguments.stage)
    except VitaError as error:
        print(f"pretrain_vita, rank {rank}: {error}", file=sys.stderr)
        log.tell_launcher(str(error))
        return error.exit_status
    if rank == "0":
        print(f"wrote {finished[-1]}")
    return 0
