"""Every example runs from the command line and prints what it promises."""

import os
import pathlib
import re
import subprocess
import sys

import jax

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


def run(*arguments):
    root = str(EXAMPLES.parent)
    # The tests' compilation cache: compiling is nearly all that a smoke run does.
    cache = {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
             "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3"}
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": root} | cache
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=env,
                          check=False)


def test_digits_smoke():
    result = run(EXAMPLES / "digits.py", "--smoke", "--optimizer", "sgd", "--seed", "1")
    assert result.returncode == 0, result.stderr
    assert re.search(r"^device: cpu", result.stdout, re.M)
    difference = re.search(r"largest relative difference to jax.grad (\S+)", result.stdout)
    assert float(difference[1]) < 1e-5
    epochs = re.findall(
        r"^epoch +(\d)  loss ([\d.]+)  train accuracy ([\d.]+)  test accuracy ([\d.]+) +([\d,]+) "
        r"examples/s", result.stdout, re.M)
    assert [e[0] for e in epochs] == ["1", "2"]
    assert float(epochs[1][1]) < float(epochs[0][1])
    final = re.search(
        r"^test accuracy ([\d.]+) after \d+ s; worst pair: \d read as \d, \d+ of \d+$",
        result.stdout, re.M)
    assert final[1] == epochs[1][3]
    assert float(final[1]) > 0.3  # a tenth is chance


def test_digits_says_when_matplotlib_is_missing():
    without = ("import runpy, sys; sys.modules['matplotlib'] = None; "
               f"sys.argv = ['digits.py', '--plot', 'x.png']; "
               f"runpy.run_path({str(EXAMPLES / 'digits.py')!r}, run_name='__main__')")
    result = run("-c", without)
    assert result.returncode == 2
    assert "--plot draws with matplotlib, which is missing: pip install matplotlib" in result.stderr
