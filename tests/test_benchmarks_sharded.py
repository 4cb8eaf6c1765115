"""Programs for several devices: what they send is counted, printed, and compared."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest

import fbprop
from benchmarks import adam, report, suite
from benchmarks.meter import Disagreement
from benchmarks.row import Draw, entries
from benchmarks.rows import large, sharded
from benchmarks.sharded import compiled, estimate
from benchmarks.sharded import report as lines
from benchmarks.sharded.collectives import collectives
from benchmarks.targets.loops import with_trips

pytestmark = pytest.mark.usefixtures("caches_kept")

PROGRAM = """HloModule jit_f, is_scheduled=true

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}

%body (s: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %s = (s32[], f32[4,8]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = f32[4,8]{1,0} get-tuple-element(%s), index=1
  %r = f32[4,8]{1,0} all-reduce(%x), replica_groups={{0,1}}, to_apply=%sum
  ROOT %t = (s32[], f32[4,8]) tuple(%i, %r)
}

%condition (s: (s32[], f32[4,8])) -> pred[] {
  %s = (s32[], f32[4,8]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  ROOT %l = pred[] compare(%i, %i), direction=LT
}

ENTRY %main (p: f32[2,8], q: (s32[], f32[4,8])) -> f32[4,8] {
  %p = f32[2,8]{1,0} parameter(0)
  %q = (s32[], f32[4,8]) parameter(1)
  %w = (s32[], f32[4,8]) while(%q), condition=%condition, body=%body, TRIPS
  %g = (f32[2,8]{1,0}, f32[4,8]{1,0}) all-gather-start(%p), dimensions={0}
  ROOT %d = f32[4,8]{1,0} all-gather-done(%g)
}
""".replace("TRIPS", 'backend_config={"known_trip_count":{"n":"5"}}')


def test_loops_count_as_often_as_they_run_and_two_halves_once():
    count, sizes = collectives(PROGRAM)
    assert count == {"all-reduce": 5, "all-gather": 1}
    assert sizes == {"all-reduce": 5 * 128, "all-gather": 128}


TPU = """HloModule jit_f, is_scheduled=true

%begun (p: f32[2,8]) -> f32[4,8] {
  %p = f32[2,8]{1,0} parameter(0)
  ROOT %a = f32[4,8]{1,0} all-gather(%p), channel_id=7, replica_groups=GROUPS, dimensions={0}
}

%ended (p: f32[2,8]) -> f32[4,8] {
  %p = f32[2,8]{1,0} parameter(0)
  ROOT %b = f32[4,8]{1,0} all-gather(%p), channel_id=7, replica_groups=GROUPS, dimensions={0}
}

%body (s: (s32[], f32[2,8])) -> (s32[], f32[2,8]) {
  %s = (s32[], f32[2,8]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = f32[2,8]{1,0} get-tuple-element(%s), index=1
  %y = f32[4,8]{1,0} fusion(%x), kind=kLoop, calls=%begun
  %z = f32[4,8]{1,0} fusion(%x), kind=kLoop, calls=%ended
  ROOT %t = (s32[], f32[2,8]) tuple(%i, %x)
}

%condition (s: (s32[], f32[2,8])) -> pred[] {
  %s = (s32[], f32[2,8]) parameter(0)
  %n = s32[]{:T(128)} constant(5)
  %i = s32[] get-tuple-element(%s), index=0
  ROOT %l = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (q: (s32[], f32[2,8])) -> (s32[], f32[2,8]) {
  %q = (s32[], f32[2,8]) parameter(0)
  ROOT %w = (s32[], f32[2,8]) while(%q), condition=%condition, body=%body, metadata={}
}
"""


def test_a_tpus_loops_and_what_it_does_in_several_fusions():
    text = TPU.replace("GROUPS", "{{0,1}}")
    assert collectives(text) == ({"all-gather": 5}, {"all-gather": 5 * 128})
    assert estimate.received_bytes(text, 8) == 5 * 64  # half of it from the other
    assert with_trips(PROGRAM) == PROGRAM


@pytest.mark.parametrize(("groups", "n"), [
    ("{{0,1,2},{3,4,5}}", 3), ("[2,4]<=[8]", 4), ("[4,2]<=[2,4]T(1,0)", 2),
    ("mesh['data'=2,'model'=4] {'data'}", 2), ("mesh['a'=2,'b'=4] {'a','b'}", 8), ("{}", 16),
])
def test_how_many_take_part(groups, n):
    assert estimate.group_size(f", replica_groups={groups}, dimensions=(0)", 16) == n


def test_an_estimate_is_the_slowest_part_and_what_is_sent():
    rates = estimate.Rates(flops=8.0, memory=2.0, link=4.0, capacity=100)
    assert estimate.seconds(rates, flops=6.0, memory=0.5, received=8.0) == 1.0 + 2.0
    assert estimate.seconds(rates, flops=6.0, memory=3.0, received=0.0) == 3.0


def test_a_target_of_several_says_memory_time_and_share():
    figures = {"collectives": (3, 3), "sent_bytes": (9, 9), "temp_bytes": (5, 5),
               "kinds": ({"all-gather": 3},) * 2}
    big = sharded.Row(None, (), name="big", size="data16", flops=16 * 197e12 * 6 / 8)
    measured = compiled.Spread(big, "jax", **figures, chip_bytes=(2 * 10**9, 10**9),
                               received_bytes=(200 * 10**9, 0))
    source = {"target": "v5e:4x4", "devices": 16}
    one = json.loads(json.dumps(lines.record(measured, "sharded", source)))
    assert one["seconds"] == pytest.approx([2.0, 1.0])
    assert one["utilisation"] == pytest.approx([0.375, 0.75])
    assert one["room_bytes"] == estimate.RATES["v5e"].capacity - 2 * 10**9
    cells = report.line(one).split()
    assert cells[6:12] == ["3", "0.00", "2.00", f"{one['room_bytes'] / 1e9:.2f}", "2000", "38%"]


def test_models_that_need_several_are_only_shapes():
    chosen = suite.selected("_step_sharded", "full", accelerator=True, devices=16)
    assert {e.name for e in chosen} == {"gpt2_xl_step_sharded", "llama_7b_step_sharded"}
    for entry in chosen:
        row = entry.row()
        weights = sum(x.size for x in jax.tree.leaves(row.inputs[0][0]))
        assert {"gpt2_xl": 1.6e9, "llama_7": 6.7e9}[entry.name[:7]] == pytest.approx(weights, 0.03)
        assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(row.inputs[0]))
        loss = jax.eval_shape(row.build(fbprop), *row.inputs)[1]
        assert (loss.shape, loss.dtype) == ((), np.float32)


def test_a_small_one_of_their_shape_agrees_with_jax(monkeypatch):
    # Optax's own code promotes an int32 step count to float, which the strict setting refuses.
    monkeypatch.setattr(adam, "scale_by_adam", adam.plain_adam)
    small = large.large_step(Draw(), 4, 4, 2, 1, 1, layers=1, D=16, hidden=32, heads=2, V=16,
                             llama=True)
    draw = Draw()

    def fill(x):
        integers = x.dtype == np.int32
        return draw.integers(16, *x.shape) if integers else draw.normal(*x.shape, scale=0.3)

    state, batch, _ = small.inputs
    moments = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), state[1])
    inputs = (jax.tree.map(fill, state[0]), moments), jax.tree.map(fill, batch), np.float32(0)
    # bfloat16 has 8 bits, and moments hold squares of gradients.
    full = replace(small, inputs=inputs, probe=inputs, tolerance=0.1)
    assert compiled.measure(full, fbprop, jax, devices()).agreement > 0


def row(**options):
    return sharded.sharded_gradient(sharded.of_mlp, Draw(), 8, 1, 1, **options)


def devices():
    return np.array(jax.devices())


def test_a_record_fills_the_table_survives_json_and_compares():
    measured = compiled.measure(row(), fbprop, jax, devices())
    assert measured.agreement < 1e-6
    measured.row = sharded.Row(None, (), name="mlp_sharded", size="data8 model1 fully1")
    one = json.loads(json.dumps(lines.record(measured, "sharded", {"devices": 8})))
    assert lines.ratios(one)["count"] == 1.0
    assert report.line(one).startswith("mlp_sharded ")
    assert "6 all-gather 1 all-reduce" in report.line(one)
    assert report.header(lines.COLUMNS).split()[3:6] == ["agree", "count", "sent"]
    assert report.means([one])[0].startswith("sharded rows against jax on 8 (1): geometric mean co")
    table = report.markdown([one])
    assert table[0] == "| row | size | against | collectives | bytes sent | temporary memory |"
    more = one | {"collectives": [14, 7]}
    assert report.compare([one], [more]) == [
        "mlp_sharded data8 model1 fully1 jax 8: count ratio 1.000 -> 2.000"]
    assert lines.ratios(one | {"sent_bytes": [0, 0]})["sent"] == 1.0
    assert lines.ratios(one | {"sent_bytes": [4, 0]})["sent"] == float("inf")


def test_other_numbers_are_not_counted():
    with pytest.raises(Disagreement, match=r"relative difference of .* expected at most -1e\+00"):
        compiled.measure(row(tolerance=-1.0), fbprop, jax, devices())


def test_the_command_prints_means_and_the_exit_status(monkeypatch, capsys):
    chosen = [e for e in entries("smoke") if e.name == "mlp_explicit_sharded"]
    written = []
    assert suite.count(8, chosen, written.append) == 0
    assert [(r["row"], r["devices"]) for r in written] == [("mlp_explicit_sharded", 8)]
    assert "rows against jax on 8 (1): geometric mean count 1.000" in capsys.readouterr().out
    broken = chosen[0]._replace(make=lambda draw: 1 / 0, dims=())
    assert suite.count(8, [broken], written.append) == 1
    assert written[-1]["error"].startswith("ZeroDivisionError")


def test_rows_for_several_devices_are_chosen_where_there_are_several():
    names = lambda **options: {e.name for e in suite.selected("", "full", **options)}
    assert "gpt_sharded" in names(devices=8) - names() - names(devices=4)
    assert not names(devices=8) & names()
