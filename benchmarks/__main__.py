"""The command: ``python -m benchmarks --help``."""

from __future__ import annotations

import argparse
import json
import os
import sys

from benchmarks import targets


def arguments(argv):
    """The parsed command line of a measurement."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks", description="fbprop against jax.grad of the same plain code.",
        epilog="python -m benchmarks compare A.json B.json: what moved. "
               "python -m benchmarks markdown A.json [PATTERN]: the table for a README. "
               "python -m benchmarks device --help: an accelerator at hand for minutes.")
    parser.add_argument("--only", default="", metavar="PATTERN", help="rows whose name contains it "
                        "(several: a,b); the whole name with = in front")
    parser.add_argument("--device", choices=("cpu", "gpu"), help="default: what JAX takes")
    parser.add_argument("--size", choices=("smoke", "small", "full"), default="full")
    parser.add_argument("--seconds", type=float, help="sampling time per row")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall",
                        help="cpu: processor time, for one thread on a busy machine")
    parser.add_argument("--threads", type=int, help="cores that may be used, JAX and peers alike")
    parser.add_argument("--json", metavar="FILE", help="append one line per measurement")
    parser.add_argument("--peers", default="", metavar="NAMES",
                        help="of flax,equinox,torch,torch.compile (whole steps), opacus,backpack,"
                        "jax-privacy (per example), kfac-jax: against these too")
    parser.add_argument("--target", metavar="NAME", help="compile for this device, which need not "
                        "be there, and run nothing: h100, v5e; several: h100:8, v5e:4x4")
    parser.add_argument("--devices", type=int, default=1, metavar="N", help="rows for several "
                        "devices, on so many: what they send each other (CPUs are simulated)")
    parser.add_argument("--list", action="store_true", help="names of the rows, then stop")
    return parser.parse_args(argv)


def environment(options):
    """What must be set before JAX is imported."""
    if options.target:
        targets.prepare(options.target)
    elif options.device:
        os.environ["JAX_PLATFORMS"] = {"cpu": "cpu", "gpu": "cuda"}[options.device]
    if options.devices > 1:
        flag = f"--xla_force_host_platform_device_count={options.devices}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
        # Of each layout for which XLA's CPU partitioner has to gather, it writes ten lines.
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if options.threads:
        cores = sorted(os.sched_getaffinity(0))
        if options.threads > len(cores):
            sys.exit(f"--threads is at most the number of cores, got {options.threads} expected "
                     f"at most {len(cores)}.")
        # XLA's and PyTorch's thread pools count the cores this process may run on.
        os.sched_setaffinity(0, cores[: options.threads])
        if options.threads == 1:
            flags = os.environ.get("XLA_FLAGS", "")
            os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_multi_thread_eigen=false".strip()


def main(argv):
    if argv[:1] == ["compare"] or argv[:1] == ["markdown"]:
        return _report(*argv)
    if argv[:1] == ["device"]:
        return _device(argv[1:])
    options = arguments(argv)
    environment(options)
    from benchmarks.peers import MODULES
    from benchmarks.suite import SECONDS, compile_for, count, run, selected  # imports JAX

    devices = len(targets.devices(options.target)) if options.target else options.devices
    entries = selected(options.only, options.size, bool(options.target), devices)
    if not entries:
        sys.exit(f"--only names a row, got {options.only!r}: see --list.")
    if unknown := set(filter(None, options.peers.split(","))) - MODULES.keys():
        sys.exit(f"--peers are {', '.join(MODULES)}, got {', '.join(sorted(unknown))}.")
    if options.list:
        print(*dict.fromkeys(e.name for e in entries), sep="\n")
        return 0
    with open(options.json or os.devnull, "a") as file:
        write = lambda record: print(json.dumps(record), file=file, flush=True)
        if options.target:
            return compile_for(options.target, entries, write)
        if options.devices > 1:
            return count(options.devices, entries, write)
        peers = list(filter(None, options.peers.split(",")))
        return run(entries, options.seconds or SECONDS[options.size], options.clock, peers, write)


def _device(argv):
    parser = argparse.ArgumentParser(
        "python -m benchmarks device",
        description="What matters most on an accelerator that is at hand for minutes.")
    parser.add_argument("--json", metavar="FILE", required=True,
                        help="append each result as it comes")
    parser.add_argument("--size", choices=("smoke", "small", "full"), default="full")
    parser.add_argument("--minutes", type=float, default=8.0, help="after which nothing is started")
    parser.add_argument("--seconds", type=float, help="sampling time per row")
    options = parser.parse_args(argv)
    from benchmarks import device  # imports JAX

    with open(options.json, "a") as file:
        return device.run(options.size, options.minutes, options.seconds,
                          lambda record: print(json.dumps(record), file=file, flush=True))


def _report(command, *files):
    from benchmarks import report

    pattern = files[1:] if command == "markdown" and len(files) == 2 else ()
    files = files[: len(files) - len(pattern)]
    expected = {"compare": 2, "markdown": 1}[command]
    if len(files) != expected:
        sys.exit(f"{command} takes results files, got {len(files)} expected {expected}.")
    print(*getattr(report, command)(*map(report.read, files), *pattern), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
