"""``python -m tests.programs --seed S --count N``: look at N random programs from this seed on."""

from __future__ import annotations

import argparse
import sys
import time

from .run import look


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.programs", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the first program")
    parser.add_argument("--count", type=int, default=300, help="of programs, one per seed")
    parser.add_argument("--family", help="every program has a line of it: products, control, ...")
    parser.add_argument("--keep-going", action="store_true", help="after a disagreement")
    options = parser.parse_args(arguments)
    start, found = time.time(), 0
    for seed in range(options.seed, options.seed + options.count):
        if report := look(seed, options.family):
            found += 1
            print(f"--- seed {seed}\n{report}\n", flush=True)
            if not options.keep_going:
                break
    print(f"{seed - options.seed + 1} programs, {found} disagree, {time.time() - start:.0f} s")
    return min(found, 1)


if __name__ == "__main__":
    sys.exit(main())
