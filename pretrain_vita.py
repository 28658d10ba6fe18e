"""Train the stages of a recipe (torchrun starts it on every rank), or try a step at full size without a GPU.

torchrun --nproc-per-node 8 pretrain_vita.py --config examples/.../run.yaml [--stage K] [--seq-length N ...]
python pretrain_vita.py --config examples/.../run.yaml --dry-run [--world-size 64 ...]
"""

import sys

if __name__ == "__main__":
    if any(argument.startswith("--dry-run") for argument in sys.argv):
        from megatron_vita.dryrun.cli import main
    else:
        from megatron_vita.training.cli import main
    sys.exit(main())
