"""The CIFAR-10 benchmark: data in both layouts, training that goes on where it was, and what the table measures."""

import io
import json

import numpy
import pytest
import torch
from PIL import Image

from benchmarks.cifar10 import features, table, train
from benchmarks.cifar10.data import load_images, scaled
from edadm_compile.frontend import load_source


@pytest.fixture(scope="module")
def pixels():
    return numpy.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=numpy.uint8)


@pytest.fixture(scope="module")
def data(pixels, tmp_path_factory):
    path = tmp_path_factory.mktemp("cifar") / "data.npz"
    numpy.savez(path, x=pixels, y=numpy.arange(12) % 10)
    return path


def test_both_layouts_hold_the_same_images(pixels, data, tmp_path):
    files = []
    for picture in pixels:
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, format="PNG")
        files.append(numpy.frombuffer(buffer.getvalue(), numpy.uint8))
    offsets = numpy.cumsum([0, *map(len, files)])
    numpy.savez(tmp_path / "encoded.npz", jpeg=numpy.concatenate(files), offsets=offsets)
    plain, encoded = load_images(data), load_images(tmp_path / "encoded.npz")
    assert torch.equal(plain.pixels, encoded.pixels) and plain.pixels.shape == (12, 3, 32, 32)
    assert plain.labels.tolist()[-2:] == [0, 1] and encoded.labels is None
    values = scaled(plain.pixels)
    assert float(values.min()) >= -1 and float(values.max()) <= 1 and float(values.min()) < -0.99


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"x": numpy.zeros((2, 3, 32, 32), numpy.uint8)}, r"x uint8 \[2, 3, 32, 32\]; expected"),
        ({"x": numpy.zeros((2, 32, 32, 3), numpy.uint8), "y": numpy.zeros(3)}, "2 images and 3 labels"),
        ({"x": numpy.array([{}], dtype=object)}, "not an npz file of plain arrays"),
    ],
    ids=["layout", "labels", "pickle"],
)
def test_other_files_are_refused(arrays, words, tmp_path):
    numpy.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(SystemExit, match=words):
        load_images(tmp_path / "bad.npz")


def _trained(data, out, steps):
    size = ["--width", "8", "--layers", "1", "--batch", "4", "--device", "cpu", "--conditional", "--steps", str(steps)]
    train.main(["--data", str(data), "--out", str(out), *size])
    return torch.load(out / "state.pt", weights_only=True)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """A folder after four steps in two calls."""
    out = tmp_path_factory.mktemp("run")
    first = _trained(data, out, 2)
    assert first["step"] == 2
    return out, _trained(data, out, 4)


def test_the_folder_holds_the_average_and_a_second_call_goes_on(run, data, tmp_path):
    out, state = run
    assert state["step"] == 4 and sorted(p.name for p in out.iterdir()) == ["model", "state.pt"]
    before = {k: v.clone() for k, v in state["average"].items()}
    about = json.loads((out / "model" / "training.json").read_text())
    assert (about["steps"], about["images"], about["width"]) == (4, 12, 8)
    loaded = load_source(out / "model").module.state_dict()
    assert all(torch.equal(loaded[k], v.half().float()) for k, v in before.items())
    assert any(not torch.equal(v, state["model"][k]) for k, v in before.items())  # not the raw weights
    other = ["--width", "16", "--layers", "1", "--steps", "9", "--device", "cpu"]
    with pytest.raises(SystemExit, match="choose another --out"):
        train.main(["--data", str(data), "--out", str(out), *other])


def test_the_random_draws_go_on_too(run, data, tmp_path):
    """The third step of a resumed run sees other images and noise than the first: the generator was restored."""
    _, resumed = run
    whole = _trained(data, tmp_path / "whole", 4)
    assert torch.equal(whole["generator"], resumed["generator"])


def test_figures_of_the_float_model_itself_and_of_another(run, data, tmp_path):
    torch.manual_seed(0)
    classifier = features.Classifier(8)
    torch.save({"width": 8, "state": classifier.state_dict(), "accuracy": 0.1}, tmp_path / "c.pt")
    bench = table.Benchmark(run[0] / "model", data, str(tmp_path / "c.pt"), 2, 12, 6, 2)
    same, images = bench.measure(bench.float_model)
    assert same["sqnr_db"] == float("inf") and images.shape == (6, 3, 32, 32)
    assert same["frechet_to_real"] == pytest.approx(bench.to_real(bench.images))
    other, changed = bench.measure(lambda *inputs: 1.1 * bench.float_model(*inputs))
    assert other["sqnr_db"] == pytest.approx(20.0, abs=0.01)
    assert not torch.equal(images, changed) and 0 <= other["recognised_percent"] <= 100


def test_a_table_without_any_feature_space_says_what_is_missing(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(table.pretrained, "inception_missing", lambda shape: "weights are not there")
    with pytest.raises(SystemExit):
        table.main(["--model", "m", "--data", str(data), "--out", str(tmp_path / "t")])
    assert "weights are not there; give --classifier" in capsys.readouterr().err
