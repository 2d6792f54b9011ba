import os
import stat

import pytest

from edadm_compile.runtime.atomic import replace_file, sweep


def test_the_data_is_on_disk_before_the_name_and_the_name_before_the_return(tmp_path, monkeypatch):
    path, events = tmp_path / "a", []
    real_sync, real_replace = os.fsync, type(path).replace

    def sync(descriptor):
        events.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        real_sync(descriptor)

    def replace(self, target):
        events.append("rename")
        return real_replace(self, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(type(path), "replace", replace)
    replace_file(path, b"new")
    assert events == ["file", "rename", "folder"] and path.read_bytes() == b"new"


def test_a_failed_write_leaves_the_old_file_alone(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        replace_file(tmp_path / "a", b"new")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a", b"old")]


def test_only_files_of_dead_writers_are_swept(tmp_path):
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    for name in (f".a.{child}.tmp", f".a.{os.getpid()}.tmp", f".b.{child}.tmp", ".a.x.tmp", "a"):
        (tmp_path / name).write_bytes(b"")
    sweep(tmp_path, "a")
    left = {".a.x.tmp", f".a.{os.getpid()}.tmp", f".b.{child}.tmp", "a"}
    assert {p.name for p in tmp_path.iterdir()} == left
