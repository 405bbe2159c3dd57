# SPDX-License-Identifier: Apache-2.0
"""Weight-gradient norms per sample, and their accumulation over batches.

opacus_einsum        einsum("bti,btj->bij", grad, x), then the norm: a weight gradient for every sample
<backend>_direct     tile by tile, never written          <backend>_ghost     two Gram matrices a sample
<backend>_auto       the default method
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch

import torch
from torch import Tensor

from benchmarks.benchmark import Benchmark, Provider
from benchmarks.lora_providers import cpu_backends
from dmole_kernels import accumulate_gradient, accumulate_sketch, grad_norm_per_sample

METHODS = ("auto", "direct", "ghost")
SKETCH = 64
# Relative error allowed: sums are in float32, but Opacus's own gradients are in the working dtype.
OWN_TOLERANCE, BASELINE_TOLERANCE = 1e-4, 2e-2


@dataclass(frozen=True, kw_only=True)
class NormCase:
    samples: int
    tokens: int
    in_features: int
    out_features: int

    @property
    def name(self) -> str:
        return f"norm_{self.samples}x{self.tokens}_{self.in_features}_{self.out_features}"


CASES = (
    *(NormCase(samples=8, tokens=t, in_features=1024, out_features=1024) for t in (32, 64, 128, 256, 512, 1024)),
    NormCase(samples=8, tokens=257, in_features=1024, out_features=3072),
    *(NormCase(samples=4, tokens=t, in_features=2048, out_features=2048) for t in (32, 256, 1024)),
    *(NormCase(samples=2, tokens=t, in_features=4096, out_features=4096) for t in (32, 256, 1024)),
    NormCase(samples=1, tokens=256, in_features=4096, out_features=11008),
    # the mini model's
    NormCase(samples=8, tokens=25, in_features=192, out_features=768),
    NormCase(samples=8, tokens=50, in_features=256, out_features=1024),
)


def opacus_einsum(x_BTD: Tensor, grad_BTP: Tensor) -> Tensor:
    """As opacus.grad_sample.linear computes it."""
    per_sample = torch.einsum("bti,btj->bij", grad_BTP, x_BTD)
    norm: Tensor = per_sample.flatten(1).norm(2, dim=1)
    return norm


def norm_benchmark(
    case: NormCase, dtype: torch.dtype, threads: int, *, methods: Sequence[str] = METHODS,
    table: dict[str, Callable[[Tensor, Tensor], Tensor]] | None = None,
) -> Benchmark:  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    b, t, d, p = case.samples, case.tokens, case.in_features, case.out_features
    x_BTD = torch.randn(b, t, d, generator=generator).to(dtype)
    grad_BTP = torch.randn(b, t, p, generator=generator).to(dtype)
    # One sample at a time: the float64 gradients of all of them would be gigabytes.
    truth_B = torch.stack([(g.double().t() @ x.double()).norm() for x, g in zip(x_BTD, grad_BTP, strict=True)])
    runs: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"opacus_einsum": opacus_einsum}
    for backend in cpu_backends():
        for method in methods:
            runs[f"{backend}_{method}"] = _norm(backend, method)
    needed = min(2.0 * t * p * d, 1.0 * t * t * (p + d)) * b
    providers = [
        Provider(
            name=name,
            run=_bound(run, x_BTD, grad_BTP),
            judge=_judge(run, x_BTD, grad_BTP, truth_B, OWN_TOLERANCE if "_einsum" not in name else BASELINE_TOLERANCE),
            flops=needed,
        )
        for name, run in {**runs, **(table or {})}.items()
    ]
    return Benchmark(
        case=case.name,
        dtype=dtype,
        direction="forward",
        threads=threads,
        providers=providers,
        added_flops=needed,
        added_bytes=float((x_BTD.numel() + grad_BTP.numel()) * x_BTD.element_size()),
    )


def _norm(backend: str, method: str) -> Callable[[Tensor, Tensor], Tensor]:
    chosen = {"auto": "auto", "direct": "direct", "ghost": "ghost"}[method]
    return lambda x, grad: grad_norm_per_sample(x, grad, method=chosen, backend=backend)  # type: ignore[arg-type]


def _bound(run: Callable[[Tensor, Tensor], Tensor], x: Tensor, grad: Tensor) -> Callable[[], object]:
    def call() -> Tensor:
        with torch.no_grad():
            return run(x, grad)

    return call


def _judge(
    run: Callable[[Tensor, Tensor], Tensor], x: Tensor, grad: Tensor, truth_B: Tensor, tolerance: float
) -> Callable[[], Sequence[str]]:
    def complaints() -> Sequence[str]:
        error = float(((run(x, grad).double() - truth_B).abs() / truth_B).max())
        return [] if error <= tolerance else [f"norm: relative error {error:.3g} above {tolerance:.3g}"]

    return complaints


def _accumulating(case: NormCase) -> str:
    return case.name.replace("norm", "accumulate")


def accumulate_benchmark(case: NormCase, dtype: torch.dtype, threads: int) -> Benchmark:
    """The exact buffer and the sketch after one batch, against plain `addmm_` into a float32 buffer."""
    generator = torch.Generator().manual_seed(0)
    rows, d, p = case.samples * case.tokens, case.in_features, case.out_features
    x_ND = torch.randn(rows, d, generator=generator).to(dtype)
    grad_NP = torch.randn(rows, p, generator=generator).to(dtype)
    left_PK = torch.randn(p, SKETCH, generator=generator) / SKETCH**0.5
    right_DL = torch.randn(d, SKETCH, generator=generator) / SKETCH**0.5
    truth_PD = grad_NP.double().t() @ x_ND.double()
    truth_KL = left_PK.double().t() @ truth_PD @ right_DL.double()

    def plain(buffer_PD: Tensor) -> None:
        buffer_PD.addmm_(grad_NP.t().float(), x_ND.float())

    def exact(backend: str) -> Callable[[Tensor], None]:
        return lambda buffer_PD: accumulate_gradient(buffer_PD, x_ND, grad_NP, backend=backend)

    def sketch(backend: str) -> Callable[[Tensor], None]:
        return lambda sketch_KL: accumulate_sketch(sketch_KL, x_ND, grad_NP, left_PK, right_DL, backend=backend)

    exact_flops = 2.0 * rows * d * p
    sketch_flops = 2.0 * rows * SKETCH * (d + p + SKETCH)
    providers = [_adding("addmm", plain, truth_PD, exact_flops)]
    for backend in cpu_backends():
        providers.append(_adding(f"{backend}_exact", exact(backend), truth_PD, exact_flops))
        providers.append(_adding(f"{backend}_sketch", sketch(backend), truth_KL, sketch_flops))
    return Benchmark(case=_accumulating(case), dtype=dtype, direction="forward", threads=threads, providers=providers)


def _adding(name: str, add: Callable[[Tensor], None], truth: Tensor, flops: float) -> Provider:
    buffer = torch.zeros(truth.shape)

    def complaints() -> Sequence[str]:
        total = torch.zeros(truth.shape)
        add(total)
        error = float((total.double() - truth).norm() / truth.norm())
        # Sketch products may round S and G L to the working dtype on their way.
        allowed = BASELINE_TOLERANCE
        return [] if error <= allowed else [f"sum: relative error {error:.3g} above {allowed:.3g}"]

    return Provider(name=name, run=lambda: add(buffer.zero_()), judge=complaints, flops=flops)


def benchmarks(only: str = "*") -> Iterator[Benchmark]:
    for case in (case for case in CASES if fnmatch(case.name, only)):
        for dtype in (torch.float32, torch.bfloat16):
            for threads in (1, 2) if case.in_features == 1024 else (1,):
                yield norm_benchmark(case, dtype, threads)
    for case in (case for case in (CASES[3], CASES[7], CASES[-1]) if fnmatch(_accumulating(case), only)):
        for dtype in (torch.float32, torch.bfloat16):
            yield accumulate_benchmark(case, dtype, 1)
