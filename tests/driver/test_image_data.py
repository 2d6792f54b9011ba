"""Real images from folders and npz files."""

from __future__ import annotations

import numpy
import pytest
import torch
from PIL import Image

from edadm_compile.driver.image_data import open_data
from edadm_compile.errors import InputError

SHAPE = (3, 6, 8)


def pixels(n=3, shape=SHAPE, seed=0):
    """uint8 [N, H, W, C]."""
    c, h, w = shape
    return numpy.random.default_rng(seed).integers(0, 256, (n, h, w, c), dtype=numpy.uint8)


def scaled(values):
    """The definition: 0 is -1 and 255 is 1, channels first."""
    return torch.from_numpy(values).permute(0, 3, 1, 2).double() / 255 * 2 - 1


def content(data):
    found = torch.cat(list(data.batches()))
    assert found.dtype == torch.float32 and len(found) == len(data)
    return found.double()


def close(found, values):
    torch.testing.assert_close(found, values, rtol=0, atol=2e-7)


def test_pictures_of_a_folder_and_its_subfolders(tmp_path):
    values = pixels(300)  # more than one batch
    (tmp_path / "b").mkdir()
    for i, v in enumerate(values):
        Image.fromarray(v).save(tmp_path / (f"a{i:03d}.PNG" if i < 200 else f"b/{i:03d}.png"))
    (tmp_path / "notes.txt").write_text("no picture")
    close(content(open_data(tmp_path, SHAPE)), scaled(values))


def test_pictures_get_the_channels_of_the_model(tmp_path):
    grey = pixels(2, (1, 6, 8))
    for i, v in enumerate(grey):
        Image.fromarray(v[..., 0]).save(tmp_path / f"{i}.png")
    close(content(open_data(tmp_path, SHAPE)), scaled(grey).expand(-1, 3, -1, -1))
    close(content(open_data(tmp_path, (1, 6, 8))), scaled(grey))


@pytest.mark.parametrize("key", ["x", "images", "arr_0"])
def test_arrays_of_bytes_and_of_floats(tmp_path, key):
    values = pixels()
    numpy.savez(tmp_path / "bytes.npz", **{key: values})
    close(content(open_data(tmp_path / "bytes.npz", SHAPE)), scaled(values))
    numpy.savez(tmp_path / "floats.npz", **{key: scaled(values).numpy()})
    close(content(open_data(tmp_path / "floats.npz", SHAPE)), scaled(values))


def npz(path, **arrays):
    numpy.savez(path / "a.npz", **arrays)
    return path / "a.npz"


def picture(path, array, name="a.png"):
    for i in range(2):
        Image.fromarray(array).save(path / f"{i}{name}")
    return path


WIDE = numpy.zeros((3, 3, 6, 8), numpy.float32)
CASES = {
    "missing": (lambda p: p / "nothing", "does not exist; expected a folder"),
    "empty": (lambda p: p, "holds no .png, .jpg, .jpeg file"),
    "one": (lambda p: npz(p, x=pixels(1)), "holds 1 image(s)"),
    "key": (lambda p: npz(p, y=pixels()), "holds y; expected a key x, images, arr_0"),
    "channels first bytes": (
        lambda p: npz(p, x=pixels().transpose(0, 3, 1, 2)),
        "x is uint8 [3, 3, 6, 8], the model needs uint8 [N, 6, 8, 3] or float [N, 3, 6, 8]",
    ),
    "integers": (lambda p: npz(p, x=WIDE.astype(numpy.int64)), "x is int64"),
    "objects": (lambda p: npz(p, x=numpy.array([{}, {}])), "is not an npz file of plain arrays"),
    "range": (lambda p: npz(p, x=WIDE + 2), "float values from 2 to 2"),
    "nan": (lambda p: npz(p, x=WIDE * numpy.nan), "float values from nan"),
    "size": (lambda p: picture(p, pixels()[0].repeat(2, 0)), "has 12x8 pixels, the model makes 6x8"),
    "depth": (lambda p: picture(p, numpy.zeros((6, 8), numpy.uint16)), "pixels of mode 'I;16'"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_does_not_fit_is_explained(tmp_path, case):
    make, message = CASES[case]
    with pytest.raises(InputError) as caught:
        list(open_data(make(tmp_path), SHAPE).batches())
    assert message in str(caught.value) and str(caught.value).startswith("--data")


def test_files_that_cannot_be_read_are_explained(tmp_path):
    numpy.save(tmp_path / "plain.npy", pixels())
    (tmp_path / "text.npz").write_text("text")
    for name in ("plain.npy", "text.npz"):
        with pytest.raises(InputError, match="is not an npz file of plain arrays"):
            open_data(tmp_path / name, SHAPE)
    for i in range(2):
        (tmp_path / f"{i}.jpg").write_bytes(b"\xff\xd8\xff broken")
    with pytest.raises(InputError, match=r"0\.jpg cannot be decoded"):
        list(open_data(tmp_path, SHAPE).batches())
    with pytest.raises(InputError, match="pictures have 1 or 3 channels, the model makes 4"):
        open_data(tmp_path, (4, 6, 8))
