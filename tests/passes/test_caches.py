import os

import pytest
import torch

from edadm_compile.errors import ResourceError
from edadm_compile.passes.caches import Caches

ROW = torch.zeros(2, 10)  # 40 bytes a row


def test_what_exceeds_the_limit_goes_to_files_without_names(tmp_path):
    caches = Caches(100, tmp_path / "spill")
    inside, outside = caches.empty(2, ROW), caches.empty(3, ROW)
    assert inside.shape == (2, 10) and outside.shape == (3, 10) and outside.dtype == torch.float32
    assert caches.report() == {"limit": 100, "memory_peak": 80, "spilled_peak": 120, "spilled_total": 120}
    outside.copy_(torch.arange(30.0).reshape(3, 10))
    assert torch.equal(outside, torch.arange(30.0).reshape(3, 10))
    assert _mapped(tmp_path) == 1 and list((tmp_path / "spill").iterdir()) == []
    del outside
    assert _mapped(tmp_path) == 0  # the space on disk is free again


def _mapped(folder):
    """Files below a folder that this process has mapped."""
    with open("/proc/self/maps") as maps:
        return sum(str(folder) in line for line in maps)


def test_released_room_is_used_again(tmp_path):
    caches = Caches(100, tmp_path)
    first = caches.empty(2, ROW)
    caches.release(first, first)
    second, third = caches.empty(2, ROW), caches.empty(1, ROW)
    assert caches.report()["memory_peak"] == 80 and caches.use.spilled == 40
    caches.release(second, third)
    assert (caches.use.memory, caches.use.spilled) == (0, 0) and caches.report()["spilled_total"] == 40


def test_without_a_limit_nothing_is_spilled():
    caches = Caches()
    value = torch.ones(3, 5)
    assert caches.keep(value) is value and caches.empty(100_000, ROW).shape == (100_000, 10)
    assert caches.report() == {"limit": None, "memory_peak": 60 + 4_000_000, "spilled_peak": 0, "spilled_total": 0}


@pytest.mark.parametrize("limit", [None, 0], ids=["memory", "file"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last, "transposed"], ids=str)
def test_rows_have_the_memory_format_of_a_concatenation(tmp_path, limit, layout):
    """Convolutions choose their kernel by it: another one would change the last bits of a compilation."""
    value = torch.randn(4, 3, 5, 6)
    value = value.transpose(2, 3) if layout == "transposed" else value.contiguous(memory_format=layout)
    room = Caches(limit, tmp_path).empty(8, value)
    room[:4], room[4:] = value, value
    expected = torch.cat([value, value])
    assert torch.equal(room, expected) and room.stride() == expected.stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.bool, torch.bfloat16])
def test_a_kept_value_is_the_same_in_a_file(tmp_path, dtype):
    value = torch.arange(24).reshape(4, 6).to(dtype)
    kept = Caches(0, tmp_path).keep(value)
    assert kept is not value and kept.dtype == dtype and torch.equal(kept, value)


def test_an_empty_tensor_needs_no_file(tmp_path):
    assert Caches(0, tmp_path / "spill").empty(0, ROW).shape == (0, 10) and not (tmp_path / "spill").exists()


def test_a_full_disk_is_an_error_and_no_crash(tmp_path, monkeypatch):
    def full(descriptor, start, size):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)  # a map whose blocks are not reserved would end in SIGBUS
    with pytest.raises(ResourceError, match=r"cannot spill .*No space left on device; free space there"):
        Caches(0, tmp_path).empty(2, ROW)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_the_mean_square_has_the_same_bits_within_the_limit(tmp_path, layout):
    value = torch.randn(70, 8, 16, 16).contiguous(memory_format=layout)
    caches = Caches(1000, tmp_path)
    assert torch.equal(caches.mean_square(value), value.square().mean())
    assert caches.use.memory_peak == 0 and caches.use.spilled_peak == value.numel() * 4 and caches.use.spilled == 0
    assert torch.equal(caches.mean_square(value.bfloat16()), value.bfloat16().float().square().mean())
