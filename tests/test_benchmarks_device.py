"""`python -m benchmarks device`: order, agreement, what is written when it is cut off or fails."""

import json

import pytest

import fbprop
from benchmarks import __main__ as command
from benchmarks import device

SOURCE = {"device": "NVIDIA H100 80GB HBM3", "versions": {}, "commit": "c"}


def test_every_family_of_rules_is_looked_at():
    families = device.families()
    assert {"contraction", "convolution", "elementwise", "linalg", "control"} <= set(families)
    assert "case" not in families


def test_a_family_agrees_and_a_wrong_rule_is_found(monkeypatch):
    found = device.agreement("reduction", "float32", SOURCE)
    assert found["rows"] > 5
    assert found["agreement"] < 1e-5
    assert "error" not in found
    wrong = fbprop.rule("cumsum", "off", x=lambda dy: dy)
    monkeypatch.setattr(fbprop.rules, "_current", fbprop.table.override(wrong))
    found = device.agreement("cumulative", "float32", SOURCE)
    assert found["error"].startswith("Disagreement: cumsum")
    assert "FAILED Disagreement" in device.line(found)


def test_what_this_machine_cannot_do_is_named():
    found = device.agreement("linalg", "bfloat16", SOURCE)
    assert found["rows"] == 0
    assert found["agreement"] == 0.0


def test_throughput_of_a_gpt():
    entry = next(e for e in device._entries("smoke", device.GPT))
    batch, length = entry.dims[:2]
    found = device.throughput(entry, {**SOURCE, "seconds": [0.5, 1.0]})
    assert found["tokens_per_second"] == [2 * batch * length, batch * length]
    ours, theirs = found["model_flops_utilisation"]
    assert ours == 2 * theirs == entry.row().flops / 0.5 / 989e12
    assert "model_flops_utilisation" not in device.throughput(
        entry, {"device": "cpu", "seconds": [1.0, 1.0]}
    )


def test_a_batch_that_does_not_fit_is_no_failure(monkeypatch):
    entry = next(e for e in device._entries("smoke", device.GPT))
    error = {"row": "gpt", "size": "B64", "kind": "step", "against": "jax",
             "error": "JaxRuntimeError: RESOURCE_EXHAUSTED: out of memory"}
    monkeypatch.setattr(device.suite, "records", lambda *_: [dict(error)])
    fits = []
    (record,) = device._largest(entry, 0.0, SOURCE, fits)
    assert fits == []
    assert "error" not in record
    assert device.line(record).endswith("does not fit")


@pytest.fixture
def short(monkeypatch):
    """A run of one family in one precision, and no steps."""
    monkeypatch.setattr(device, "families", lambda: ["reduction", "ordering"])
    monkeypatch.setattr(device, "TOLERANCES", {"float32": 1e-4})
    for name in ("GPT", "STEPS", "ROWS"):
        monkeypatch.setattr(device, name, ())


def test_results_are_written_as_they_come_until_time_is_over(short, tmp_path, capsys):
    path = tmp_path / "results.json"
    arguments = ["device", "--size", "smoke", "--json", str(path)]
    assert command.main(arguments) == 0
    rows = [json.loads(text) for text in path.read_text().splitlines()]
    assert [(r["row"], r["kind"]) for r in rows] == [
        ("reduction", "agreement"), ("ordering", "agreement"),
    ]
    assert rows[0]["platform"] == "cpu"
    path.unlink()
    assert command.main([*arguments, "--minutes", "0"]) == 0
    assert len(path.read_text().splitlines()) == 1
    assert "0 minutes are over: the rest is not measured." in capsys.readouterr().out


def test_a_failure_is_the_exit_status(short, monkeypatch):
    failing = {**SOURCE, "row": "r", "size": "s", "kind": "agreement", "against": "jax",
               "error": "why"}
    monkeypatch.setattr(device, "agreement", lambda *_: failing)
    written = []
    assert device.run("smoke", 1.0, 0.0, written.append) == 1
    assert written == [failing, failing]


def test_the_order_is_by_importance():
    entries = device._entries("smoke", device.STEPS + device.ROWS)
    names = list(dict.fromkeys(e.name for e in entries))
    assert names[:3] == ["resnet_step", "vit_step", "lstm_character_step"]
    assert names[-1] == "embedding"
