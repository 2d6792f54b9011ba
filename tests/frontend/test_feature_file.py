"""Feature extractors: what is read, what is refused, and that no archive runs code."""

from __future__ import annotations

import io
import json
import pickle
import zipfile

import pytest
import torch
from torch import nn

from edadm_compile.errors import InputError
from edadm_compile.frontend.feature_file import load_extractor


class Pool(nn.Module):
    """Means of the channels and of their squares."""

    def forward(self, images):
        return torch.cat((images.mean(dim=(2, 3)), images.square().mean(dim=(2, 3))), dim=1)


class Quiet(Pool):
    """The same without gradients, which torch.export writes as a call of a sub-graph."""

    def forward(self, images):
        with torch.no_grad():
            return super().forward(images)


class Flat(nn.Module):
    def forward(self, images):
        return images.flatten(2)


def save(path, module=None, shape=(2, 3, 8, 8), batch=None):
    dynamic = None if batch is None else {"images": {0: torch.export.Dim("batch", min=batch[0], max=batch[1])}}
    program = torch.export.export(module or Pool(), (torch.zeros(shape),), dynamic_shapes=dynamic, strict=False)
    torch.export.save(program, path)
    return path


def expected(images):
    return Pool()(images.clamp(-1, 1)).double()


@pytest.mark.parametrize("batch", [None, (1, 64), (3, 5)], ids=["fixed", "free", "bounded"])
@pytest.mark.parametrize("count", [1, 7, 64])
def test_any_number_of_images_is_embedded(tmp_path, batch, count):
    extractor = load_extractor(save(tmp_path / "f.pt2", batch=batch, shape=(4, 3, 8, 8)), (3, 8, 8))
    assert extractor.dimension == 6 and (extractor.min_batch, extractor.max_batch) == (batch or (4, 4))
    images = 2 * torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    found = extractor(images)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected(images), rtol=1e-6, atol=1e-7)


def test_networks_without_gradients_are_read(tmp_path):
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    found = load_extractor(save(tmp_path / "f.pt2", Quiet()), (3, 8, 8))(images)
    torch.testing.assert_close(found, expected(images), rtol=1e-6, atol=1e-7)


def test_features_that_are_not_finite_are_refused(tmp_path):
    extractor = load_extractor(save(tmp_path / "f.pt2"), (3, 8, 8))
    with pytest.raises(InputError, match="not finite"):
        extractor(torch.full((2, 3, 8, 8), torch.nan))


def test_files_that_do_not_fit_are_explained(tmp_path):
    path = save(tmp_path / "f.pt2")
    for call, message in (
        (lambda: load_extractor(tmp_path / "none.pt2", (3, 8, 8)), "does not exist"),
        (lambda: load_extractor(path, (1, 16, 16)), "takes images 3x8x8, the model makes 1x16x16"),
        (
            lambda: load_extractor(save(tmp_path / "flat.pt2", Flat()), (3, 8, 8)),
            r"maps \[2, 3, 8, 8\] to \[2, 3, 64\]",
        ),
    ):
        with pytest.raises(InputError, match=message):
            call()
    (tmp_path / "text.pt2").write_text("no archive")
    torch.save(nn.Conv2d(1, 1, 1), tmp_path / "module.pt2")
    for name in ("text.pt2", "module.pt2"):
        with pytest.raises(InputError, match=r"another kind of file; expected a torch\.export archive"):
            load_extractor(tmp_path / name, (3, 8, 8))


def test_a_truncated_archive_is_explained(tmp_path):
    path = save(tmp_path / "f.pt2")
    rewrite(path, {"models/model.json": lambda data: data[: len(data) // 2]})
    with pytest.raises(InputError, match="cannot be read by this torch"):
        load_extractor(path, (3, 8, 8))


def rewrite(path, changes, extra=()):
    """Write an archive again with some entries changed, and more entries."""
    with zipfile.ZipFile(path) as archive:
        entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries:
            inner = name.partition("/")[2]
            archive.writestr(name, changes[inner](data) if inner in changes else data)
        for name, data in extra:
            archive.writestr(f"{entries[0][0].partition('/')[0]}/{name}", data)


def in_json(change):
    def apply(data):
        value = json.loads(data)
        change(value)
        return json.dumps(value).encode()

    return apply


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('executed')",))


def _target(value):
    value["graph_module"]["graph"]["nodes"][0]["target"] = "torch.hub.load"


def _placeholder(value):
    value["graph_module"]["graph"]["inputs"][0]["as_tensor"]["name"] = "x=exit()"


def _expression(value):
    sizes = next(iter(value["graph_module"]["graph"]["tensor_values"].values()))["sizes"]
    sizes[0] = {"as_expr": {"expr_str": "exit(3)", "hint": None}}


def _pickled(value):
    value["config"]["w"] = {"path_name": "weight_0", "is_param": True, "use_pickle": True, "tensor_meta": None}


def _evil_inputs(_data):
    buffer = io.BytesIO()
    torch.save(Evil(), buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("changes", "extra", "message"),
    [
        ({"models/model.json": in_json(_target)}, [], "calls 'torch.hub.load'"),
        ({"models/model.json": in_json(_placeholder)}, [], r"'x=exit\(\)' is no name"),
        ({"models/model.json": in_json(_expression)}, [], "more than arithmetic"),
        ({"data/weights/model_weights_config.json": in_json(_pickled)}, [], "pickled tensor"),
        ({"data/sample_inputs/model.pt": _evil_inputs}, [], "example inputs are pickled objects"),
        ({}, [("data/constants/opaque_obj_0", pickle.dumps(Evil()))], "could run code"),
        ({}, [("data/weights/model.pt", pickle.dumps(Evil()))], "could run code"),
        ({}, [("data/aotinductor/model/a.so", b"")], "could run code"),
        ({}, [("models/model.json", b"{}")], "two entries of one name"),
    ],
    ids=["function", "name", "expression", "pickled tensor", "inputs", "object", "old weights", "library", "twice"],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_archives_that_could_run_code_are_refused(tmp_path, changes, extra, message):
    path = save(tmp_path / "f.pt2", batch=(1, 64))
    rewrite(path, {}, [])
    load_extractor(path, (3, 8, 8))  # what is refused below is the change, not that it was written again
    rewrite(path, changes, extra)
    with pytest.raises(InputError, match=message):
        load_extractor(path, (3, 8, 8))


def test_guards_are_not_run(tmp_path):
    path = save(tmp_path / "f.pt2", batch=(1, 64))
    rewrite(path, {"models/model.json": in_json(lambda v: v.update(guards_code=["exit(3)"]))})
    assert load_extractor(path, (3, 8, 8))(torch.zeros(2, 3, 8, 8)).shape == (2, 6)
