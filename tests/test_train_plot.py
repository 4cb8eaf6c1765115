"""Curves from a log: what is drawn, by which command, and what it says when it cannot."""

import json
import sys
import types

import pytest

from fbprop.train import plot

ROWS = [
    {"step": 10, "epoch": 1, "train": {"loss": 2.0}, "held_out": {"loss": 2.5, "accuracy": 0.5}},
    {"step": 20, "epoch": 2, "train": {"loss": 1.0}, "held_out": {"loss": None, "accuracy": 0.6}},
    {"step": 30, "epoch": 3, "train": {"loss": 0.5}, "held_out": {"loss": 2.0, "accuracy": 0.7}},
]


@pytest.fixture
def log(tmp_path):
    file = tmp_path / "log.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


@pytest.fixture
def drawing(monkeypatch):
    """Stands in for matplotlib, which the tests do without: records what is drawn."""
    calls = []

    class Panel:
        def plot(self, steps, values, style, color, label):
            calls.append((label, style, color, steps, values))

        def set(self, xlabel, ylabel):
            calls.append((xlabel, ylabel))

        def legend(self):
            pass

    class Figure:
        def __init__(self, figsize, layout):
            pass

        def subplots(self, rows, columns, squeeze):
            return [[Panel() for _ in range(columns)]]

        def savefig(self, file, dpi):
            calls.append(file)

    for name in ("matplotlib", "matplotlib.figure"):
        module = types.ModuleType(name)
        module.Figure = Figure
        monkeypatch.setitem(sys.modules, name, module)
    return calls


def test_one_panel_a_metric_without_what_is_not_finite(log, drawing, capsys):
    assert plot.main([str(log), "-o", "out.png"]) == 0
    assert drawing == [
        ("training", "--", "C0", [10, 20, 30], [2.0, 1.0, 0.5]),
        ("held-out", "-", "C0", [10, 30], [2.5, 2.0]),
        ("step", "loss"),
        ("held-out", "-", "C0", [10, 20, 30], [0.5, 0.6, 0.7]),
        ("step", "accuracy"),
        "out.png",
    ]
    assert capsys.readouterr().out == "out.png\n"


def test_several_logs_are_told_apart(log, drawing, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps(ROWS[0]) + "\n")
    plot.main([str(log), str(other)])
    labels = [(call[0], call[2]) for call in drawing if len(call) == 5]
    assert ("log, held-out", "C0") in labels
    assert ("other, training", "C1") in labels


def failure(capsys, *arguments):
    with pytest.raises(SystemExit) as info:
        plot.main([str(a) for a in arguments])
    assert info.value.code == 2
    return capsys.readouterr().err


def test_what_cannot_be_drawn_is_said(log, drawing, tmp_path, capsys):
    (tmp_path / "empty").write_text("")
    assert "got logs without rounds, ['empty']" in failure(capsys, tmp_path / "empty")
    assert "No such file" in failure(capsys, tmp_path / "missing")
    (tmp_path / "csv").write_text("step,loss\n1,2\n")
    assert "got 'step,loss' in line 1" in failure(capsys, tmp_path / "csv")


def test_a_missing_matplotlib_is_said(log, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "which is missing: pip install matplotlib" in failure(capsys, log)
