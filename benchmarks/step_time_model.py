# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.step_time_model`: a MODEL of training-step times on GPUs. Nothing here was measured.

    time of a launch = max(flops / peak, bytes / bandwidth, 3 us)        summed over the launches of a step

from the launches of the Triton backend as it would make them (bytes counted, see `Launch`), the vendors' published
dense bfloat16 peaks and bandwidths, and the shapes of the language models' linears; forward and backward with a frozen
base, 8 samples of 1024 tokens, experts of rank 16, two a sample. Attention, norms, the vision tower and the optimizer
are left out of every column. Real kernels reach a fraction of the peaks, small ones the smallest fraction.

LLaVA 7B's shapes are transformers' defaults for `LlamaConfig`, the language model of `LlavaConfig` (a test checks
this). InternVL2-2B's language model is InternLM2-1.8B, which transformers has no class for: hidden size 2048,
intermediate 8192, 24 blocks, 16 heads and 8 key-value heads of 128, queries, keys and values in one linear of 4096
outputs, from its published configuration and confirmed by nothing installed.

The D-MoLE-style loop uses one list of experts per batch, here two, so it does less than the other columns. For every
linear it makes 1 + 2 E host synchronisations, an assumed 10 us each, and moves six times the output's bytes whichever
experts are active; an active expert adds two products, a multiplication by its gate and an addition, five times the
output's bytes. Backward repeats all passes.
"""

from __future__ import annotations

from dataclasses import dataclass

from dmole_kernels.triton_backend.cases import Case, launches
from dmole_kernels.triton_backend.configs import column_block

SHORTEST_LAUNCH, SYNCHRONISATION = 3e-6, 10e-6
SAMPLES, TOKENS, RANK, ACTIVE, ELEMENT = 8, 1024, 16, 2, 2


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """Published figures: dense bfloat16 flops and bytes, both a second."""

    target: str
    flops: float
    bandwidth: float


GPUS = {
    "A100 SXM 80 GB": Gpu(target="sm_80", flops=312e12, bandwidth=2.039e12),
    "H100 SXM": Gpu(target="sm_90", flops=989e12, bandwidth=3.35e12),
    "MI300X": Gpu(target="gfx942", flops=1307e12, bandwidth=5.3e12),
}
# (in_features, out_features) of a block's linears, and the number of blocks.
MODELS = {
    "InternVL2-2B": (24, ((2048, 4096), (2048, 2048), (2048, 8192), (2048, 8192), (8192, 2048))),
    "LLaVA 7B": (32, ((4096, 4096),) * 4 + ((4096, 11008),) * 2 + ((11008, 4096),)),
}


def launch_time(gpu: Gpu, flops: float, moved: float) -> float:
    return max(flops / gpu.flops, moved / gpu.bandwidth, SHORTEST_LAUNCH)


def base_time(gpu: Gpu, width: int, outputs: int) -> float:
    """The base product and its dx; the weight is frozen."""
    rows = SAMPLES * TOKENS
    moved = ELEMENT * (rows * width + width * outputs + rows * outputs)
    return 2 * launch_time(gpu, 2.0 * rows * width * outputs, moved)


def ours_time(gpu: Gpu, width: int, outputs: int, experts: int) -> float:
    """The Triton launches; a row tile multiplies the column blocks of its sample's experts only."""
    rows = SAMPLES * TOKENS
    case = Case(name="", ranks=(RANK,) * experts, rows=rows, in_features=width, out_features=outputs, samples=SAMPLES)
    forward, backward = launches(case, gpu.target)
    columns = min(RANK * experts, ACTIVE * column_block(RANK * experts))
    flops = {
        "shrink": width,
        "expand": outputs,
        "shrink_gradient": outputs,
        "weight_gradient": width + outputs,
        "finish": 0,
        "input_gradient": width,
    }
    return sum(
        launch_time(gpu, 2.0 * rows * columns * flops[launch.name], launch.bytes) for launch in (*forward, *backward)
    )


def loop_time(gpu: Gpu, width: int, outputs: int, experts: int) -> float:
    """What the loop adds to the base, each active expert on every row."""
    rows = SAMPLES * TOKENS
    products = 0.0
    for inner, outer in ((width, RANK), (RANK, outputs)):
        moved = ELEMENT * (rows * inner + inner * outer + rows * outer)
        products += 3 * launch_time(gpu, 2.0 * rows * inner * outer, moved)
    passes = 2 * (6 + 5 * ACTIVE) * ELEMENT * rows * outputs / gpu.bandwidth
    return ACTIVE * products + passes + (1 + 2 * experts) * SYNCHRONISATION


def table() -> list[str]:
    """Rows of a Markdown table, in milliseconds a step."""
    lines = [
        "| model, not measured: ms a step | experts | base only | ours adds | D-MoLE-style loop adds |",
        "|---|---|---|---|---|",
    ]
    for name, (blocks, linears) in MODELS.items():
        for gpu_name, gpu in GPUS.items():
            base = 1e3 * blocks * sum(base_time(gpu, *linear) for linear in linears)
            for experts in (9, 64):
                ours, loop = (
                    1e3 * blocks * sum(function(gpu, *linear, experts) for linear in linears)
                    for function in (ours_time, loop_time)
                )
                lines.append(f"| {name}, {gpu_name} | {experts} | {base:.0f} | {ours:.0f} | {loop:.0f} |")
    return lines


if __name__ == "__main__":
    print("\n".join(table()))
