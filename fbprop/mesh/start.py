"""Many processes as one: `jax.distributed`, with a sentence where it would end the process."""

from __future__ import annotations

import socket
import threading

import jax

from fbprop.mesh.cluster import unsaid

_LOCAL = ("127.0.0.1", "localhost")
# JAX ends the process by itself, without an exception, when its own time to meet is over.
_NEVER = 10**6
# What JAX says where no cluster is found, and where a TPU's worker has no number.
_UNSAID = ("should be defined", "must be defined", "base 10: 'None'")


def start(coordinator: str | None = None, processes: int | None = None,
          process: int | None = None, *, timeout: float = 300, heartbeat: int = 30) -> None:
    """Joins this process to the others of a run; before anything else that uses JAX's devices.

    Afterwards `jax.devices` are those of all processes, `jax.make_mesh` spans them, and every
    process makes the same calls: `fbprop.train.fit(..., mesh=mesh)`. Under Slurm, Open MPI, on
    GKE and Cloud TPUs, JAX finds the arguments by itself: ``mesh.start()``.

    A process that dies is noticed when it has given no sign of life for ``heartbeat`` seconds. The
    others then end, with JAX's sentence that another task died, instead of waiting for it; the
    same calls go on from the last checkpoint. One that ends by an error of its own is noticed after
    that time too.

    Args:
      coordinator: host and port where process 0 can be reached, ``"10.0.0.1:1234"``.
      processes: how many there are.
      process: this one's number, from 0.
      timeout: seconds to wait for the others.
      heartbeat: see above, in whole seconds.

    Raises:
      TimeoutError: not all processes came.
      ValueError: arguments that do not go together, or none where no cluster says them; of Slurm
        and GKE the variables that are missing.
      RuntimeError: devices are in use already; it was called twice; or process 0 cannot listen at
        the coordinator's port.

    Example:
      >>> from fbprop import mesh
      >>> mesh.start("127.0.0.1:1234", processes=2, process=2)
      Traceback (most recent call last):
      ValueError: Processes are numbered from 0, got process=2 expected 0 to 1: processes=2.
    """
    _check(coordinator, processes, process)
    _check_times(timeout, heartbeat)
    if process == 0 and not jax.distributed.is_initialized():
        _check_free(coordinator)
    failed: list[BaseException] = []
    joining = threading.Thread(
        target=_join, args=(coordinator, processes, process, heartbeat, failed), daemon=True
    )
    joining.start()
    joining.join(timeout)
    if joining.is_alive():
        raise TimeoutError(
            f"All processes meet at the coordinator, got no answer after {timeout} s from "
            f"{missing(coordinator, process)}; expected {processes or 'all'} of them: start each "
            "with the same address and another number, and see that its port is open."
        )
    if failed:
        raise _said(failed[0]) from failed[0]


def _join(coordinator, processes, process, heartbeat, failed):
    bind = {}
    if coordinator is not None and _host(coordinator) in _LOCAL:
        bind = {"coordinator_bind_address": coordinator}  # instead of all the machine's addresses
    try:
        jax.distributed.initialize(
            coordinator, processes, process, initialization_timeout=_NEVER,
            heartbeat_timeout_seconds=heartbeat, shutdown_timeout_seconds=heartbeat, **bind,
        )
    except BaseException as error:  # handed over, whatever it is
        failed.append(error)


def _check(coordinator, processes, process):
    given = {"coordinator": coordinator, "processes": processes, "process": process}
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < 3:
        raise ValueError(
            f"A process joins by address, number of processes and its own number, got {given} "
            f"expected {', '.join(missing)} too, or none of them in a cluster that JAX knows."
        )
    if missing:
        return
    if not isinstance(coordinator, str) or not _host(coordinator):
        raise ValueError(
            f"A coordinator is a host and a port, got {coordinator!r} expected e.g. "
            "'10.0.0.1:1234'."
        )
    for name, value, least in (("processes", processes, 1), ("process", process, 0)):
        if not isinstance(value, int) or value < least:
            raise ValueError(
                f"Processes are counted, got {name}={value!r} expected an integer, {least} or more."
            )
    if process >= processes:
        raise ValueError(
            f"Processes are numbered from 0, got process={process} expected 0 to {processes - 1}: "
            f"processes={processes}."
        )


def _check_times(timeout, heartbeat):
    if not isinstance(timeout, (int, float)) or not timeout > 0:
        raise ValueError(
            f"The others are waited for, got timeout={timeout!r} expected seconds, more than 0."
        )
    if not isinstance(heartbeat, int) or heartbeat < 1:
        raise ValueError(
            f"Signs of life are counted in seconds, got heartbeat={heartbeat!r} expected whole "
            "seconds, 1 or more."
        )


def _check_free(coordinator):
    """Where JAX cannot listen, it ends by a segmentation fault, one time in three."""
    host, _, port = coordinator.rpartition(":")
    try:
        socket.create_server((host if host in _LOCAL else "", int(port))).close()
    except OSError as error:
        raise RuntimeError(
            f"Process 0 listens at the coordinator's port, got {coordinator} ({error}) expected a "
            "free one: take another, and give it to all."
        ) from error


def _host(coordinator: str) -> str:
    host, _, port = coordinator.rpartition(":")
    return host if port.isdigit() and int(port) < 2**16 else ""


def missing(coordinator, process) -> str:
    """Who does not answer, as far as one can know."""
    if coordinator is None or process == 0:
        return "some of the others"
    host, _, port = coordinator.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=1).close()
    except OSError as error:
        return f"process 0 at {coordinator} ({error})"
    return f"some of the others, while process 0 at {coordinator} is there"


def _said(error: BaseException) -> BaseException:
    text = str(error)
    if any(said in text for said in _UNSAID):
        return ValueError(unsaid())
    if "only be called once" in text:
        return RuntimeError(
            "A process joins the others once, got a second mesh.start; expected one at the "
            "beginning: remove the other."
        )
    if "before any JAX" in text:
        return RuntimeError(
            "Devices are shared out when processes join, got devices in use already; expected "
            "mesh.start before any array: move it to the beginning of the program."
        )
    return error
