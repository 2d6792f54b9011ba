"""The verb ``example``: all files, nothing overwritten, nothing half done."""

import json

import pytest
from click.testing import CliRunner

from edadm_compile.cli import main
from edadm_compile.driver import example
from edadm_compile.errors import ArtifactError, InputError


def test_it_writes_every_file(tmp_path):
    written = example.write_example("digits", tmp_path / "new" / "digits")
    origin = example.source_folder("digits")
    assert {path.name for path in written} >= {"model.pt", "README.md", "features.pt2", "classifier.safetensors"}
    assert all(path.read_bytes() == (origin / path.name).read_bytes() for path in written)
    assert example.write_example("digits", tmp_path / "new" / "digits") == written  # again: equal files stay


def test_other_files_are_not_overwritten(tmp_path):
    (tmp_path / "model.pt").write_bytes(b"mine")
    with pytest.raises(InputError, match=r"other files called model\.pt; nothing was written"):
        example.write_example("digits", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]
    with pytest.raises(InputError, match="is a file; give a folder"):
        example.write_example("digits", tmp_path / "model.pt")


def test_a_folder_in_the_way_is_one_sentence(tmp_path):
    (tmp_path / "model.pt").mkdir()
    with pytest.raises(ArtifactError, match=r"model\.pt: Is a directory"):
        example.write_example("digits", tmp_path)


def test_an_installation_without_examples_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(example, "__file__", str(tmp_path / "edadm_compile" / "driver" / "example.py"))
    with pytest.raises(ArtifactError, match="the installation is incomplete"):
        example.source_folder("digits")


def test_the_verb(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = CliRunner().invoke(main, ["example", "digits", "--json"])
    assert told.exit_code == 0 and "digits/model.pt" in json.loads(told.stdout)["files"]
    assert (tmp_path / "digits" / "model.pt").is_file()
    unknown = CliRunner().invoke(main, ["example", "faces"])
    assert unknown.exit_code == 2 and "got 'faces', allowed digits" in unknown.output
