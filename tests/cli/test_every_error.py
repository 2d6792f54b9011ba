"""Each error that the code can raise is in the table, or stands here with where it is tested or why it is out of reach.

A new `raise` in one of the parts below fails this test until it has a line in one of the `cases_*.py`.
"""

import ast
import re
from pathlib import Path

import pytest

from edadm_compile import errors
from tests.cli.test_errors import CASES, written_out

ROOT = Path(__file__).parents[2] / "edadm_compile"
PARTS = (
    "cli", "config.py", "driver", "frontend", "calibration", "evaluate/gates.py", "report", "runtime/artifact.py",
    "kernels/targets.py", "passes", "export/files.py", "export/targets.py",
)  # fmt: skip
KINDS = {
    name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, errors.EdadmError)
}

CRAFTED = "an archive made to do harm: tests/frontend/test_feature_file.py"
FORGED = "a manifest that was forged with its checksum: tests/runtime/test_artifact.py"
ORIGINAL = "a checkpoint of the authors' own code: tests/frontend/test_original.py"
PYTHON = "from Python alone: click or another check refuses it before"
GPU = "on a machine with a GPU: tests/driver/test_tune.py, tests/driver/test_bench.py"
SHAPES = "a file, or a network, for several shapes: tests/driver/test_shapes.py"
BROKEN = "a result that only a bug, or a processor without VNNI, makes: "
#: Where, beginning of the message (or of its source) -> why it is not in the table.
ELSEWHERE = {
    ("driver/bench_inputs.py", "no times:"): BROKEN + "tests/driver/test_bench.py",
    ("driver/compile.py", "compile_model:"): PYTHON,
    ("driver/compile.py", "{option}: {world.size}"): "several processes: tests/parallel/test_processes.py",
    ("driver/compile.py", "--dump-graphs: cannot write"): "a full disk",
    ("driver/example.py", "example {name}: not in"): "a broken installation: tests/driver/test_example.py",
    ("driver/example.py", "example: {error"): "a full disk",
    ("driver/example.py", "example: {folder} has other"): "tests/driver/test_example.py",
    ("driver/folder_lock.py", ""): "two runs at once: tests/driver/test_workdir.py",
    ("driver/report.py", "report: jinja2"): "without the package of the extra",
    ("driver/report_facts.py", "report: images"): BROKEN + "tests/driver/test_report.py",
    ("driver/report_facts.py", "report: the"): FORGED,
    ("driver/session.py", "memory: a limit"): PYTHON,
    ("driver/shapes.py", "GPU code: the file has"): SHAPES,
    ("frontend/source.py", "--shape {text}: a torch.export"): SHAPES,
    ("passes/other_shapes.py", ""): SHAPES,
    ("runtime/artifact.py", "shapes: GPU code"): SHAPES,
    ("driver/workdir.py", "{folder} holds an earlier"): "after an earlier run: tests/driver/test_workdir.py",
    ("driver/workdir.py", "cannot keep"): "a full disk: tests/driver/test_workdir.py",
    ("driver/contenders.py", "--baseline: a torch.export"): GPU,
    ("driver/doctor.py", ""): "a machine without the packages: tests/driver/test_doctor.py",
    ("driver/evaluate.py", "evaluate_model:"): PYTHON,
    ("driver/evaluate.py", "--seed"): PYTHON,
    ("driver/evaluate.py", "{name}: got {value}, allowed 1"): PYTHON,
    ("driver/evaluate.py", "{broken} of"): BROKEN + "tests/driver/test_evaluate.py",
    ("driver/export.py", "export needs"): "without the packages of the extra: tests/e2e/test_export.py",
    ("driver/export.py", "--layout: got"): PYTHON,
    ("driver/export.py", "_sentence"): BROKEN + "tests/export/test_sabotage.py",
    ("driver/image_data.py", "--data {path}: pictures have"): "a model of 4 channels: tests/driver/test_image_data.py",
    ("driver/tune.py", "this GPU is"): GPU,
    ("driver/tune.py", "{launch.layer}"): GPU,
    ("driver/tune_search.py", "refused"): GPU,
    ("frontend/archive_check.py", ""): CRAFTED,
    ("driver/verify.py", "the file does not say"): FORGED,
    ("frontend/added_conditions.py", ""): "a network of diffusers with other added conditions than SDXL's",
    ("frontend/autoencoder.py", ""): "an autoencoder: tests/e2e/test_pipelines.py",
    ("frontend/conditions.py", "{option} {path}: not a readable safetensors file: it is no"): "a pipe",
    ("frontend/conditions.py", "--cond {tensors} and"): "tests/frontend/test_prompts.py",
    ("frontend/diffusers_folder.py", "{file} is not a readable safetensors file: it is missing"): "tests/frontend/test_hostile_inputs.py",
    ("frontend/diffusers_folder.py", "{index} names"): "tests/frontend/test_hostile_inputs.py",
    ("frontend/factory.py", "pickle_message"): "text.pt, cut.pt and whole.pt of the table",
    ("frontend/load.py", "pickle_message"): "text.pt, cut.pt and whole.pt of the table",
    ("frontend/load.py", "{path} is neither"): "a pipe",
    ("frontend/original.py", "{where}: its first level"): ORIGINAL,
    ("frontend/original_ddim.py", ""): ORIGINAL,
    ("frontend/original_openai.py", ""): ORIGINAL,
    ("frontend/original_settings.py", ""): ORIGINAL,
    ("frontend/original_weights.py", ""): ORIGINAL,
    ("frontend/prompts.py", ""): "a pipeline folder: tests/frontend/test_prompts.py",
    ("frontend/size_check.py", ""): "tests/frontend/test_hostile_inputs.py",
    ("frontend/torch_file_check.py", ""): "tests/frontend/test_hostile_inputs.py",
    ("frontend/zip_check.py", ""): "tests/frontend/test_hostile_inputs.py",
    ("calibration/schedulers.py", "scheduler: {str(name)"): "tests/frontend/test_hostile_inputs.py",
    ("report/tables.py", "inspect: the file's"): FORGED,
    ("frontend/feature_file.py", "{self.path}: features are"): "tests/frontend/test_feature_file.py",
    ("calibration/collect.py", "bottleneck:"): "graphs without images: tests/calibration/test_collect.py",
    ("calibration/given.py", ""): "samples are given from Python alone: tests/calibration/test_given.py",
    ("calibration/guidance.py", "guidance "): PYTHON,
    ("calibration/sampler.py", "condition "): "the front end asks for the tensor first, with the same advice",
    ("calibration/schedulers.py", "guidance: got"): PYTHON,
    ("calibration/tdac.py", "bottleneck feature"): "the prediction would not be finite either, which is found first",
    ("runtime/artifact.py", "f'{path}: {error}'"): "every limit and check of what is read: tests/runtime/test_hostile_files.py",
    ("runtime/artifact.py", "{path} is not a .qmod"): "bytes that the header check accepts and the reader does not: tests/runtime/test_artifact.py",
    ("runtime/artifact.py", "{path}: the manifest widens"): FORGED,
    ("runtime/artifact.py", "{self._path}: {len(spare)}"): FORGED,
    ("runtime/artifact.py", "{path}: inconsistent"): FORGED,
    ("runtime/artifact.py", "{path}: malformed"): FORGED,
    ("runtime/artifact.py", "{path}: format"): FORGED,
    ("runtime/artifact.py", "{path}: manifest has no"): FORGED,
    ("runtime/artifact.py", "{self._path}: the program needs"): FORGED,
    ("runtime/artifact.py", "cannot write {path}: {error.strerror"): "a full disk: tests/runtime/test_artifact.py",
    ("passes/base.py", "pass "): "a bug in the list of passes: tests/passes/test_base.py",
    ("passes/calibrate.py", "weight "): "`passes.finite` finds it first, except in graphs made by hand",
    ("passes/calibrate.py", "the input of layer"): "a mask hides the value from the prediction: tests/passes/test_quantization.py",
    ("passes/caches.py", "cannot spill"): "a full disk: tests/passes/test_caches.py",
    ("passes/out_of_memory.py", ""): "no memory left: tests/driver/test_resume.py",
    ("passes/row_shares.py", ""): "several processes: tests/parallel/test_world.py",
    ("report/html/page.py", ""): FORGED,
    ("passes/capture.py", "the model returned"): "part of another sentence: 'cannot be called with'",
    ("passes/layer_errors.py", ""): "tests/passes/test_mixed_widths.py",
    ("passes/mixed_widths.py", "min_sqnr"): "a large model, or one compiled to the end: tests/passes/test_mixed_widths.py",
    ("passes/output_ranges.py", ""): "tests/passes/test_deploy.py",
    ("passes/reconstruct.py", "the loss of block"): "tests/passes/test_stress.py",
    ("passes/trace.py", "the captured graph has"): "the front end has counted the inputs before",
    ("export/files.py", "cannot write {path}: {error"): "a full disk: tests/export/test_saving.py",
    ("export/files.py", "the graph is not valid"): BROKEN + "tests/export/test_files.py",
    ("export/targets.py", ""): PYTHON,
}  # fmt: skip


def _sites():
    """(file, line, source of the message, what matches it) of each `raise` of the package's errors."""
    for part in PARTS:
        place = ROOT / part
        for path in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            for node in ast.walk(ast.parse(path.read_text())):
                call = node.exc if isinstance(node, ast.Raise) else None
                if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in KINDS:
                    yield str(path.relative_to(ROOT)), node.lineno, *_template(call.args[0])


def _template(message):
    """Readable source of a message, and its pattern: what an f-string fills in may be anything."""
    if isinstance(message, ast.Subscript):  # cut to a length
        message = message.value
    if isinstance(message, ast.Constant):
        return message.value, re.escape(message.value)
    if not isinstance(message, ast.JoinedStr):
        return ast.unparse(message), None
    parts = [
        (v.value, re.escape(v.value)) if isinstance(v, ast.Constant) else (f"{{{ast.unparse(v.value)}}}", ".*")
        for v in message.values
    ]
    return "".join(p[0] for p in parts), "".join(p[1] for p in parts)


SITES = list(_sites())
SENTENCES = [written_out(sentence) for _, _, sentence in CASES]


def _in_table(pattern):
    """Whether a sentence comes from this place."""
    return pattern is not None and any(re.fullmatch(pattern, sentence) for sentence in SENTENCES)


@pytest.mark.parametrize(("file", "line", "source", "pattern"), SITES, ids=[f"{s[0]}:{s[1]}" for s in SITES])
def test_it_is_in_the_table(file, line, source, pattern):
    if any(file == f and source.startswith(start) for f, start in ELSEWHERE):
        return
    found = _in_table(pattern)
    assert found, (
        f"{file}:{line} raises an error that is in no table: add a command that causes it to tests/cli/cases_*.py, or say "
        f"in ELSEWHERE where it is tested. The message: {source}"
    )


@pytest.mark.parametrize("key", list(ELSEWHERE), ids=str)
def test_what_is_left_out_still_exists(key):
    assert any(file == key[0] and source.startswith(key[1]) for file, _, source, _ in SITES)


def test_tests_that_are_named_exist():
    for reason in ELSEWHERE.values():
        for name in re.findall(r"tests/[\w/]+\.py", reason):
            assert (ROOT.parent / name).exists(), name
