"""Programs compiled for a device that is not there: what is counted, printed, and refused."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import fbprop
from benchmarks import report, suite, targets
from benchmarks.meter import relative_difference
from benchmarks.row import Draw, Row, entries, operation
from benchmarks.rows import accelerator_steps
from benchmarks.rows.steps import classification
from benchmarks.targets import compiled, kernels, loops
from benchmarks.targets import report as lines

pytestmark = pytest.mark.usefixtures("caches_kept")

PROGRAM = """HloModule jit_f, is_scheduled=true

%fused (p: f32[4,8]) -> f32[4,8] {
  %p = f32[4,8]{1,0} parameter(0)
  ROOT %n = f32[4,8]{1,0} negate(%p)
}

%body (s: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %s = (s32[], f32[4,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = f32[4,8]{1,0} get-tuple-element(%s), index=1
  %y = f32[4,8]{1,0} fusion(%x), kind=kLoop, calls=%fused
  ROOT %t = (s32[], f32[4,8]{1,0}) tuple(%i, %y)
}

%condition (s.1: (s32[], f32[4,8])) -> pred[] {
  %s.1 = (s32[], f32[4,8]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%s.1), index=0
  %c = s32[] constant(5)
  ROOT %less = pred[] fusion(%i.1, %c), kind=kLoop, calls=%fused
}

%wide (a: bf16[4,8]) -> f32[4,8] {
  %a = bf16[4,8]{1,0} parameter(0)
  ROOT %b = f32[4,8]{1,0} fusion(%a), kind=kLoop, calls=%fused
}

%narrow (a.1: bf16[4,8]) -> f32[4,8] {
  %a.1 = bf16[4,8]{1,0} parameter(0)
  ROOT %z = f32[4,8]{1,0} bitcast(%a.1)
}

ENTRY %main (q: f32[4,8], r: bf16[4,8], k: s32[]) -> (f32[4,8], f32[4]) {
  %q = f32[4,8]{1,0} parameter(0)
  %r = bf16[4,8]{1,0} parameter(1)
  %k = s32[] parameter(2)
  %zero = s32[] constant(0)
  %start = (s32[], f32[4,8]{1,0}) tuple(%zero, %q)
  %loop = (s32[], f32[4,8]{1,0}) while(%start), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"5"}}
  %out = f32[4,8]{1,0} get-tuple-element(%loop), index=1
  %choice = f32[4,8]{1,0} conditional(%k, %r, %r), branch_computations={%narrow, %wide}
  %c1 = ((f32[4,8]{1,0}), f32[4]{0}, s32[]) async-start(%out), calls=%fused
  %c2 = f32[4]{0} async-done(%c1)
  %dot = (f32[4]{0}, s8[16]{0}) custom-call(%out, %choice), custom_call_target="__cublas$gemm"
  %first = f32[4]{0} get-tuple-element(%dot), index=0
  ROOT %both = (f32[4,8]{1,0}, f32[4]{0}) tuple(%out, %first)
}
"""


def test_operands_and_results_of_kernels_are_counted():
    array, wide = 4 * 8 * 4, 4 * 8 * 2 + 4 * 8 * 4
    loop = 5 * (2 * array + 4 + 4 + 1)
    negated = 2 * array  # the computation of the asynchronous call: one `negate`
    product = 2 * array + 4 * 4 + 16
    assert kernels.count(PROGRAM) == (loop + wide + negated + product, 10 + 1 + 1 + 1)


def test_a_real_program_is_counted():
    """Compiled for this machine: a loop's passes, and a product beside them."""
    x = jnp.ones((64, 64))
    step = lambda x, _: (jnp.tanh(x) * 2.0, None)
    text = jax.jit(lambda x: lax.scan(step, x, None, length=7)[0]).lower(x).compile().as_text()
    work = kernels.count(text)
    assert 7 * 2 * x.nbytes <= work.bytes < 7 * 2 * x.nbytes + 4 * x.nbytes
    assert work.kernels >= 7


TPU = """HloModule jit_f, is_scheduled=true

%replaced (p: f32[9,4,100], q: f32[1,4,100], i: s32[]) -> f32[9,4,100] {
  %p = f32[9,4,100]{2,1,0:T(8,128)} parameter(0)
  %q = f32[1,4,100]{2,1,0:T(8,128)} parameter(1)
  %i = s32[] parameter(2)
  ROOT %u = f32[9,4,100]{2,1,0:T(8,128)} dynamic-update-slice(%p, %q, %i)
}

%looked_up (p: f32[9,4,100], i: s32[]) -> f32[1,4,100] {
  %i = s32[] parameter(1)
  %p = f32[9,4,100]{2,1,0:T(8,128)} parameter(0)
  ROOT %s = f32[1,4,100]{2,1,0:T(8,128)} dynamic-slice(%p, %i), dynamic_slice_sizes={1,4,100}
}

%body (s: (s32[], f32[9,4,100])) -> (s32[], f32[9,4,100]) {
  %s = (s32[], f32[9,4,100]{2,1,0:T(8,128)}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = f32[9,4,100]{2,1,0:T(8,128)} get-tuple-element(%s), index=1
  %y = f32[1,4,100]{2,1,0:T(8,128)} fusion(%x, %i), kind=kLoop, calls=%looked_up
  %z = f32[9,4,100]{2,1,0:T(8,128)} fusion(%x, %y, %i), kind=kLoop, calls=%replaced
  ROOT %t = (s32[], f32[9,4,100]{2,1,0:T(8,128)}) tuple(%i, %z)
}

%condition (s: (s32[], f32[9,4,100])) -> pred[] {
  %s = (s32[], f32[9,4,100]) parameter(0)
  %n = s32[]{:T(128)} constant(9)
  %i = s32[] get-tuple-element(%s), index=0
  ROOT %l = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (q: (s32[], f32[9,4,100])) -> (s32[], f32[9,4,100]) {
  %q = (s32[], f32[9,4,100]) parameter(0)
  %n = s32[]{:T(128)} constant(7)
  ROOT %w = (s32[], f32[9,4,100]) while(%q), condition=%condition, body=%body, metadata={}
}
"""


def test_loops_of_a_tpu_are_counted_by_slices_in_whole_tiles():
    tile = 8 * 128 * 4
    one = 2 * (tile + 4) + 2 * tile + 9  # a slice read and written, one read and replaced; i < n
    assert loops.repeated_bytes(loops.with_trips(TPU)) == 8 * one
    assert loops.repeated_bytes(TPU) == 0  # nothing says how often


@pytest.fixture
def here():
    """A target that is this machine, so that the whole way is gone without another compiler."""
    return jax.devices()[0]


def test_rows_are_compiled_and_not_run(here):
    def poisoned(ad):
        def run(x):
            jax.debug.callback(lambda: pytest.fail("the program ran"))
            return ad.grad(lambda x: jnp.sum(jnp.tanh(x)))(x)

        return run

    row = operation(jnp.tanh, [Draw().normal(64, 64)], name="tanh", size="B64 D64")
    measured = compiled.measure(row, fbprop, jax, here)
    assert measured.moved_bytes[0] >= 2 * 64 * 64 * 4
    assert measured.flops == measured.seconds == (None, None)
    assert compiled.measure(Row(poisoned, (jnp.ones((64, 64)),)), fbprop, jax, here).kernels[0] >= 1


def record(**changes):
    source = {"target": "v5e", "device": "TPU v5e", "commit": "c"}
    row = operation(jnp.tanh, [Draw().normal(5, 7)], name="tanh", size="B5 D7")
    measured = compiled.Compiled(row, "jax", (1 << 20, 1 << 21), (300, 1 << 20), (3, 5),
                                 (1e9, 1e9), (None, None))
    return {**lines.record(measured, "operation", source), **changes}


def test_ratios_leave_out_noise_and_what_is_not_known():
    assert lines.ratios(record()) == {
        "memory": 0.5, "moved": (1 << 16) / (1 << 20), "kernels": 1.0, "flops": 1.0,
    }


def test_a_record_fills_the_table_survives_json_and_compares():
    one = json.loads(json.dumps(record()))
    line = report.line(one)
    assert line.startswith("tanh ")
    assert " 0.500 " in line
    assert report.header(lines.COLUMNS).split()[:4] == ["row", "size", "against", "memory"]
    assert "memory 0.500 (worst 0.500)" in report.means([one])[0]
    assert "on v5e" in report.means([one])[0]
    table = report.markdown([one])
    assert table[0] == "| row | size | against | temporary memory | bytes moved | kernels |"
    assert table[2] == "| tanh | B5 D7 | jax | 0.50 | 0.06 | 1.00 |"
    (moved,) = report.compare([one], [record(temp_bytes=[1 << 21, 1 << 21])])
    assert moved == "tanh B5 D7 jax v5e: memory ratio 0.500 -> 1.000"
    assert report.compare([one], [one]) == ["nothing moved"]
    failed = {k: one[k] for k in ("row", "size", "kind", "against", "target")} | {"error": "why"}
    assert report.line(failed).endswith("FAILED why")
    assert report.means([failed]) == []


def test_the_command_prints_means_and_the_exit_status(monkeypatch, capsys, here):
    monkeypatch.setattr(targets, "devices", lambda name: [here])
    monkeypatch.setattr(targets, "compiler", lambda name: "xla 1")
    chosen = [e for e in entries("smoke") if e.name in ("where", "mlp_eager")]
    written = []
    assert suite.compile_for("v5e", chosen, written.append) == 0
    assert [(r["row"], r["target"]) for r in written] == [("where", "v5e")]  # not a cost
    assert "operation rows against jax on v5e (1): geometric mean" in capsys.readouterr().out
    broken = chosen[0]._replace(make=lambda draw: 1 / 0, dims=())
    assert suite.compile_for("v5e", [broken], written.append) == 1
    assert written[-1]["error"].startswith("ZeroDivisionError")


def test_rows_at_an_accelerators_sizes_are_only_compiled():
    lines = lambda **options: {e[:3] for e in suite.selected("", "full", **options)}
    more = {(name, dims) for name, _, dims in lines(accelerator=True) - lines()}
    assert more >= {
        ("gpt2_124m_step", (32, 1024, 12, 768, 50304)), ("resnet50_step", (64, 224, 64)),
        ("vit_b_step", (64, 224, 16, 12, 768, 12)), ("lstm_character_step", (256, 64, 1024)),
        ("word_embedding_step", (8192, 262144, 128, 5)),
    }


def test_a_small_residual_network_of_their_shape_agrees_with_jax():
    draw = Draw()
    params = accelerator_steps.bottleneck_params(draw, (1, 1), 4, 5)
    batch = draw.normal(3, 32, 32, 3), draw.integers(5, 3)
    loss = classification(accelerator_steps.bottleneck_resnet)
    both = lambda *args: [ad.value_and_grad(loss)(*args) for ad in (fbprop, jax)]
    assert relative_difference(*jax.jit(both)(params, *batch)) < 1e-4


def test_what_is_missing_is_said(monkeypatch):
    names = "h100, v5e, v5e:4x4, h100:8"
    with pytest.raises(SystemExit, match=rf"--target is one of {names}, got 'h200'\."):
        targets.prepare("h200")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"got no module libtpu: pip install '\.\[target-v5e\]'"):
        targets.prepare("v5e")


def test_the_description_of_the_h100_is_whole():
    text = targets.DESCRIPTION.read_text()
    assert "compute_capability" in text
    assert text.count("{") == text.count("}")
