"""Pairs of processes with simulated devices, forked from one that has imported JAX."""

import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys

PROGRAM = '''
import os, sys
import jax
from jax._src import compiler
from jax.experimental import multihost_utils
import mesh_runs  # starts no backend: a child has its own


class FirstProcess:
    process_id, client = 0, None


def cache_apart(process):
    """JAX has only the first of several processes write what it compiles: 0.7 s a start.

    Here each has a directory of its own for it.
    """
    where = os.path.join(os.environ["JAX_COMPILATION_CACHE_DIR"], process)
    jax.config.update("jax_compilation_cache_dir", where)
    compiler.distributed = type("", (), {"global_state": FirstProcess})


for line in sys.stdin:
    name, directory, port, process = line.split()
    if name == "wait":
        print(os.waitstatus_to_exitcode(os.waitpid(int(process), 0)[1]), flush=True)
        continue
    child = os.fork()
    if child:
        print(child, flush=True)
        continue
    out = os.open(f"{directory}.{process}.out", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1), os.dup2(out, 2)
    cache_apart(process)
    try:
        getattr(mesh_runs, name)(directory, int(port), int(process))
        jax.distributed.shutdown()
        os._exit(0)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
'''


class Nursery:
    """Runs functions of `mesh_runs` in two processes, as often as asked.

    Args:
      cache: directory for compiled programs; devices: of each process.
    """

    def __init__(self, cache, devices=4):
        simulated = f" --xla_force_host_platform_device_count={devices}"
        env = os.environ | {
            "XLA_FLAGS": os.environ["XLA_FLAGS"] + simulated,
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, env=env, bufsize=1,
        )
        self.alive = set()

    def start(self, name, directory, processes=2):
        """The processes' ids; what they print is in ``directory.0.out`` and ``.1.out``."""
        pathlib.Path(directory).mkdir(exist_ok=True)
        port = free_port()
        children = [self._ask(f"{name} {directory} {port} {i}") for i in range(processes)]
        self.alive |= set(children)
        return children

    def wait(self, child):
        self.alive.discard(child)
        return self._ask(f"wait - - {child}")

    def run(self, name, directory):
        codes = [self.wait(child) for child in self.start(name, directory)]
        assert codes == [0, 0], [pathlib.Path(f"{directory}.{i}.out").read_text() for i in (0, 1)]

    def said(self, name, directory):
        """What a process says that ends by an error."""
        (child,) = self.start(name, directory, processes=1)
        assert self.wait(child) == 1
        return pathlib.Path(f"{directory}.0.out").read_text()

    def kill(self, child):
        os.kill(child, signal.SIGKILL)
        return self.wait(child)

    def close(self):
        for child in list(self.alive):
            with contextlib.suppress(ProcessLookupError):
                self.kill(child)
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def _ask(self, line):
        self.process.stdin.write(line + "\n")
        return int(self.process.stdout.readline())


def free_port():
    """One of those that JAX would choose by the number of a Slurm job."""
    for port in range(61440 + os.getpid() % 2048, 65536):
        with socket.socket() as one, contextlib.suppress(OSError):
            one.bind(("", port))
            return port
    raise RuntimeError("no free port")
