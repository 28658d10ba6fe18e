"""Show what is in packed shards.

    python tools/inspect_data.py DIR/PREFIX [--sample K] [--pictures OUT.png] [--stats] [--plot OUT.png] [--verify]

With --sample: the text with what carries loss in ⟦brackets⟧, and the table of its tiles. --pictures writes a sheet of
its tiles (without --sample: one tile of each of up to 64 samples). Without --sample, or with --stats: the set's
statistics; --plot draws them. --verify reads everything and compares the digests.
Exit status 2 for a usage error, 1 for damaged shards.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_vita import log
from megatron_vita.errors import VitaError


def main(argv: Sequence[str] | None = None) -> int:
    """Print; 0 on success."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prefix", metavar="DIR/PREFIX", help="what preprocess_data.py got as --output")
    parser.add_argument("--sample", type=int, metavar="K", help="show sample K, counted from 0 over the set")
    parser.add_argument("--tokenizer", help="folder or .model; by default one that lies near the shards and matches")
    parser.add_argument("--pictures", type=Path, metavar="OUT.png", help="write a sheet of tiles")
    parser.add_argument("--stats", action="store_true", help="print the statistics beside --sample, too")
    parser.add_argument("--plot", type=Path, metavar="OUT.png", help="draw the statistics")
    parser.add_argument("--verify", action="store_true", help="compare every file with its digest")
    args = parser.parse_args(argv)
    log.configure()
    try:
        from megatron_vita.data import inspect  # imports torch: only once the command line is sound
        from megatron_vita.data.shards import ShardSet
        from megatron_vita.data.tokenizer import VitaTokenizer

        for flag, path in (("--plot", args.plot), ("--pictures", args.pictures)):
            if path:
                inspect.check_picture_path(flag, path)
        shards = ShardSet(args.prefix)
        if args.verify:
            shards.verify(full=True)
            print("every file is the one that was written")
        if args.sample is not None:
            sample = inspect.check_sample(shards, args.sample)
            tokenizer = VitaTokenizer.load(args.tokenizer) if args.tokenizer else inspect.find_tokenizer(shards)
            print(inspect.sample_report(shards, sample, tokenizer))
            if tokenizer is None:
                print("no tokenizer of these shards lies near them: ids are shown. Give --tokenizer.", file=sys.stderr)
        if args.stats or args.sample is None:
            print(inspect.statistics(shards))
        if args.plot:
            inspect.plot_statistics(shards, args.plot)
            print(f"wrote {args.plot}")
        if args.pictures:
            number = inspect.picture_sheet(shards, inspect.sheet_tiles(shards, args.sample), args.pictures)
            print(f"wrote {number} tiles to {args.pictures}")
    except VitaError as error:
        print(f"inspect_data: {error}", file=sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())
