"""Which operators of torch's CPU build give other bits with another number of threads.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/robustness/thread_order.py > benchmarks/results/NAME/thread_order.txt

Prints one line for each operator and shape: whether the value and each gradient are bit for bit those of one thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

_THREADS = (2, 4)
_CONVOLUTIONS = ((32, 32, 16, 32, 3), (32, 64, 8, 64, 3), (32, 1, 16, 32, 3), (32, 64, 16, 32, 1))
_PRODUCTS = ((8192, 64, 64), (2048, 32, 128), (50, 131_072, 50))
_SIZES = (1_000, 40_000, 262_144, 2_097_152)


def _gradients(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """The value of a function, and the gradients of half its squared norm: no reduction of torch's own is in them."""
    given = [v.clone().requires_grad_() for v in inputs]
    value = function(*given)
    return [value.detach(), *torch.autograd.grad(value, given, value.detach())]


def cases() -> Iterator[tuple[str, Callable[[], list[Tensor]]]]:
    """Operators by name, as functions that compute afresh."""
    for b, c, size, o, k in _CONVOLUTIONS:
        x, w = torch.randn(b, c, size, size), torch.randn(o, c, k, k)
        yield (
            f"convolution {b} x {c} -> {o}, {size} x {size}, kernel {k}: value, dx, dw",
            lambda x=x, w=w, k=k: _gradients(lambda a, v: functional.conv2d(a, v, padding=k // 2), x, w),
        )
    for m, k, n in _PRODUCTS:
        x, w = torch.randn(m, k), torch.randn(n, k)
        yield f"linear {m} x {k} x {n}: value, dx, dw", lambda x=x, w=w: _gradients(functional.linear, x, w)
    image, weight = torch.randn(32, 64, 16, 16), torch.randn(64)
    yield (
        "group norm: value, dx, dw, db",
        lambda: _gradients(lambda a, v, b: functional.group_norm(a, 8, v, b), image, weight, weight),
    )
    tokens = torch.randn(32, 4, 64, 16)
    attention = functional.scaled_dot_product_attention
    yield "attention: value, dq, dk, dv", lambda: _gradients(attention, tokens, tokens, tokens)
    yield (
        "rounding with a learned scale: value, dx, ds",
        lambda: _gradients(lambda a, s: torch.clamp(a / s, -8, 7) * s, image, torch.full((1,), 0.1)),
    )
    for n in _SIZES:
        x = torch.randn(n)
        yield f"mean of {n:,} values", lambda x=x: [x.mean()]
        yield f"sum of {n:,} values in float64", lambda x=x: [x.double().sum()]


def main() -> None:
    """Compare and print."""
    torch.manual_seed(0)
    print(
        f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}; bits of one thread against {_THREADS}"
    )
    for name, compute in cases():
        torch.set_num_threads(1)
        expected = compute()
        words = []
        for threads in _THREADS:
            torch.set_num_threads(threads)
            same = [torch.equal(a, b) for a, b in zip(expected, compute(), strict=True)]
            words.append(f"{threads} threads: {' '.join('same' if s else 'OTHER' for s in same)}")
        print(f"{name}; {'; '.join(words)}")


if __name__ == "__main__":
    main()
