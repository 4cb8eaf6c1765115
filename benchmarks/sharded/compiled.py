"""A row's two programs, compiled for several devices, and run on them if they are there."""

from __future__ import annotations

from dataclasses import dataclass

import jax

from benchmarks.meter import Disagreement, relative_difference
from benchmarks.row import Row
from benchmarks.sharded.collectives import collectives
from benchmarks.sharded.estimate import received_bytes


@dataclass
class Spread:
    """What is said of the two programs of a row; index 0 is fbprop, index 1 the other.

    Attributes:
      collectives: how many run.
      sent_bytes: that they result in, on a device.
      temp_bytes: temporary memory of a device.
      kinds: of each program, {kind of collective: how many}.
      agreement: largest relative difference of the results; None if nothing was run.
      chip_bytes: of a target, memory of a device: arguments, results and temporary.
      received_bytes: of a target, by a device from others.
    """

    row: Row
    against: str
    collectives: tuple
    sent_bytes: tuple
    temp_bytes: tuple
    kinds: tuple
    agreement: float | None = None
    chip_bytes: tuple | None = None
    received_bytes: tuple | None = None


def measure(row: Row, ours, theirs, devices, run: bool = True) -> Spread:
    """Compile ``row.build(ours)`` and ``row.build(theirs)`` for devices; see `Spread`.

    Raises:
      Disagreement: results differ by more than ``row.tolerance``.
    """
    programs = [program(row, ad, devices) for ad in (ours, theirs)]
    figures = []
    for each in programs:
        count, sizes = collectives(each.as_text())
        memory = each.memory_analysis().temp_size_in_bytes
        figures.append((count.total(), sizes.total(), memory, dict(count)))
    found = Spread(row, "jax", *zip(*figures))
    if run:
        found.agreement = _agreement(row, programs, devices)
    else:
        texts = [each.as_text() for each in programs]
        found.chip_bytes = tuple(_memory(each.memory_analysis()) for each in programs)
        found.received_bytes = tuple(received_bytes(text, devices.size) for text in texts)
    return found


def _memory(told):
    """Of a device; what is donated counts once."""
    return (told.argument_size_in_bytes + told.output_size_in_bytes - told.alias_size_in_bytes
            + told.temp_size_in_bytes)


def program(row: Row, ad, devices):
    """One of a row's programs, compiled for devices."""
    inputs, results = row.places(devices)
    types = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), row.inputs, inputs
    )
    donated = (0,) if row.carries else ()
    jax.clear_caches()
    run = jax.jit(row.build(ad), out_shardings=results, donate_argnums=donated)
    return run.lower(*types).compile()


def _agreement(row, programs, devices):
    inputs, _ = row.places(devices)
    host = jax.device_get(row.probe or row.inputs)  # each program may have its own, and donate it
    place = lambda: jax.device_put(host, inputs)
    difference = relative_difference(*(each(*place()) for each in programs))
    if not difference <= row.tolerance:
        raise Disagreement(
            f"Both programs compute the same numbers, got a relative difference of "
            f"{difference:.2e} expected at most {row.tolerance:.0e}."
        )
    return difference
