"""Ahead-of-time compilation of launch plans to machine code, on a machine with or without a GPU."""

from __future__ import annotations

import base64
import queue
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edadm_compile.errors import TargetError
from edadm_compile.kernels.aot_cache import Cache, default_cache
from edadm_compile.kernels.aot_process import Worker, available_cores
from edadm_compile.kernels.cubin import Bundle, Cubin
from edadm_compile.kernels.launch import Launch, LaunchPlan
from edadm_compile.kernels.request import KernelRequest, requests_of, triton_folder
from edadm_compile.kernels.targets import SHARED_LIMIT, TARGETS, parse_targets

__all__ = ["TARGETS", "compile_bundle", "compile_plans", "distinct", "parse_targets", "plan_keys"]

#: Called with (1, what was compiled) for each distinct kernel, as `Progress.advance` of the passes.
Advance = Callable[[int, str], None]


@dataclass(frozen=True)
class Job:
    """A kernel to compile and the first launch that wants it, for messages.

    Attributes:
        key: of the request.
        request: what to compile.
        launch: who asks.
    """

    key: str
    request: KernelRequest
    launch: Launch

    def __str__(self) -> str:
        sizes = " ".join(f"{name}={size}" for name, size in self.launch.tile.sizes.items())
        warps = f"{self.request.num_warps} warps, {self.request.num_stages} stages"
        return (
            f"{self.request.kernel} for {self.request.arch} (layer {self.launch.layer}; {sizes or 'no tile'}, {warps})"
        )


def distinct(plans: Sequence[LaunchPlan]) -> dict[str, Job]:
    """The different kernels of some plans by key, in the order they are first wanted.

    Raises:
        TargetError: Triton is missing, or a launch that cannot be compiled for its architecture.
    """
    jobs: dict[str, Job] = {}
    for plan in plans:
        for launch, request in requests_of(plan):
            if request is not None:
                key = request.key
                jobs.setdefault(key, Job(key, request, launch))
    return jobs


def plan_keys(plan: LaunchPlan) -> tuple[str, ...]:
    """For each launch the key of its kernel, "" for those that torch runs."""
    return tuple("" if request is None else request.key for _, request in requests_of(plan))


def compile_bundle(
    plans: Sequence[LaunchPlan],
    *,
    jobs: int | None = None,
    cache: Path | None = None,
    progress: Advance | None = None,
) -> Bundle:
    """Plans with their kernels, ready to be stored; arguments as `compile_plans`."""
    cubins = compile_plans(plans, jobs=jobs, cache=cache, progress=progress)
    named = {(plan.arch, plan.batch): plan for plan in plans}
    return Bundle(named, {name: plan_keys(plan) for name, plan in named.items()}, cubins)


def compile_plans(
    plans: Sequence[LaunchPlan],
    *,
    jobs: int | None = None,
    cache: Path | None = None,
    progress: Advance | None = None,
) -> dict[str, Cubin]:
    """Compile every kernel that the plans launch, each once.

    Args:
        plans: of any architectures and batch sizes.
        jobs: processes that compile at the same time; by default one per core.
        cache: folder of kernels compiled earlier; by default `default_cache`.
        progress: called once per distinct kernel.

    Returns:
        compiled kernels by `KernelRequest.key`.

    Raises:
        TargetError: Triton is missing, or a kernel does not compile, or needs more shared memory than its GPU has.
            Kernels finished before are in the cache, also when this is interrupted.
    """
    wanted = distinct(plans)
    store = Cache(default_cache() if cache is None else cache)
    cubins: dict[str, Cubin] = {}
    missing: list[Job] = []
    for key, job in wanted.items():
        found = store.get(key)
        if found is None:
            missing.append(job)
        else:
            cubins[key] = _checked(job, found)
            _advance(progress, job)
    if missing:
        triton_folder()
        workers = min(jobs or available_cores(), len(missing))
        _compile(missing, workers, store, cubins, progress)
    return {key: cubins[key] for key in wanted}


def _advance(progress: Advance | None, job: Job) -> None:
    if progress is not None:
        progress(1, f"{job.request.kernel} {job.request.arch}")


def _compile(
    missing: Sequence[Job], workers: int, store: Cache, cubins: dict[str, Cubin], progress: Advance | None
) -> None:
    todo: queue.SimpleQueue[Job] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[Job, dict[str, Any]]] = queue.SimpleQueue()
    for job in missing:
        todo.put(job)
    # Temporary files of the compiler, its own cache included, are gone afterwards, however this ends.
    with tempfile.TemporaryDirectory(prefix="edadm-aot-", ignore_cleanup_errors=True) as scratch:
        processes: list[Worker] = []
        threads: list[threading.Thread] = []
        try:
            for number in range(workers):
                processes.append(Worker(Path(scratch), number))
                threads.append(threading.Thread(target=_serve, args=(processes[-1], todo, done), daemon=True))
                threads[-1].start()
            for _ in missing:
                job, reply = done.get()
                cubin = _cubin(job, reply)
                store.put(job.key, cubin)
                cubins[job.key] = _checked(job, cubin)
                _advance(progress, job)
        finally:
            for process in processes:
                process.stop()
            for thread in threads:
                if thread.ident is not None:
                    thread.join()


def _serve(worker: Worker, todo: queue.SimpleQueue[Job], done: queue.SimpleQueue[tuple[Job, dict[str, Any]]]) -> None:
    """Feed one process until nothing is left or it is stopped."""
    while True:
        try:
            job = todo.get_nowait()
        except queue.Empty:
            return
        reply = worker.ask(job.request.to_json())
        done.put((job, reply))
        if worker.stopped:
            return


def _cubin(job: Job, reply: dict[str, Any]) -> Cubin:
    if "error" in reply:
        raise TargetError(f"cannot compile {job}: {reply['error']}")
    data = base64.b64decode(reply.pop("data"))
    return Cubin.from_json({**reply, "request": job.request.digest}, data)


def _checked(job: Job, cubin: Cubin) -> Cubin:
    limit = SHARED_LIMIT[job.request.arch]
    if cubin.shared > limit:
        raise TargetError(
            f"cannot run {job}: it needs {cubin.shared} bytes of shared memory, allowed {limit}; use a smaller tile"
        )
    return replace(cubin, request=job.request.digest)
