"""The page of a run's log: ``python -m fbprop.watch LOG.jsonl -o run.html``."""

from __future__ import annotations

import argparse
import json
import pathlib
import sys

from fbprop.watch.page import page


def rows_of(path: pathlib.Path) -> list[dict]:
    """The rows of a log; a last line that was cut off is left out."""
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                sys.exit(f"A log has one JSON object a line, got {line[:40]!r} in line {number}.")
    return rows


def main(argv):
    parser = argparse.ArgumentParser("python -m fbprop.watch", description=__doc__)
    parser.add_argument("log", type=pathlib.Path, help="of fbprop.train.fit(..., watch=, log=)")
    parser.add_argument("-o", "--output", type=pathlib.Path, help="default: the log's name, .html")
    options = parser.parse_args(argv)
    output = options.output or options.log.with_suffix(".html")
    try:
        page(rows_of(options.log), output, title=options.log.name)
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    print(output)


if __name__ == "__main__":
    main(sys.argv[1:])
