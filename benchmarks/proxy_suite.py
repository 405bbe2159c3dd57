# SPDX-License-Identifier: Apache-2.0
"""D-MoLE's proxy over a whole model: the accumulated gradient norm of every attention linear in one backward pass.

frozen_backward      forward and backward to the embeddings, no weight gradient: the minimum of any proxy; the time
                     overhead and the extra memory of the others are measured relative to it
plain_backward       every weight's gradient is filled, then the norms are taken
<backend>_exact      GradNormRecorder on a frozen model, one float32 buffer a candidate
<backend>_sketch     the same with 64 x 64 sketches
<backend>_exact_frozen_linears   exact, inside FrozenLinears: this backend computes the model's own products, too
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.benchmark import Benchmark, Provider
from benchmarks.lora_providers import cpu_backends
from dmole_kernels import FrozenLinears, GradNormRecorder, use_backend

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
# float32: sums in another order; bfloat16: the model's own backward is rounded at every layer.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
SKETCH_DEVIATIONS = 5.0


@dataclass(frozen=True, kw_only=True)
class ProxyCase:
    """A LLaMA of `layers` layers, and one batch."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    samples: int
    tokens: int
    vocabulary: int = 2048


CASES = (
    ProxyCase(name="proxy_512", hidden=512, intermediate=1408, layers=8, heads=8, samples=4, tokens=128),
    ProxyCase(name="proxy_1024", hidden=1024, intermediate=2816, layers=4, heads=16, samples=4, tokens=256),
    ProxyCase(name="proxy_2048", hidden=2048, intermediate=5504, layers=2, heads=16, samples=2, tokens=256),
    # the language tower of the mini model
    ProxyCase(name="proxy_mini", hidden=256, intermediate=1024, layers=4, heads=4, samples=8, tokens=50),
)


def proxy_benchmark(case: ProxyCase, dtype: torch.dtype, threads: int) -> Benchmark:
    torch.manual_seed(0)
    settings: dict[str, Any] = dict(
        hidden_size=case.hidden,
        intermediate_size=case.intermediate,
        num_hidden_layers=case.layers,
        num_attention_heads=case.heads,
        num_key_value_heads=case.heads,
        vocab_size=case.vocabulary,
        max_position_embeddings=max(case.tokens, 64),
        attn_implementation="eager",
    )
    frozen: Any = LlamaForCausalLM(LlamaConfig(**settings))
    frozen.to(dtype).train(False).requires_grad_(False)
    trained = copy.deepcopy(frozen).requires_grad_(True)
    ids_BT = torch.randint(case.vocabulary, (case.samples, case.tokens))
    embeddings_BTD = frozen.get_input_embeddings()(ids_BT).detach()
    linears = attention_linears(frozen)
    truth = _norms_of_gradients(_backward(copy.deepcopy(trained).double(), ids_BT))

    def frozen_backward() -> dict[str, float]:
        inputs = embeddings_BTD.clone().requires_grad_()
        torch.autograd.backward(frozen(inputs_embeds=inputs, labels=ids_BT, use_cache=False).loss)
        return {}

    def plain_backward() -> dict[str, float]:
        return _norms_of_gradients(_backward(trained, ids_BT))

    def recorder(
        method: str, backend: str, products: Callable[[], AbstractContextManager[object]] = nullcontext
    ) -> Callable[[], dict[str, float]]:
        def record() -> dict[str, float]:
            recorder = GradNormRecorder(linears, method=method, backend=backend)  # type: ignore[arg-type]
            with products(), use_backend(backend), recorder as recorded:
                torch.autograd.backward(frozen(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss)
            return {name: norm.weight for name, norm in recorded.norms().items()}

        return record

    rows = case.samples * case.tokens
    added = 2.0 * rows * sum(linear.weight.numel() for linear in linears.values())
    in_layers = sum(m.weight.numel() for m in frozen.modules() if isinstance(m, nn.Linear))
    needed = 4.0 * rows * in_layers
    providers = [
        Provider(name="frozen_backward", run=frozen_backward, judge=lambda: [], flops=needed),
        Provider(
            name="plain_backward",
            run=plain_backward,
            judge=_judge(plain_backward, truth, TOLERANCE[dtype]),
            flops=needed + added,
        ),
    ]
    for backend in cpu_backends():
        exact, sketch = recorder("exact", backend), recorder("sketch", backend)
        exact_judge = _judge(exact, truth, TOLERANCE[dtype])
        providers.append(Provider(name=f"{backend}_exact", run=exact, judge=exact_judge, flops=needed + added))
        own = recorder("exact", backend, FrozenLinears)
        providers.append(
            Provider(
                name=f"{backend}_exact_frozen_linears",
                run=own,
                judge=_judge(own, truth, TOLERANCE[dtype]),
                flops=needed + added,
            )
        )
        # sqrt((2/k + 2/l) / 2) at most, see sketch_relative_std; all layers share their sketch matrices.
        tolerance = TOLERANCE[dtype] + SKETCH_DEVIATIONS * math.sqrt(1.0 / 64)
        sketch_judge = _judge(sketch, truth, tolerance)
        providers.append(Provider(name=f"{backend}_sketch", run=sketch, judge=sketch_judge, flops=needed))
    return Benchmark(
        case=case.name,
        dtype=dtype,
        direction="forward_backward",
        threads=threads,
        providers=providers,
        base="frozen_backward",
        added_flops=added,
        added_bytes=0.0,
    )


def attention_linears(model: nn.Module) -> dict[str, nn.Linear]:
    named = model.named_modules()
    return {name: m for name, m in named if isinstance(m, nn.Linear) and name.endswith(ATTENTION)}


def _backward(model: Any, ids_BT: Tensor) -> nn.Module:
    model.zero_grad(set_to_none=True)
    torch.autograd.backward(model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss)
    module: nn.Module = model
    return module


def _norms_of_gradients(model: nn.Module) -> dict[str, float]:
    norms = {}
    for name, linear in attention_linears(model).items():
        assert linear.weight.grad is not None
        norms[name] = float(linear.weight.grad.norm())
    model.zero_grad(set_to_none=True)
    return norms


def _judge(
    run: Callable[[], dict[str, float]], truth: dict[str, float], tolerance: float
) -> Callable[[], Sequence[str]]:
    def complaints() -> Sequence[str]:
        got = run()
        if set(got) != set(truth):
            return [f"norms of {sorted(got)[:2]}; expected {sorted(truth)[:2]}"]
        name, error = max(((n, abs(got[n] - truth[n]) / truth[n]) for n in truth), key=lambda pair: pair[1])
        return [] if error <= tolerance else [f"{name}: relative error {error:.3g} above {tolerance:.3g}"]

    return complaints


def benchmarks(only: str = "*") -> Iterator[Benchmark]:
    for case in (case for case in CASES if fnmatch(case.name, only)):
        for dtype in (torch.float32, torch.bfloat16):
            yield proxy_benchmark(case, dtype, 1)
