"""The page of a run's log: ``python -m fbprop.watch LOG.jsonl -o run.html``."""

from __future__ import annotations

import argparse
import pathlib
import sys

from fbprop.watch.log import read_log
from fbprop.watch.page import page


def main(argv):
    parser = argparse.ArgumentParser("python -m fbprop.watch", description=__doc__)
    parser.add_argument("log", type=pathlib.Path, help="of fbprop.train.fit(..., watch=, log=)")
    parser.add_argument("-o", "--output", type=pathlib.Path, help="default: the log's name, .html")
    options = parser.parse_args(argv)
    output = options.output or options.log.with_suffix(".html")
    try:
        page(read_log(options.log), output, title=options.log.name)
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    print(output)


if __name__ == "__main__":
    main(sys.argv[1:])
