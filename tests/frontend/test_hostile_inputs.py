"""Model files and folders that were made to do harm: a sentence, no memory, nothing runs."""

import io
import json
import os
import pickle
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from edadm_compile.calibration.sampler import read_scheduler
from edadm_compile.config import load_config
from edadm_compile.errors import ConfigError, InputError
from edadm_compile.frontend import LoadOptions, load_source, read_conditions
from edadm_compile.frontend.size_check import check_config
from edadm_compile.frontend.torch_file_check import check_torch_file
from edadm_compile.frontend.zip_check import check_zip
from edadm_compile.texts import LARGEST_TEXT
from tests.graphs import DDIM

OPTIONS = LoadOptions(shape=(1, 8, 8), steps=2)
CONFIG = {
    "sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1, "block_out_channels": [4, 4],
    "down_block_types": ["DownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "UpBlock2D"], "norm_num_groups": 2,
}  # fmt: skip


class Evil:
    """A pickle that makes a file where it is opened."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def checkpoint(state=None, **config):
    return {"format": "edadm_compile.checkpoint/1", "model": {"class_name": "UNet2DModel", "config": {**CONFIG, **config}},
            "state_dict": state or {}, "scheduler": DDIM}  # fmt: skip


def zipped(path, entries, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in entries:
            archive.writestr(name, data)
    return path


def repacked(path, change):
    """A torch file with one entry's bytes changed."""
    with zipfile.ZipFile(path) as archive:
        entries = [(i.filename, archive.read(i)) for i in archive.infolist()]
    return zipped(path, [(name, change(name, data)) for name, data in entries])


# archives


@pytest.mark.parametrize("name", ["model.pt", "model.pt2"])
def test_zip_bombs(tmp_path, name):
    marker = "a/archive_format" if name.endswith("pt2") else "a/data.pkl"
    path = zipped(tmp_path / name, [(marker, b"pt2"), ("a/data/0", bytes(300 << 20))], zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1 << 20
    (tmp_path / "scheduler_config.json").write_text(json.dumps(DDIM))
    with pytest.raises(InputError, match="zip bomb"):
        load_source(path, OPTIONS)


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", "a\\x", "a/\x1b[2Jx"])
def test_names_of_entries(tmp_path, name):
    with pytest.raises(InputError, match="leads out"):
        check_zip(zipped(tmp_path / "a.pt", [(name, b"")]))


def test_entries_twice_on_top_of_each_other_or_packed_strangely(tmp_path):
    with pytest.warns(UserWarning, match="Duplicate"):
        path = zipped(tmp_path / "a.pt", [("a/x", b"1"), ("a/x", b"2")])
    with pytest.raises(InputError, match="of one name"):
        check_zip(path)
    with pytest.raises(InputError, match="method 12"):
        check_zip(zipped(tmp_path / "b.pt", [("x", b"1" * 99)], zipfile.ZIP_BZIP2))
    data = bytearray(zipped(tmp_path / "c.pt", [("a", b"1" * 99), ("b", b"2" * 99)]).read_bytes())
    for place in (data.find(b"PK\x01\x02"), data.rfind(b"PK\x01\x02")):  # the central directory: sizes of both
        data[place + 20 : place + 28] = (60_000).to_bytes(4, "little") * 2
    (tmp_path / "c.pt").write_bytes(data)
    with pytest.raises(InputError, match="on top of each other"):
        check_zip(tmp_path / "c.pt")


def test_an_archive_that_claims_to_be_a_part_of_several(tmp_path):
    """Python's own test for archives raises; found by the fuzzer."""
    path = zipped(tmp_path / "a.pt", [("a", b"1")])
    data = bytearray(path.read_bytes())
    end = len(data) - 22
    locator = b"PK\x06\x07" + (0).to_bytes(4, "little") + (0).to_bytes(8, "little") + (2).to_bytes(4, "little")
    path.write_bytes(bytes(data[:end]) + locator + bytes(data[end:]))
    with pytest.raises(zipfile.BadZipFile, match="multiple disks"):
        zipfile.is_zipfile(path)
    with pytest.raises(InputError, match=r"a\.pt"):
        load_source(path, OPTIONS)


def test_what_torch_says_of_a_damaged_archive_is_not_printed(tmp_path, caplog, capfd):
    program = torch.export.export(torch.nn.Conv2d(1, 1, 1), (torch.zeros(1, 1, 4, 4),))
    torch.export.save(program, tmp_path / "a.pt2")
    with zipfile.ZipFile(tmp_path / "a.pt2") as archive:
        names = [i.filename for i in archive.infolist() if "weight_0" not in i.filename]
        entries = [(name, archive.read(name)) for name in names]
    zipped(tmp_path / "a.pt2", entries)
    (tmp_path / "scheduler_config.json").write_text(json.dumps(DDIM))
    with pytest.raises(InputError, match="cannot read"):
        load_source(tmp_path / "a.pt2", OPTIONS)
    assert "Traceback" not in caplog.text + "".join(capfd.readouterr())


# torch files


def test_pickles_do_not_run(tmp_path):
    mark = tmp_path / "ran"
    for archive in (True, False):
        for value in (Evil(mark), {**checkpoint(), "state_dict": Evil(mark)}):
            torch.save(value, tmp_path / "a.pt", _use_new_zipfile_serialization=archive)
            with pytest.raises(InputError, match="pickled Python object"):
                load_source(tmp_path / "a.pt", OPTIONS)
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Evil(mark)))
    with pytest.raises(InputError, match="pickled Python object"):
        load_source(tmp_path / "b.pt", OPTIONS)
    assert not mark.exists()


def test_a_storage_larger_than_its_record(tmp_path):
    torch.save({"w": torch.zeros(1000)}, tmp_path / "a.pt")
    check_torch_file(tmp_path / "a.pt")
    repacked(tmp_path / "a.pt", lambda name, data: data[:400] if name.endswith("data/0") else data)
    with pytest.raises(InputError, match="400 bytes in the file"):
        check_torch_file(tmp_path / "a.pt")


def test_a_storage_larger_than_a_file_of_the_old_format(tmp_path):
    torch.save({"w": torch.zeros(1000)}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    check_torch_file(tmp_path / "a.pt")
    data = (tmp_path / "a.pt").read_bytes()
    assert data.count(b"M\xe8\x03") >= 1  # BININT2 1000
    (tmp_path / "a.pt").write_bytes(data.replace(b"M\xe8\x03", b"J\xff\xff\xff\x7f"))
    with pytest.raises(InputError, match="storages claim 85899"):
        load_source(tmp_path / "a.pt", OPTIONS)


def test_tensors_that_are_more_than_their_storage(tmp_path):
    torch.save({"w": torch.zeros(1).expand(1 << 40)}, tmp_path / "a.pt")
    with pytest.raises(InputError, match="1 stored elements"):
        check_torch_file(tmp_path / "a.pt")
    torch.save({"w": torch.zeros(1).expand(1 << 10)}, tmp_path / "a.pt")  # a buffer that someone expanded
    check_torch_file(tmp_path / "a.pt")
    torch.save({"w": bytearray(10)}, tmp_path / "a.pt")
    torch.save({"w": torch.zeros(4, 4).to_sparse()}, tmp_path / "b.pt")
    for name in ("a.pt", "b.pt"):
        with pytest.raises(InputError, match="expected plain tensors"):
            check_torch_file(tmp_path / name)


@pytest.mark.parametrize(
    "data", [b"", b"text", b"\x80\x02.", b"\x80\x04" + b"(" * 1000, b"PK\x03\x04", bytes(range(7, 240, 3))]
)
def test_what_cannot_be_looked_through_is_not_opened(tmp_path, data, monkeypatch):
    (tmp_path / "a.pt").write_bytes(data)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch opened it"))
    with pytest.raises(InputError, match=r"a\.pt"):
        load_source(tmp_path / "a.pt", OPTIONS)


def test_state_dicts_with_metadata_are_looked_through(tmp_path):
    """Their pickles set attributes of a dictionary."""
    state = torch.nn.Linear(3, 2).state_dict()
    assert state._metadata
    for archive in (True, False):
        torch.save(state, tmp_path / "a.pt", _use_new_zipfile_serialization=archive)
        check_torch_file(tmp_path / "a.pt")


def test_infinite_bounds_of_schedulers_are_numbers():
    """As diffusers writes them: ``"lambda_min_clipped": -Infinity``."""
    from edadm_compile.calibration.sampler import make_scheduler
    from edadm_compile.ir.program import SamplerSpec

    config = {**DDIM, "_class_name": "DPMSolverMultistepScheduler", "lambda_min_clipped": float("-inf")}
    config.pop("clip_sample")
    make_scheduler(SamplerSpec(config, 2))


# configurations


@pytest.mark.parametrize(
    "config",
    [{"block_out_channels": [10**9, 10**9]}, {"layers_per_block": 100}, {"sample_size": 1e300}, {"block_out_channels": [4] * 100},
     {"norm_eps": float("inf")}, {"x": "a" * 10_000}, {"x": [[[[[[[[1]]]]]]]]}],
    ids=lambda c: str(c)[:40],
)  # fmt: skip
def test_absurd_configurations(tmp_path, config):
    with pytest.raises(InputError, match=r"allowed|nested"):
        check_config(config, "here")
    torch.save(checkpoint(**config), tmp_path / "a.pt")
    with pytest.raises(InputError, match=r"allowed|nested"):
        load_source(tmp_path / "a.pt", OPTIONS)


def test_a_large_model_is_not_built_for_small_weights(tmp_path, monkeypatch):
    """Four thousand million parameters: on a device without memory first, where names and shapes are compared."""
    torch.save(checkpoint({"conv_in.weight": torch.zeros(1)}, block_out_channels=[8192, 16384]), tmp_path / "a.pt")
    with pytest.raises(InputError, match="do not fit"):
        load_source(tmp_path / "a.pt", OPTIONS)


def test_folders(tmp_path):
    (tmp_path / "scheduler_config.json").write_text(json.dumps(DDIM))
    config, weights = tmp_path / "config.json", tmp_path / "diffusion_pytorch_model.safetensors"
    config.write_text(json.dumps({"_class_name": "UNet2DModel", **CONFIG}))
    os.mkfifo(weights)
    with pytest.raises(InputError, match="no regular file"):
        load_source(tmp_path, OPTIONS)
    weights.unlink()
    weights.symlink_to("/dev/zero")
    with pytest.raises(InputError, match="no regular file"):
        load_source(tmp_path, OPTIONS)
    weights.unlink()
    save_file({"x": torch.zeros(1)}, weights)
    config.write_text(json.dumps({"_class_name": "UNet2DModel", **CONFIG, "block_out_channels": [10**9]}))
    with pytest.raises(InputError, match="block_out_channels"):
        load_source(tmp_path, OPTIONS)
    config.write_text("[" * 100_000)
    with pytest.raises(InputError, match="not valid JSON"):
        load_source(tmp_path, OPTIONS)
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    config.write_text(json.dumps({"_class_name": "UNet2DModel", **CONFIG}))
    index.write_text(json.dumps({"weight_map": {"a": "../../../../../etc/passwd", "b": 3}}))
    with pytest.raises(InputError, match="index"):
        load_source(tmp_path, OPTIONS)
    index.write_text(json.dumps({"weight_map": {"a": "../../../../../etc/passwd"}}))
    with pytest.raises(InputError, match="passwd is not a readable"):  # the name alone, in this folder
        load_source(tmp_path, OPTIONS)


@pytest.mark.parametrize(
    "change",
    [{"num_train_timesteps": 10**12}, {"num_train_timesteps": 1e12}, {"solver_order": 10**9, "_class_name": "UniPCMultistepScheduler"},
     {"trained_betas": [0.1] * 200_000}, {"trained_betas": [[0.1]]}, {"beta_start": {}}],
    ids=lambda c: str(c)[:40],
)  # fmt: skip
def test_schedulers(tmp_path, change):
    torch.save({**checkpoint(), "scheduler": {**DDIM, **change}}, tmp_path / "a.pt")
    with pytest.raises(InputError, match=r"scheduler|do not fit"):
        load_source(tmp_path / "a.pt", OPTIONS)
    from edadm_compile.calibration.sampler import make_scheduler
    from edadm_compile.ir.program import SamplerSpec

    with pytest.raises(InputError, match="scheduler"):
        make_scheduler(SamplerSpec({**DDIM, **change}, 2))


def test_small_texts(tmp_path):
    path = tmp_path / "a.json"
    with path.open("wb") as stream:
        stream.truncate(LARGEST_TEXT + 1)
    with pytest.raises(InputError, match="cannot read scheduler"):
        read_scheduler(path)
    with pytest.raises(ConfigError, match="cannot read settings"):
        load_config(path)
    path.unlink()
    os.mkfifo(path)  # would be waited for
    with pytest.raises(InputError, match="cannot read scheduler"):
        read_scheduler(path)
    with pytest.raises(InputError, match="neither a file nor a folder"):
        load_source(path, OPTIONS)


def test_conditions(tmp_path):
    for data in (
        b"",
        b"\xff" * 8,
        (1 << 60).to_bytes(8, "little"),
        io.BytesIO().getvalue(),
        b"\x02" + bytes(7) + b"{}",
    ):
        (tmp_path / "c.safetensors").write_bytes(data)
        if data.endswith(b"{}"):
            assert read_conditions(tmp_path / "c.safetensors") == {}
        else:
            with pytest.raises(InputError, match="not a readable"):
                read_conditions(tmp_path / "c.safetensors")
