"""Show what is in packed shards.

    python tools/inspect_data.py DIR/PREFIX [--html OUT.html] [--sample K | --pack K] [--pictures OUT.png] [--stats]
        [--plot OUT.png] [--verify] [--ledger STAGE_FOLDER --step N]

By itself: the set's statistics. --html writes them as a page that stands alone, with charts, what was rejected, and
samples (that of --sample, those of --pack, or six spread over the set) with their pictures; what carries loss is
marked. --sample prints the text with what carries loss in ⟦brackets⟧, and the table of its tiles; --pack, what lies
in a pack. --pictures writes a sheet of their tiles (by itself: one tile of each of up to 64 samples). --plot draws the
statistics. --verify reads everything and compares the digests. --ledger with --step prints which packs and samples
step N of a run took, and whose labels were masked; STAGE_FOLDER is checkpoint.save/<stage>.
Exit status 2 for a usage error, 1 for damaged shards.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_vita import log
from megatron_vita.data.rejects import counted
from megatron_vita.errors import VitaError


def main(argv: Sequence[str] | None = None) -> int:
    """Print; 0 on success."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("prefix", metavar="DIR/PREFIX", help="what preprocess_data.py got as --output")
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--sample", type=int, metavar="K", help="show sample K, counted from 0 over the set")
    chosen.add_argument("--pack", type=int, metavar="K", help="show what lies in pack K, counted from 0")
    parser.add_argument("--html", type=Path, metavar="OUT.html", help="write one page with everything")
    parser.add_argument("--tokenizer", help="folder or .model; by default one that lies near the shards and matches")
    parser.add_argument("--pictures", type=Path, metavar="OUT.png", help="write a sheet of tiles")
    parser.add_argument("--stats", action="store_true", help="print the statistics beside --sample or --pack, too")
    parser.add_argument("--plot", type=Path, metavar="OUT.png", help="draw the statistics")
    parser.add_argument("--verify", action="store_true", help="compare every file with its digest")
    parser.add_argument("--ledger", type=Path, metavar="STAGE_FOLDER", help="of a run on these shards, for --step")
    parser.add_argument("--step", type=int, metavar="N", help="print what step N of --ledger took")
    args = parser.parse_args(argv)
    if (args.ledger is None) != (args.step is None):
        parser.error("--ledger and --step belong together")
    log.configure()
    try:
        from megatron_vita.data.inspect import page as inspect_page
        from megatron_vita.data.inspect import pictures as inspect_pictures
        from megatron_vita.data.inspect import text as inspect  # torch: only for a sound command line
        from megatron_vita.data.shards.reader import ShardSet
        from megatron_vita.data.text.tokenizer import VitaTokenizer

        for flag, path, suffix in (
            ("--plot", args.plot, ".png"),
            ("--pictures", args.pictures, ".png"),
            ("--html", args.html, ".html"),
        ):
            if path:
                inspect_pictures.check_output(flag, path, suffix)
        shards = ShardSet(args.prefix)
        if args.verify:
            shards.verify(full=True)
            print("every file is the one that was written")
        if args.ledger:
            from megatron_vita.training.replay import data_of_step

            taken = data_of_step(shards, args.ledger, args.step)
            for name, ids in vars(taken).items():
                print(f"step {args.step}, {name}: {', '.join(map(str, ids)) or 'none'}")
            return 0
        samples = None
        if args.sample is not None:
            samples = [inspect.check_index("--sample", args.sample, shards.num_samples)]
        elif args.pack is not None:
            samples = list(shards.pack_samples(inspect.check_index("--pack", args.pack, shards.num_packs)))
            print(inspect.pack_report(shards, args.pack))
        tokenizer = None
        if args.sample is not None or args.html:
            tokenizer = VitaTokenizer.load(args.tokenizer) if args.tokenizer else inspect.find_tokenizer(shards)
            if tokenizer is None:
                print("no tokenizer of these shards lies near them: ids are shown. Give --tokenizer.", file=sys.stderr)
        if args.sample is not None:
            print(inspect.sample_report(shards, args.sample, tokenizer))
        if args.stats or samples is None:
            print(inspect.statistics(shards))
        if args.plot:
            inspect_pictures.plot_statistics(shards, args.plot)
            print(f"wrote {args.plot}")
        if args.pictures:
            tiles = inspect_pictures.sheet_tiles(shards, samples)
            number = inspect_pictures.picture_sheet(shards, tiles, args.pictures)
            print(f"wrote {counted(number, 'tile')} to {args.pictures}")
        if args.html:
            shown = inspect_page.spread(shards, 6) if samples is None else samples
            args.html.write_text(inspect_page.page(shards, shown, tokenizer), encoding="utf-8")
            print(f"wrote {counted(len(shown), 'sample')} and the statistics to {args.html}")
    except VitaError as error:
        print(f"inspect_data: {error}", file=sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())
