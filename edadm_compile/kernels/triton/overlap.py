# mypy: ignore-errors
"""Start of a launch while the one before it still runs (programmatic dependent launch, sm_90 and newer)."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def begin(OVERLAP: tl.constexpr):
    """Comes before every access to memory that another launch writes.

    Waits until all launches before this one have ended and what they wrote can be read; from then on the next launch
    may be set up, which waits here as well. (Not earlier: a row of waiting launches would take the multiprocessors'
    shared memory.) Does nothing where the launches were not enqueued to overlap.
    """
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
