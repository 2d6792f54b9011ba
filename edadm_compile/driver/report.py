"""Write the report of a compiled file: one HTML page, and on request the data of its plots as JSON files."""

from __future__ import annotations

import hashlib
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from edadm_compile.driver import shapes
from edadm_compile.driver.options import load_options
from edadm_compile.driver.report_facts import Subject, gather
from edadm_compile.errors import ArtifactError, InputError
from edadm_compile.frontend import Source, load_source
from edadm_compile.passes.base import Progress
from edadm_compile.runtime.artifact import read, write_atomically


def run(
    artifact: Path,
    output: Path,
    reference: Path | None = None,
    count: int | None = None,
    seed: int = 0,
    data: Path | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Write the report of a file.

    Args:
        reference: the float model that was compiled; without it the report has what the file knows.
        count: pairs of images; None for 16, or 2 above 100 million parameters.
        data: folder for the data of the plots.
        options: how to load the reference.

    Returns:
        output path, size, what is missing and why, and the figures of the summary.

    Raises:
        EdadmError: unreadable files, a reference with other inputs, or a folder that cannot be written.
    """
    check(output, data)
    whole = read(artifact)
    loaded, options = shapes.choose(whole, options)
    source = None
    if reference is not None:
        source = load_source(reference, load_options(options, loaded.lowered.sampler))
    content = artifact.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    name = "" if reference is None else reference.name
    subject = Subject(loaded, artifact.name, len(content), digest, source, name, shapes=tuple(whole.shapes))
    return {**shapes.told(whole, loaded), **write(subject, output, count, seed, data, progress)}


def after_compile(
    path: Path, source: Source, seconds: dict[str, float], output: Path, progress: Progress
) -> dict[str, Any]:
    """Write the report of a file that has just been written; it also has the time of each stage.

    Raises:
        EdadmError: as `run`.
    """
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    whole = read(path)  # what is in the file, not what was meant to be in it
    artifact = whole.at(whole.shapes[0])
    name = str(source.origin.get("file", source.signature.source))
    subject = Subject(artifact, path.name, len(content), digest, source, name, seconds, tuple(whole.shapes))
    return write(subject, output, progress=progress)


def write(
    subject: Subject,
    output: Path,
    count: int | None = None,
    seed: int = 0,
    data: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure and write; see `run`."""
    from edadm_compile.report.html import page  # needs jinja2, which `check` has asked for

    files: dict[str, Any] = {}
    facts = gather(subject, count, seed, progress)
    text = page.render(facts)
    write_atomically(output, text.encode())
    if data is not None:
        files = page.data_files(facts)
        data.mkdir(exist_ok=True)
        for name, value in files.items():
            write_atomically(data / name, json.dumps(value, indent=1, allow_nan=False).encode())
    noise, samples = facts["noise"], facts["samples"]
    return {
        "output": str(output), "bytes": output.stat().st_size, "data": None if data is None else sorted(files),
        "sqnr_db": None if noise is None else noise["sqnr"],
        "psnr_db": None if samples is None else samples["psnr_db"],
        "time": facts["times"]["kind"], "missing": facts["missing"],
    }  # fmt: skip


def check(output: Path, data: Path | None = None) -> None:
    """Fail before the work, not after.

    Raises:
        InputError: jinja2 is not installed.
        ArtifactError: a folder that does not exist, or a path that is one.
    """
    if find_spec("jinja2") is None:
        raise InputError("report: jinja2 is not installed; run: pip install 'edadm-compile[report]'")
    for path in (output, data):
        if path is not None and not path.parent.is_dir():
            raise ArtifactError(f"cannot write {path}: folder {path.parent} does not exist; create it first")
    if output.is_dir():
        raise ArtifactError(f"cannot write {output}: it is a folder; name a file such as {output / 'report.html'}")
    if data is not None and data.exists() and not data.is_dir():
        raise ArtifactError(f"cannot write {data}: it is a file; --report-data names a folder")
