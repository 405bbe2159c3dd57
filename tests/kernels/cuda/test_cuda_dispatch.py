# SPDX-License-Identifier: Apache-2.0
"""The decode kernels behind the registered op, what they refuse there, and when "auto" takes them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dmole_kernels import (
    BACKENDS,
    ExpertGates,
    MultiLoRALinear,
    choose_backend,
    cuda,
    explain_backend,
    router_select,
    use_backend,
)
from dmole_kernels import _backend as backend
from dmole_kernels.testing import LoraInputs, Workload, make_inputs, multi_lora_op

SHAPE = Workload(name="", leading=(4, 3), in_features=40, out_features=24, ranks=(8, 3), gate="token", pattern="top2")
NEEDS_NO_CUDA = pytest.mark.skipif(not cuda.MISSING, reason="this build has the CUDA kernels")


@pytest.fixture
def inputs() -> LoraInputs:
    return make_inputs(SHAPE)


@pytest.mark.usefixtures("cuda_on_cpu")
def test_the_op_runs_them_by_name_and_in_use_backend(inputs: LoraInputs) -> None:
    expected = multi_lora_op(inputs, backend="reference")
    by_name = multi_lora_op(inputs, backend="cuda")
    torch.testing.assert_close(by_name, expected)
    with use_backend("cuda"), torch.no_grad():
        assert torch.equal(multi_lora_op(inputs), by_name)


@pytest.mark.usefixtures("cuda_on_cpu")
def test_a_layer_decodes_with_them() -> None:
    gates = ExpertGates()
    layer = MultiLoRALinear(torch.nn.Linear(24, 40), gates=gates, dropout=0.3).eval()
    for name, rank in (("charts", 4), ("maps", 7)):
        layer.bank.add(name, rank=rank, alpha=8.0)
        torch.nn.init.normal_(layer.bank.expert(name).lora_b)
    x = torch.randn(2, 1, 24)
    with torch.no_grad(), gates.use(torch.tensor([[1.0, 0.0], [0.5, 1.0]]), ["charts", "maps"]):
        with use_backend("reference"):
            expected = layer(x)
        with use_backend("cuda"):
            torch.testing.assert_close(layer(x), expected)


@pytest.mark.usefixtures("cuda_on_cpu")
def test_opcheck_of_the_forward(inputs: LoraInputs) -> None:
    arguments = (
        inputs.x, None, list(inputs.lora_a), list(inputs.lora_b), inputs.gate, list(inputs.scale), 0.0, False, None,
        "cuda", False,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.dmole_kernels.multi_lora.default, arguments)


@pytest.mark.usefixtures("cuda_on_cpu")
def test_compiled_whole(inputs: LoraInputs) -> None:
    def delta(x: torch.Tensor) -> torch.Tensor:
        return multi_lora_op(replace(inputs, x=x), backend="cuda")

    compiled = torch.compile(delta, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(inputs.x), delta(inputs.x))


@pytest.mark.usefixtures("cuda_on_cpu")
def test_a_derivative_is_refused_with_the_remedy(inputs: LoraInputs) -> None:
    delta = multi_lora_op(replace(inputs, x=inputs.x.clone().requires_grad_()), backend="cuda")
    with pytest.raises(ValueError) as caught:
        delta.sum().backward()
    assert str(caught.value) == (
        "backend='cuda' has no backward of multi_lora; expected a decode step. Pass backend='triton' or "
        "backend='reference' for this call."
    )


@pytest.mark.usefixtures("cuda_on_cpu")
@pytest.mark.parametrize(("change", "said"), [
    ({"dropout": 0.1}, "backend='cuda' got dropout=0.1; expected 0"),
    ({"x": torch.zeros(4, 5, 40), "gate": torch.zeros(4, 2)}, "backend='cuda' got 20 rows of x; expected at most 16"),
])  # fmt: skip
def test_what_is_no_decode_step_is_refused_by_the_op_too(
    inputs: LoraInputs, change: dict[str, object], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        multi_lora_op(replace(inputs, **change), backend="cuda")  # type: ignore[arg-type]


@pytest.mark.usefixtures("cuda_on_cpu")
def test_other_ops_refuse_it_by_name() -> None:
    with pytest.raises(ValueError, match="backend='cuda' has no kernel for router_select; expected 'auto' or one of"):
        router_select(torch.zeros(1, 1), torch.zeros(1), backend="cuda")


@NEEDS_NO_CUDA
def test_asked_for_and_not_built_is_an_error_that_says_why(inputs: LoraInputs) -> None:
    expected = (
        f"backend='cuda' is not in this build of dmole_kernels ({cuda.MISSING}); expected 'auto' or one of "
        f"{', '.join(map(repr, BACKENDS))}. Pass backend='auto' or backend='reference'."
    )
    for ask in (lambda: multi_lora_op(inputs, backend="cuda"), lambda: choose_backend("cuda", "cuda")):
        with pytest.raises(ValueError) as caught:
            ask()
        assert str(caught.value) == expected
    assert f"missing   'cuda': {cuda.MISSING}" in explain_backend()


def test_the_reason_why_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "OPS", ("cuda_of_another_time",))
    monkeypatch.setattr(cuda.cpu, "EXTENSION", None)
    monkeypatch.setattr(cuda.cpu, "MISSING", "No module named 'dmole_kernels._C'")
    assert cuda._missing() == "No module named 'dmole_kernels._C'"
    monkeypatch.setattr(cuda.cpu, "EXTENSION", torch)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert cuda._missing() == f"torch {torch.__version__} is not a CUDA build"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert cuda._missing() == "dmole_kernels._C was built without nvcc, or of older sources"
    monkeypatch.setattr(cuda, "OPS", ())
    assert cuda._missing() == ""


def test_auto_never_takes_what_was_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backend.BACKENDS, "cuda", ("cuda",))
    assert choose_backend("auto", "cuda", torch.bfloat16).name != "cuda"


def test_auto_passes_triton_over_on_a_gpu_older_than_its_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "BACKENDS", {"triton": ("cuda",), "reference": None})
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert choose_backend("auto", "cuda").name == "triton"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    choice = choose_backend("auto", "cuda")
    assert choice.name == "reference"
    assert "; for 'triton' the GPU has compute capability 7.5; expected 8.0 or newer" in choice.reason
