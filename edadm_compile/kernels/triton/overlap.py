# mypy: ignore-errors
"""Start of a launch while the one before it still runs (programmatic dependent launch, sm_90 and newer)."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def begin(OVERLAP: tl.constexpr):
    """Comes before every access to memory that another launch writes, constants aside.

    Lets the next launch be set up from now on (it waits here as well), and waits until all launches before this one
    have ended and what they wrote can be read. Does nothing where the launches were not enqueued to overlap.
    """
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
