# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.summary`: measures the target ratios on small cases and prints one JSON object keyed by row.

Less than a minute: fewer tokens than the suites, few rounds, one thread. Each ratio is the median over the rounds of
two times taken next to each other; a wrong or unavailable provider gives null, and `wrong` lists the wrong ones.
Progress goes to stderr. "ours" is the first backend of this build that supports CPUs.

    bf16_top2, fp32_top2     forward + backward, 1024 tokens, d = p = 2048, E = 16, R = 200, two experts a sample
    decode_bf16              forward, 1 to 64 rows, 2048 and 4096 wide: packed_eager / ours, the smallest of them
    experts_4_to_256         the op's time with 256 experts / with 4, two a sample, rank 8
    saved_for_backward       bytes kept by the layer / (bytes of x + 4 N R), R of the experts in use
    grad_norm                auto / the fastest of all, at its worst T; opacus / auto at T <= 256, the smallest
    proxy                    plain backward of the whole model against GradNormRecorder on its attention linears
    router_score             9 tasks, 64 samples, d = 3072
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import torch

from benchmarks.benchmark import Benchmark, Outcome, check_and_time, report
from benchmarks.grad_norm_suite import NormCase, norm_benchmark
from benchmarks.lora_benchmark import lora_benchmark
from benchmarks.lora_case import LoraCase, make_problem
from benchmarks.lora_providers import cpu_backends, module_of
from benchmarks.lora_suite import MAIN
from benchmarks.machine import this_machine
from benchmarks.memory import saved_for_backward_bytes
from benchmarks.proxy_suite import ProxyCase, proxy_benchmark
from benchmarks.router_suite import CASES as ROUTER_CASES
from benchmarks.router_suite import ScoreCase, score_benchmark

Ratios: TypeAlias = dict[str, float | None]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Cases and time budget; tests use tiny ones."""

    main: LoraCase = replace(MAIN, name="top2", samples=8)
    decode_rows: tuple[int, ...] = (1, 16, 64)
    decode_widths: tuple[int, ...] = (2048, 4096)
    expert_counts: tuple[int, int] = (4, 256)
    experts_case: LoraCase = replace(MAIN, name="experts", samples=8, in_features=1024, out_features=1024)
    norm_tokens: tuple[int, ...] = (32, 128, 256, 1024)
    norm_width: int = 1024
    proxy: ProxyCase = ProxyCase(
        name="proxy", hidden=512, intermediate=1408, layers=2, heads=8, samples=4, tokens=64, vocabulary=1024
    )
    router: ScoreCase = ROUTER_CASES[0]
    seconds: float = 2.0
    min_rounds: int = 3


@dataclass
class Summary:
    sizes: Sizes
    say: Callable[[str], object]
    ours: str = field(default_factory=lambda: cpu_backends()[0])
    wrong: dict[str, str] = field(default_factory=dict)

    def rows(self) -> dict[str, Ratios]:
        made: dict[str, Ratios] = {}
        measures: tuple[tuple[str, Callable[[], Ratios]], ...] = (
            ("bf16_top2", lambda: self.top2(torch.bfloat16)),
            ("fp32_top2", lambda: self.top2(torch.float32)),
            ("decode_bf16", self.decode),
            ("experts_4_to_256", self.experts),
            ("saved_for_backward", self.saved),
            ("grad_norm", self.grad_norm),
            ("proxy", self.proxy),
            ("router_score", self.router_score),
        )
        for name, measure in measures:
            start = time.perf_counter()
            made[name] = {ratio: None if value is None else float(f"{value:.4g}") for ratio, value in measure().items()}
            self.say(f"{name}: {made[name]}  ({time.perf_counter() - start:.1f} s)")
        return made

    def _measured(self, benchmark: Benchmark, *, fraction: float = 1.0, memory: bool = False) -> Outcome:
        seconds = self.sizes.seconds * fraction
        outcome = check_and_time(benchmark, seconds=seconds, min_rounds=self.sizes.min_rounds, memory=memory)
        for provider, complaints in outcome.wrong.items():
            self.wrong[f"{benchmark.case}/{provider}"] = complaints[0]
        for line in report(outcome):
            self.say(line)
        return outcome

    def _against(self, outcome: Outcome, baselines: Iterable[str]) -> Ratios:
        return {f"{baseline}_over_ours": outcome.ratio(baseline, self.ours) for baseline in baselines}

    def top2(self, dtype: torch.dtype) -> Ratios:
        baselines = ["packed_eager", "grouped_mm"]
        if dtype == torch.bfloat16:
            baselines += ["peft_loop", "dmole_loop"]
        if self.ours != "reference":
            baselines += ["reference", "cpu_pytorch_base"]
        providers = ("base_only", *baselines, self.ours)
        outcome = self._measured(lora_benchmark(self.sizes.main, dtype, "forward_backward", 1, providers))
        ratios = {"ours_over_base": outcome.ratio(self.ours, "base_only"), **self._against(outcome, baselines)}
        if "cpu_pytorch_base" in baselines:
            ratios["experts_beside_pytorch_base_over_base"] = outcome.ratio("cpu_pytorch_base", "base_only")
        return ratios

    def decode(self) -> Ratios:
        ratios = []
        shapes = [(rows, width) for width in self.sizes.decode_widths for rows in self.sizes.decode_rows]
        for rows, width in shapes:
            case = replace(
                self.sizes.main, name=f"decode_{rows}_{width}", samples=rows, tokens=1, in_features=width,
                out_features=width,
            )  # fmt: skip
            providers = ("base_only", "packed_eager", self.ours)
            benchmark = lora_benchmark(case, torch.bfloat16, "forward", 1, providers)
            ratios.append(self._measured(benchmark, fraction=1 / len(shapes)).ratio("packed_eager", self.ours))
        return {"packed_eager_over_ours": _least(ratios)}

    def experts(self) -> Ratios:
        """Both numbers of experts in one benchmark, so that they are timed side by side."""
        few, many = (
            lora_benchmark(
                replace(self.sizes.experts_case, name=f"experts_{count}", ranks=(8,) * count), torch.bfloat16,
                "forward_backward", 1, (self.ours,),
            )
            for count in self.sizes.expert_counts
        )  # fmt: skip
        both = [replace(benchmark.providers[0], name=benchmark.case) for benchmark in (few, many)]
        outcome = self._measured(replace(few, case="experts", providers=both))
        return {"time_many_over_few": outcome.ratio(many.case, few.case)}

    def saved(self) -> Ratios:
        ratios: Ratios = {}
        for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
            problem = make_problem(self.sizes.main, dtype)
            built = module_of(self.ours)(problem)
            x = problem.inputs.x.detach().requires_grad_()
            weights = (problem.weight, *built.parameters, *problem.inputs.lora_a, *problem.inputs.lora_b)
            kept = saved_for_backward_bytes(lambda built=built, x=x: built.forward(x), weights)  # type: ignore[misc]
            columns = sum(problem.case.ranks[e] for e in problem.active)
            ratios[f"saved_over_allowed_{name}"] = kept / (x.nbytes + 4 * problem.case.rows * columns)
        return ratios

    def grad_norm(self) -> Ratios:
        auto = f"{self.ours}_auto"
        worst: list[float | None] = []
        opacus: list[float | None] = []
        for tokens in self.sizes.norm_tokens:
            width = self.sizes.norm_width
            case = NormCase(samples=4, tokens=tokens, in_features=width, out_features=width)
            outcome = self._measured(norm_benchmark(case, torch.float32, 1), fraction=1 / len(self.sizes.norm_tokens))
            fastest = min(outcome.samples, key=outcome.p50_ms)
            worst.append(outcome.ratio(auto, fastest))
            if tokens <= 256:
                opacus.append(outcome.ratio("opacus_einsum", auto))
        return {"auto_over_fastest": _most(worst), "opacus_over_auto_up_to_256_tokens": _least(opacus)}

    def proxy(self) -> Ratios:
        outcome = self._measured(proxy_benchmark(self.sizes.proxy, torch.float32, 1), memory=True)
        ratios: Ratios = {}
        for method in ("exact", "sketch", "exact_frozen_linears"):
            provider = f"{self.ours}_{method}"
            ratios[f"{method}_time_over_plain_backward"] = outcome.ratio(provider, "plain_backward")
            ratios[f"{method}_extra_memory_over_plain_backward"] = _extra_memory(outcome, provider)
        return ratios

    def router_score(self) -> Ratios:
        outcome = self._measured(score_benchmark(self.sizes.router, torch.float32, 1))
        return self._against(outcome, ("autoencoder_loop",))


def _extra_memory(outcome: Outcome, provider: str) -> float | None:
    """Peak memory above a backward without weight gradients, as a fraction of that of plain backward."""
    memory = outcome.memory_mib
    if provider not in memory or "plain_backward" not in memory:
        return None
    least = memory["frozen_backward"]
    return (memory[provider] - least) / (memory["plain_backward"] - least)


def _least(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return min(known) if len(known) == len(values) else None


def _most(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return max(known) if len(known) == len(values) else None


def summary(sizes: Sizes, say: Callable[[str], object]) -> dict[str, object]:
    machine = this_machine()
    measuring = Summary(sizes=sizes, say=say)
    rows = measuring.rows()
    about = {"ours": measuring.ours, "machine": machine.name, "versions": machine.versions, "commit": machine.commit}
    return {**rows, "about": about, "wrong": measuring.wrong}


def main() -> int:
    result = summary(Sizes(), lambda line: print(line, file=sys.stderr, flush=True))
    print(json.dumps(result))
    return 1 if result["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
