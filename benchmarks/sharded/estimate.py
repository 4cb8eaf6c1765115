"""What a step takes at the devices' published rates: arithmetic, memory, links.

    seconds = max(8/6 flops / peak, 2 bytes of memory / memory rate) + bytes received / link rate

``flops`` are the model's, 6 per weight and token and 12 T D per layer and token in attention; the
program does 8/6 of them, because each block's forward pass is computed again. All of a device's
memory that the program takes is written and read once, at least. Kernels are taken to run at peak
and collectives not to overlap with them: the first is better than any device does, the second
worse. Utilisation is flops / seconds / peak.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from benchmarks.sharded.collectives import each_collective


class Rates(NamedTuple):
    """Of one device: bfloat16 flops a second, bytes a second to memory and to others, memory."""

    flops: float
    memory: float
    link: float
    capacity: int


RATES = {
    # cloud.google.com/tpu/docs/v5e: 197 TFLOP/s, 819 GB/s, 16 GB (15.75 GiB for programs, by its
    # compiler), 400 GB/s between chips in both directions together.
    "v5e": Rates(197e12, 819e9, 200e9, int(15.75 * 2**30)),
    # NVIDIA H100 SXM data sheet: 989 TFLOP/s dense, 3.35 TB/s, NVLink 900 GB/s in both directions
    # together; memory as its driver reports it.
    "h100": Rates(989.4e12, 3352e9, 450e9, 84_942_979_072),
}


def received_bytes(text: str, devices: int) -> int:
    """Bytes that a device receives in one run of a program, its collectives going round in rings.

    Of n devices with a result of R bytes each: gathered R (n − 1)/n, reduced 2 R (n − 1)/n,
    reduced and scattered R (n − 1), exchanged R (n − 1)/n, permuted R.
    """
    total = 0
    for kind, i, times in each_collective(text):
        n = group_size(i.rest, devices)
        total += times * i.bytes * {
            "all-gather": (n - 1) / n, "all-reduce": 2 * (n - 1) / n, "reduce-scatter": n - 1,
            "all-to-all": (n - 1) / n, "collective-permute": 1,
        }[kind]
    return int(total)


def group_size(attributes: str, devices: int) -> int:
    """How many devices take part in a collective, by the attributes in the program's text."""
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return found[1].count(",") + 1
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
        return int(found[1])
    if found := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", found[2]))
    return devices


def seconds(rates: Rates, flops: float, memory: float, received: float) -> float:
    """Of one device; see above."""
    return max(8 / 6 * flops / rates.flops, 2 * memory / rates.memory) + received / rates.link
