"""Programs for several devices: what they send is counted, printed, and compared."""

import json

import jax
import numpy as np
import pytest

import fbprop
from benchmarks import report, suite
from benchmarks.meter import Disagreement
from benchmarks.row import Draw, entries
from benchmarks.rows import sharded
from benchmarks.sharded import compiled
from benchmarks.sharded import report as lines
from benchmarks.sharded.collectives import collectives

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
