"""Every Python block of the README runs, in order, in one namespace; every doctest runs."""

import doctest
import importlib
import pathlib
import pkgutil
import re

import pytest

import fbprop

README = pathlib.Path(__file__).parent.parent / "README.md"


def test_every_python_block_of_the_readme_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 5
    namespace = {"__name__": "readme"}
    for number, block in enumerate(blocks):
        exec(compile(block, f"README block {number}", "exec"), namespace)
    assert "y = tanh x" in capsys.readouterr().out


def modules():
    found = pkgutil.walk_packages(fbprop.__path__, "fbprop.")
    return [m.name for m in found if not m.name.endswith("__main__")]


@pytest.mark.parametrize("name", modules())
def test_docstring_examples(name):
    module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert result.failed == 0
