"""The fuzzers, for a fixed number of mutants: what they find bad fails here; and they find what is planted.

The long runs are ``python -m benchmarks.robustness.fuzz_qmod`` and ``fuzz_inputs`` (benchmarks/robustness/README.md).
"""

import os
import random
import resource

import pytest

from benchmarks.robustness import fork_server, fuzz_inputs, fuzz_qmod, input_files
from edadm_compile.runtime.session import CompiledModel

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter")


def _bad(results):
    return [r for _, r in results if isinstance(r, str) or r["outcome"].startswith("bad")]


def test_mutated_artifacts(small_files, tmp_path, monkeypatch):
    fuzzer = fuzz_qmod.Fuzzer(small_files, 1, tmp_path / "bad")
    results = dict(fork_server.run(range(400), fuzzer.job))
    assert not _bad(results.items())
    outcomes = {r["outcome"] for r in results.values()}
    assert {"refused", "accepted"} <= outcomes and {r["kind"] for r in results.values()} >= {
        "container",
        "plan",
        "program",
    }
    reasons = {fuzz_qmod._reason(r["detail"]) for r in results.values() if r["outcome"] == "refused"}
    assert len(reasons) > 60  # the checks behind the checksums are reached

    def broken(self, *inputs):
        raise KeyError("planted")

    monkeypatch.setattr(CompiledModel, "predict", broken)
    accepted = next(n for n, r in results.items() if r["outcome"] == "accepted")
    assert fuzzer.job(accepted)["outcome"] == "bad: KeyError at forward"
    assert list((tmp_path / "bad").iterdir())
    fuzzer.path.unlink()


def test_mutated_inputs(tmp_path):
    fuzzer = fuzz_inputs.Fuzzer(input_files.make(tmp_path / "good"), 1, tmp_path / "bad")
    results = dict(fork_server.run(range(120), fuzzer.job))
    assert not _bad(results.items())
    assert {r["outcome"] for r in results.values()} == {"refused", "loaded"}
    assert {r["file"] for r in results.values()} == set(fuzzer.files)


def test_crashes_hangs_and_allocations_are_noticed(monkeypatch):
    monkeypatch.setattr(fork_server, "HANG", 0.2)

    def job(number):
        if number == 1:
            os.kill(os.getpid(), 9)
        while number == 3:
            pass
        with fork_server.AddressSpace(64 << 20):
            try:
                return len(bytearray((200 << 20) if number == 4 else 1))
            except MemoryError:
                return "memory"

    assert dict(fork_server.run(range(6), job)) == {0: 1, 1: "crash: SIGKILL", 2: 1, 3: "hang", 4: "memory", 5: 1}
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY


def test_mutants_are_reproducible(small_files, tmp_path):
    first, second = (fuzz_qmod.Fuzzer.__new__(fuzz_qmod.Fuzzer) for _ in range(2))
    for fuzzer in (first, second):
        fuzzer.seed, fuzzer.names, fuzzer.operators = 3, ["chain"], ["aten.add.Tensor"]
        fuzzer.parts = {"chain": fuzz_qmod.take_apart(small_files["chain"].read_bytes()).frozen()}
    kinds = set()
    for number in random.Random(0).sample(range(10_000), 40):
        assert first.bytes_of(number) == second.bytes_of(number)
        kinds.add(first.bytes_of(number)[1])
    assert len(kinds) >= 4
