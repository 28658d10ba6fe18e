"""A step of a tiny run with real tensors on this machine's CPU: `python -m tests.dryrun.real RECIPE`; a report as JSON.

What `--dry-run real` does on a GPU, but for the measurement by CUDA's allocator.
"""

from __future__ import annotations

import json
import sys

from megatron_vita.config import load_run
from megatron_vita.dryrun.collectives import Collectives
from megatron_vita.dryrun.jobs import DryRunJob


def main() -> None:
    """Rank 3 of 4 of the first stage."""
    counted = Collectives(real=True)
    counted.install()
    from megatron_vita.dryrun.train_steps import train

    flags = ("--tensor-model-parallel-size", "2", "--sequence-parallel", "true", "--context-parallel-size", "2")
    stage = load_run(sys.argv[1], flags, expand=False).stages[0]
    report = train(DryRunJob(stage=stage, world_size=4, rank=3, steps=2), counted, fake=False)
    sys.stdout.write(json.dumps(report.to_json()))


if __name__ == "__main__":
    main()
