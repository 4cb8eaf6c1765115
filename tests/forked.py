"""Programs in processes of their own, each forked from one that has imported JAX and fbprop.

To import both takes 0.9 s of processor time, and the tests run sixty programs.
"""

import atexit
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile

# Only imports are shared: a child is forked before any backend exists and starts its own. Within
# the loop a child does nothing but leave it, so it ends as any program does.
SERVER = """
import argparse, json, os, runpy, sys, warnings

import jax
import numpy
import fbprop
from fbprop import data, learning, mesh, nn, ops, optim, train, watch

for line in sys.stdin:
    call = json.loads(line)
    with warnings.catch_warnings(action="ignore"):  # of forking beside threads: none is held here
        child = os.fork()
    if not child:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()

for to, file in enumerate((os.devnull, *call["streams"])):
    os.dup2(os.open(file, os.O_RDWR), to)
os.chdir(call["folder"])
os.environ.update(call["environment"])
first, *sys.argv = call["arguments"]
if first == "-c":
    source, sys.argv[0] = sys.argv[0], "-c"
    exec(compile(source, "<string>", "exec"), {"__name__": "__main__"})
elif first == "-m":
    sys.path.insert(0, call["folder"])
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
else:
    sys.argv.insert(0, first)
    sys.path.insert(0, os.path.dirname(first))
    runpy.run_path(first, run_name="__main__")
"""


@functools.cache
def server():
    """The process that forks, of this worker."""
    import jax  # the settings of tests/conftest.py stand

    # The tests' compilation cache: compiling is most of what these programs do.
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(pathlib.Path(__file__).parent.parent),
    }
    started = subprocess.Popen(
        [sys.executable, "-c", SERVER], env=environment, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True, bufsize=1,
    )
    atexit.register(started.communicate)  # no more input: it ends
    return started


def run(*arguments, folder=None, **environment):
    """As `subprocess.run([sys.executable, *arguments], capture_output=True, text=True)`."""
    folder = str(folder or pathlib.Path.cwd())
    arguments = [str(a) for a in arguments]
    with tempfile.TemporaryDirectory() as streams:
        files = [pathlib.Path(streams, name) for name in ("out", "err")]
        for file in files:
            file.touch()
        call = {"arguments": arguments, "folder": folder, "environment": environment,
                "streams": [str(file) for file in files]}
        server().stdin.write(json.dumps(call) + "\n")
        status = int(server().stdout.readline())
        return subprocess.CompletedProcess(arguments, status, *(f.read_text() for f in files))
