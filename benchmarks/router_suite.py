# SPDX-License-Identifier: Apache-2.0
"""The autoencoder router: scores of all tasks, the choice of experts, the pooled feature.

autoencoder_loop     one nn.Sequential a task and F.mse_loss, as described in the paper
python_loop          the choice sample by sample over sorted lists
amax                 masked_fill and amax, the pooling alone
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.benchmark import Benchmark, Provider
from benchmarks.lora_providers import cpu_backends
from dmole_kernels import masked_max_pool, router_score, router_select

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


@dataclass(frozen=True, kw_only=True)
class ScoreCase:
    tasks: int
    samples: int
    features: int
    hidden: int = 128

    @property
    def name(self) -> str:
        return f"score_{self.tasks}_tasks_{self.samples}x{self.features}"


CASES = (
    ScoreCase(tasks=9, samples=64, features=3072),
    ScoreCase(tasks=9, samples=1, features=3072),
    ScoreCase(tasks=9, samples=512, features=3072),
    ScoreCase(tasks=32, samples=64, features=3072),
    ScoreCase(tasks=9, samples=64, features=448),  # the mini model's feature
)


def score_benchmark(case: ScoreCase, dtype: torch.dtype, threads: int) -> Benchmark:
    generator = torch.Generator().manual_seed(0)
    t, n, d, h = case.tasks, case.samples, case.features, case.hidden

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    features_ND = F.normalize(draw(n, d).float()).to(dtype)
    stacked = (draw(t, h, d, scale=d**-0.5), draw(t, h), draw(t, d, h, scale=h**-0.5), draw(t, d))
    truth_NT = _score_loop(_autoencoders(*(tensor.double() for tensor in stacked)), features_ND.double())
    networks = _autoencoders(*stacked)

    def ours(backend: str) -> Callable[[], Tensor]:
        return lambda: router_score(features_ND, *stacked, backend=backend)

    runs: dict[str, Callable[[], Tensor]] = {"autoencoder_loop": lambda: _score_loop(networks, features_ND)}
    runs |= {backend: ours(backend) for backend in cpu_backends()}
    flops = 4.0 * n * t * d * h
    weights = sum(tensor.numel() for tensor in stacked)
    return _benchmark(
        case.name, dtype, threads, runs, truth_NT, TOLERANCE[dtype], flops=flops,
        added_bytes=float((weights + features_ND.numel()) * features_ND.element_size()),
    )  # fmt: skip


def _autoencoders(
    encoder_weight: Tensor, encoder_bias: Tensor, decoder_weight: Tensor, decoder_bias: Tensor
) -> list[nn.Sequential]:
    made = []
    for we, be, wd, bd in zip(encoder_weight, encoder_bias, decoder_weight, decoder_bias, strict=True):
        encoder, decoder = nn.Linear(we.shape[1], we.shape[0]), nn.Linear(wd.shape[1], wd.shape[0])
        encoder.weight, encoder.bias = nn.Parameter(we.clone()), nn.Parameter(be.clone())
        decoder.weight, decoder.bias = nn.Parameter(wd.clone()), nn.Parameter(bd.clone())
        made.append(nn.Sequential(encoder, nn.ReLU(), decoder, nn.Sigmoid()))
    return made


def _score_loop(networks: Sequence[nn.Module], features_ND: Tensor) -> Tensor:
    errors = [F.mse_loss(network(features_ND), features_ND, reduction="none").mean(1) for network in networks]
    return torch.stack(errors, 1)


def select_benchmark(samples: int, tasks: int, threads: int) -> Benchmark:
    generator = torch.Generator().manual_seed(0)
    error_NT = torch.rand(samples, tasks, generator=generator)
    threshold_T = torch.full((tasks,), 0.5)

    def ours(backend: str) -> Callable[[], Tensor]:
        return lambda: router_select(error_NT, threshold_T, backend=backend)

    runs = {"python_loop": lambda: _select_loop(error_NT, threshold_T)} | {b: ours(b) for b in cpu_backends()}
    truth_NT = _select_loop(error_NT.double(), threshold_T.double())
    return _benchmark(f"select_{samples}x{tasks}", torch.float32, threads, runs, truth_NT.double(), 0.0)


def _select_loop(error_NT: Tensor, threshold_T: Tensor) -> Tensor:
    gate_NT = torch.zeros_like(error_NT)
    thresholds = threshold_T.tolist()
    for n, errors in enumerate(error_NT.tolist()):
        admitted = [task for task, error in enumerate(errors) if error <= thresholds[task]]
        for task in sorted(admitted, key=lambda task: errors[task])[:2]:
            gate_NT[n, task] = 1.0
    return gate_NT


def pool_benchmark(samples: int, tokens: int, features: int, dtype: torch.dtype, threads: int) -> Benchmark:
    generator = torch.Generator().manual_seed(0)
    hidden_BTD = torch.randn(samples, tokens, features, generator=generator).to(dtype)
    lengths_B = torch.randint(1, tokens + 1, (samples,), generator=generator)
    mask_BT = torch.arange(tokens) < lengths_B[:, None]

    def amax() -> Tensor:
        return hidden_BTD.masked_fill(~mask_BT[:, :, None], float("-inf")).amax(1)

    def ours(backend: str) -> Callable[[], Tensor]:
        return lambda: masked_max_pool(hidden_BTD, mask_BT, backend=backend)

    truth_BD = torch.stack([h[:n].double().amax(0) for h, n in zip(hidden_BTD, lengths_B.tolist(), strict=True)])
    runs: dict[str, Callable[[], Tensor]] = {"amax": amax} | {backend: ours(backend) for backend in cpu_backends()}
    return _benchmark(
        f"pool_{samples}x{tokens}x{features}", dtype, threads, runs, truth_BD, 0.0,
        added_bytes=float(hidden_BTD.numel() * hidden_BTD.element_size()),
    )  # fmt: skip


def _benchmark(
    name: str, dtype: torch.dtype, threads: int, runs: dict[str, Callable[[], Tensor]], truth: Tensor,
    tolerance: float, *, flops: float = 0.0, added_bytes: float = 0.0,
) -> Benchmark:  # fmt: skip
    providers = [
        Provider(name=provider, run=_without_grad(run), judge=_judge(run, truth, tolerance), flops=flops)
        for provider, run in runs.items()
    ]
    return Benchmark(
        case=name, dtype=dtype, direction="forward", threads=threads, providers=providers, added_flops=flops,
        added_bytes=added_bytes,
    )  # fmt: skip


def _without_grad(run: Callable[[], Tensor]) -> Callable[[], object]:
    def call() -> Tensor:
        with torch.no_grad():
            return run()

    return call


def _judge(run: Callable[[], Tensor], truth: Tensor, tolerance: float) -> Callable[[], Sequence[str]]:
    def complaints() -> Sequence[str]:
        with torch.no_grad():
            error = float(((run().double() - truth).abs() / truth.abs().clamp(min=1e-12)).max())
        return [] if error <= tolerance else [f"values: relative error {error:.3g} above {tolerance:.3g}"]

    return complaints


def benchmarks(only: str = "*") -> Iterator[Benchmark]:
    for case in (case for case in CASES if fnmatch(case.name, only)):
        for dtype in (torch.float32, torch.bfloat16):
            for threads in (1, 2):
                yield score_benchmark(case, dtype, threads)
    others = [select_benchmark(64, 9, 1), select_benchmark(1024, 32, 1)]
    for dtype in (torch.float32, torch.bfloat16):
        others += [pool_benchmark(64, 256, 1024, dtype, 1), pool_benchmark(32, 25, 192, dtype, 1)]
    yield from (benchmark for benchmark in others if fnmatch(benchmark.case, only))
