"""The meter refuses wrong gradients; the table, results files and comparisons say what they say."""

import io
import json
from pathlib import Path
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import pytest

import benchmarks.rows  # noqa: F401  (fills the table of rows)
import fbprop
from benchmarks import adam, report
from benchmarks.adam import plain_adam
from benchmarks.meter import (
    Disagreement,
    interleave,
    measure,
    measure_peer,
    relative_difference,
)
from benchmarks.peers import MODULES, missing, step
from benchmarks.row import SIZES, Draw, entries, loss_gradient, operation
from benchmarks.rows import steps
from forked import run

pytestmark = pytest.mark.usefixtures("caches_kept")

ROOT = Path(__file__).parent.parent

SCALED = fbprop.table.override(
    fbprop.rule("tanh", "wrong by a thousandth", x=lambda dy, out: 1.001 * dy * (1 - out * out))
)
WRONG = SimpleNamespace(vjp=lambda f, *x: fbprop.vjp(f, *x, rules=SCALED))


def tanh_row():
    x = Draw().normal(5, 7)
    return operation(jnp.tanh, [x], name="tanh", size="B5 D7", flops=35.0, bytes=4 * x.nbytes)


def test_the_meter_reports_agreement_time_memory_and_compile_time():
    measured = measure(tanh_row(), fbprop, jax, seconds=0.0)
    assert measured.agreement <= 1e-6
    low, middle, high = measured.time_ratio()
    assert 0 < low <= middle <= high
    assert len(measured.seconds[0]) == len(measured.seconds[1]) == 5
    assert measured.memory_ratio() is not None
    assert measured.compile_ratio() > 0


def test_a_wrong_gradient_is_never_timed():
    with pytest.raises(Disagreement, match=r"of 1\.00e-03 expected at most 1e-05"):
        measure(tanh_row(), WRONG, jax, seconds=0.0)


@pytest.mark.parametrize(("got", "expected", "difference"), [
    ([1.0, 2.0], [1.0, 2.0], 0.0),
    ([1.0, 2.5], [1.0, 2.0], 0.25),
    ([0.0, jnp.nan], [0.0, 1.0], float("inf")),
    ([1.0, 0.0], [0.0, 0.0], float("inf")),
])
def test_relative_difference(got, expected, difference):
    assert relative_difference({"a": jnp.array(got)}, {"a": jnp.array(expected)}) == difference


@pytest.fixture
def squares_row(monkeypatch):
    # Optax's own code promotes an int32 step count to float, which the strict setting refuses.
    monkeypatch.setattr(adam, "scale_by_adam", plain_adam)
    loss = lambda w, x: jnp.mean((x @ w) ** 2)
    return steps.training_step(loss, Draw().weight(5, 3), [Draw(1).normal(7, 5)])


def test_a_peer_must_have_the_same_loss(squares_row):
    def peer(factor):
        return lambda w, batch: lambda: factor * float(jnp.mean((batch[0] @ w) ** 2))

    measured = measure_peer(squares_row, fbprop, "peer", peer(1.0), seconds=0.0)
    assert measured.against == "peer"
    assert measured.memory_ratio() is None
    with pytest.raises(Disagreement, match=r"difference of 1\.00e-03 expected at most 1e-04"):
        measure_peer(squares_row, fbprop, "peer", peer(1.001), seconds=0.0)


def test_a_peer_of_no_step_must_have_the_same_result():
    row = loss_gradient(lambda w, x: jnp.mean(x @ w), Draw().normal(3), [Draw(1).normal(2, 3)])

    def peer(params, batch):
        return lambda: (jnp.mean(batch[0] @ params), jnp.mean(batch[0], 0))

    measured = measure_peer(row, fbprop, "peer", peer, seconds=0.0)
    assert measured.agreement < 1e-5


def test_a_missing_peer_is_said(monkeypatch):
    monkeypatch.setitem(MODULES, "nobody", ["nobody_steps"])
    assert "nobody_steps" in missing(["nobody"])["nobody"]
    assert step("nobody", "mlp_step") is None


def test_samples_are_interleaved():
    calls, clock = [], iter(range(99)).__next__
    interleave([lambda: calls.append("a"), lambda: calls.append("b")], 0.0, clock)
    sampled = "".join(calls).partition("bbbb")[2]  # after calibration: four calls of each
    turns = [c for c, previous in zip(sampled, " " + sampled) if c != previous]
    assert turns == ["a", "b"] * 5


def records(ratio=0.5, **changes):
    measured = measure(tanh_row(), fbprop, jax, seconds=0.0)
    source = {"device": "d", "commit": "c"}
    one = report.record(measured, "operation", source)
    return [{**one, "time_ratio": [ratio * 0.9, ratio, ratio * 1.1], **changes}]


def test_a_record_survives_json_and_fills_the_table(tmp_path):
    (one,) = records()
    path = tmp_path / "results.json"
    path.write_text(json.dumps(one) + "\n")
    (again,) = report.read(path)
    assert again == json.loads(json.dumps(one))
    assert again["dtype"] == "float32"
    assert again["shapes"] == ["5x7"]
    assert {"device", "commit", "gflops", "share_of_copy"} <= again.keys()
    titles, line = report.header().split(), report.line(again)
    assert titles[:5] == ["row", "size", "against", "agree", "time"]
    assert line.startswith("tanh ")
    assert " 0.500 " in line


def test_geometric_means_and_the_markdown_table():
    both = records(0.5, temp_bytes=[0, 1 << 14]) + records(2.0, temp_bytes=[1 << 14, 1 << 14])
    (mean,) = report.means(both)
    assert "time 1.000 (worst 2.000), memory 0.500 (worst 1.000)" in mean
    assert "| tanh | B5 D7 | jax | 0.50 |" in report.markdown(both)[2]
    assert len(report.markdown(both, "relu,sin")) == 3


def test_compare_says_what_moved():
    before = records(0.5, temp_bytes=[1 << 14, 1 << 14])
    assert report.compare(before, records(0.52, temp_bytes=[1 << 14, 1 << 14])) == ["nothing moved"]
    after = records(0.8, temp_bytes=[1 << 13, 1 << 14])
    assert report.compare(before, after) == [
        "tanh B5 D7 jax: memory ratio 1.000 -> 0.500", "tanh B5 D7 jax: time ratio 0.500 -> 0.800",
    ]
    assert report.compare(before, []) == ["tanh B5 D7 jax: only in the first file"]
    failed = [{"row": "tanh", "size": "B5 D7", "against": "jax",
               "error": "MissingRule: x"}]
    assert report.compare(before, failed) == ["tanh B5 D7 jax: measured -> MissingRule: x"]
    assert report.line(failed[0]).endswith("FAILED MissingRule: x")


def test_progress_without_a_terminal_is_one_line_per_row():
    stream = io.StringIO()
    progress = report.Progress(2, stream)
    progress.start(entries("smoke")[0])
    progress.clear()
    assert stream.getvalue().startswith("[1/2] ")
    assert stream.getvalue().count("\n") == 1


def test_plain_adam_is_adam():
    optimizer, params = plain_adam(), jnp.array([1.0, -2.0])
    state, gradient = optimizer.init(params), jnp.array([3.0, -0.25])
    for _ in range(3):
        update, state = optimizer.update(gradient, state)
        chex.assert_trees_all_close(update, jnp.sign(gradient), rtol=1e-4)


def test_every_row_has_every_size():
    names = [{e.name for e in entries(size) if not e.accelerator} for size in SIZES]
    assert names[0] == names[1] == names[2]
    assert len(names[0]) > 30


def command(*arguments, status=0):
    done = run("-m", "benchmarks", *arguments, folder=ROOT, XLA_FLAGS="")
    assert done.returncode == status, done.stderr
    return done.stdout if status == 0 else done.stderr


def test_the_command_prints_a_table_and_writes_a_results_file(tmp_path):
    path = str(tmp_path / "results.json")
    out = command("--size", "smoke", "--only", "=where,=mlp_step", "--json", path, "--threads", "1",
                  "--clock", "cpu", "--seconds", "0.01")
    rows = report.read(path)
    assert [(r["row"], r["threads"]) for r in rows] == [("where", 1), ("mlp_step", 1)]
    assert "step rows against jax (1): geometric mean time" in out
    assert command("compare", path, path) == "nothing moved\n"
    assert command("markdown", path).startswith("| row | size |")
    steps = command("markdown", path, "step")
    assert "mlp_step" in steps
    assert "where" not in steps


@pytest.mark.parametrize(("name", "rows"), [
    ("cpu-jax0.10.2", ["_step,_epoch"]), ("h100-jax0.12.0.1", ["_step,_epoch"]),
    ("v5e-jax0.12.0.1", ["_step,_epoch"]), ("operations-cpu-jax0.10.2", []),
    ("operations-h100-jax0.12.0.1", []), ("operations-v5e-jax0.12.0.1", []),
    ("networks-cpu-jax0.10.2", []), ("sharded-jax0.12.0.1", []), ("large-jax0.12.0.1", []),
])
def test_the_readmes_tables_are_those_of_the_results_files(name, rows):
    readme = (ROOT / "benchmarks/results/README.md").read_text()
    table = command("markdown", f"benchmarks/results/{name}.json", *rows)
    assert len(table.splitlines()) > 10
    assert table in readme


def test_the_command_says_what_it_cannot_do():
    assert "--only names a row, got 'nothing'" in command("--only", "nothing", status=1)
    assert "compare takes results files, got 1 expected 2" in command("compare", "a", status=1)


def test_complex_results_are_compared_whole():
    a = jnp.array([3.0 + 4.0j])
    assert relative_difference(a, a) == 0.0
    assert relative_difference(a, jnp.conj(a)) == pytest.approx(8 / 5)
