"""The page: its data, what it says in words, the command, and, where there is one, in a browser."""

import json
import re
import shutil
import subprocess

import jax
import jax.numpy as jnp
import pytest

from fbprop import watch
from fbprop.watch import __main__ as command
from fbprop.watch.findings import findings
from fbprop.watch.history import look, network
from forked import run

BROWSERS = "chromium", "chromium-browser", "google-chrome"
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)


def loss(w, x):
    with jax.named_scope("layer"):
        h = jax.nn.relu(x @ w - 5.0)
    with jax.named_scope("loop</script>"):
        return jnp.sum(jax.lax.scan(lambda c, x: (jnp.tanh(c + x), None), jnp.ones(3), h)[0])


def report():
    return watch.value_and_grad(loss)(jnp.ones((2, 3)), jnp.array([[1.0, 2.0], [0.0, 0.0]]))[1]


def rows():
    seen = [look(step, report(), rate=1 / step) for step in (10, 20)]
    return [
        {"step": 10, "train": {"loss": 2.0}, "held_out": {"loss": 2.5},
         "watch": {"network": network(report()), "seen": seen[:1]}},
        {"step": 15, "train": {"loss": None, "accuracy": 0.5}, "held_out": {"loss": 2.0}},
        {"step": 20, "train": {"loss": 1.0}, "held_out": {"loss": 1.5},
         "watch": {"seen": seen[1:]}},
    ]


def data_of(html):
    return json.loads(re.search(r'application/json">(.*?)</script>', html, re.DOTALL).group(1))


def test_a_page_holds_what_was_seen_and_asks_nobody(tmp_path):
    html = watch.page(rows(), tmp_path / "run.html", title="a run")
    assert (tmp_path / "run.html").read_text(encoding="utf-8") == html
    assert not re.search(r'src=|@import|url\(|fetch\(|XMLHttp', html)
    assert set(re.findall(r"https?://[^\"']*", html)) == {"http://www.w3.org/2000/svg"}
    data = data_of(html)
    assert data["title"] == "a run"
    names = [(p["path"], p["primitive"]) for p in data["network"]["points"]]
    assert names[:2] == [("layer", "jax.nn.relu"), ("loop</script>", "tanh")]
    assert data["network"]["rules"]["tanh"].startswith("y = tanh x")
    assert data["curves"] == {
        "loss": {"train": [[10, 2.0], [15, None], [20, 1.0]],
                 "held_out": [[10, 2.5], [15, 2.0], [20, 1.5]]},
        "accuracy": {"train": [[15, 0.5]]},
        "learning rate": {"train": [[10, 0.1], [20, 0.05]]},
    }
    assert [entry["step"] for entry in data["looks"]] == [10, 20]
    said = [f["text"] for f in data["findings"][0]]
    dead = "100% of its values are 0: units are dead, or nothing reaches them."
    assert f"layer/jax.nn.relu: {dead}" in said


def test_a_page_of_one_report():
    data = data_of(watch.page(report()))
    assert (len(data["looks"]), data["curves"]) == (1, {})
    assert data["network"]["points"][1]["steps"] == [2]
    assert data["network"]["points"][1]["kept"] == 2 * 3 * 4


def a_network(*cotangents, steps=(), values=None):
    names = [f"p{i}" for i in range(len(cotangents))]
    points = [{"path": "", "primitive": name, "steps": list(steps)} for name in names]
    values = values or [{"zeros": 0.0, "finite": 1.0}] * len(cotangents)
    entry = {"value": values, "cotangent": [{"norm": c, "finite": 1.0} for c in cotangents]}
    return {"points": points}, entry


def said(network, *looks):
    return [[(f["kind"], f["points"], f["text"]) for f in found]
            for found in findings(network, list(looks))]


def test_what_is_said_of_gradients():
    assert said(*a_network(1.0, 2.0, 3.0)) == [[]]
    assert said(*a_network(0.0, 0.0, 1.0, 1.0, 1.0)) == [
        [("vanishing", [0, 1], "p0 to p1: no gradient comes here.")]
    ]
    assert said(*a_network(1e-6, 1.0, 1.0, 2e5)) == [[
        ("vanishing", [0], "p0: its gradient is 1e-06, that of the middle point 1."),
        ("exploding", [3], "p3: its gradient is 2e+05, that of the middle point 1."),
    ]]
    net, first = a_network(1.0, 1.0)
    _, later = a_network(200.0, 1.0)
    assert said(net, first, later) == [
        [], [("exploding", [0], "p0: its gradient is 2e+02, at the first look it was 1.")],
    ]
    assert said(*a_network([1e-6, 1e-3, 1.0], steps=(3,)))[0][0][2] == (
        "p0: its gradient falls from 1 at step 3 of its loop to 1e-06 at the first."
    )
    assert said(*a_network([1e6, 1e3, 1.0], steps=(3,)))[0][0][0] == "exploding"
    assert said(*a_network([None, 1.0], steps=(2,))) == [[]]


def test_what_is_said_of_values():
    values = [{"zeros": 0.95, "finite": 1.0}, {"zeros": [0.0, 1.0], "finite": [1.0, 0.75]}, {}]
    assert said(*a_network(1.0, 1.0, 1.0, values=values)) == [[
        ("dead", [0], "p0: 95% of its values are 0: units are dead, or nothing reaches them."),
        ("broken", [1], "p1: 25.0% of its value is not finite."),
    ]]
    assert said(*a_network(float("nan"), 1.0))[0][0] == (
        "broken", [0], "p0: its gradient is not finite."
    )
    assert '"nan"' in watch.page(watch.value_and_grad(lambda x: jnp.sqrt(x))(-1.0)[1])


def test_what_has_no_page():
    with pytest.raises(ValueError, match=r"shows looks .* got 1 rows without any; expected"):
        watch.page([{"step": 1, "train": {"loss": 1.0}}])
    with pytest.raises(TypeError, match="of a Report or of a run's rows, got str expected e.g."):
        watch.page("log.jsonl")


def test_the_command(tmp_path, capsys):
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps(row) + "\n" for row in rows()) + '{"step": 3', "utf-8")
    command.main([str(log)])
    assert capsys.readouterr().out.strip() == str(tmp_path / "log.html")
    assert data_of((tmp_path / "log.html").read_text("utf-8"))["title"] == "log.jsonl"
    log.write_text('{"step": 1\n{"step": 2}\n', "utf-8")
    with pytest.raises(SystemExit, match="one JSON object a line, got .* in line 1"):
        command.main([str(log)])
    log.write_text('{"step": 2}\n', "utf-8")
    with pytest.raises(SystemExit, match="shows looks at what flows"):
        command.main([str(log), "-o", str(tmp_path / "other.html")])


def browse(file, where, *options):
    """What the browser makes of a page."""
    call = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            f"--user-data-dir={file.parent / 'profile'}", *options, f"{file.as_uri()}{where}"]
    return subprocess.run(call, capture_output=True, text=True, timeout=100, check=True).stdout


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_in_a_browser(tmp_path):
    file = tmp_path / "run.html"
    watch.page(rows(), file, title="a run")
    dom = re.sub(r"<script.*?</script>", "", browse(file, "#point=1&look=0", "--dump-dom"),
                 flags=re.DOTALL)
    assert "<title>a run</title>" in dom
    points = re.findall(r'<button class="point( chosen)?" data-point="(\d)"', dom)
    assert [number for _, number in points] == ["0", "1", "2"]
    assert [chosen for chosen, _ in points] == ["", " chosen", ""]
    assert '<b id="step">step 10</b>' in dom
    assert dom.count("<svg") == 3 + 1  # curves, and the steps of the chosen point's loop
    assert "loop&lt;/script&gt;/tanh" in dom
    assert "y = tanh x" in dom
    assert "units are dead" in dom
    colours = set(re.findall(r"background: ?rgb\((.*?)\)", dom))
    assert len(colours) >= 2
    picture = tmp_path / "run.png"
    browse(file, "", f"--screenshot={picture}", "--window-size=1100,900")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 20_000  # an empty page has 5,000


def test_as_a_program(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text("\n".join(map(json.dumps, rows())), "utf-8")
    done = run("-m", "fbprop.watch", log, "-o", tmp_path / "page.html")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("page.html")
    assert (tmp_path / "page.html").exists()
