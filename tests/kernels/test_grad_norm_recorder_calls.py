# SPDX-License-Identifier: Apache-2.0
"""GradNormRecorder where layers are called several times, never, by keyword, under masks with NaN, or share a weight.

Truth: autograd's gradients of weights that require grad, in float64, one sample at a time where norms are per sample.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dmole_kernels import ExpertGates, GradNormRecorder, MultiLoRALinear

X = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(0))


def layer(inputs: int = 6, outputs: int = 6) -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(inputs, outputs).requires_grad_(False)


def truth(forward: Callable[[nn.Linear, Tensor], Tensor], linear: nn.Linear, x: Tensor) -> tuple[Tensor, Tensor]:
    """The norms of the gradients of weight and bias for each sample alone."""
    weights, biases = [], []
    wide = nn.Linear(linear.in_features, linear.out_features).double()
    wide.load_state_dict({name: tensor.double() for name, tensor in linear.state_dict().items()})
    for sample in x.double().split(1):
        loss = forward(wide, sample).square().sum()
        weight, bias = torch.autograd.grad(loss, [wide.weight, wide.bias])
        weights.append(weight.norm())
        biases.append(bias.norm())
    return torch.stack(weights), torch.stack(biases)


def twice(linear: nn.Linear, x: Tensor) -> Tensor:
    return linear(torch.tanh(linear(x)))  # type: ignore[no-any-return]


def checked(reentrant: bool) -> Callable[[nn.Linear, Tensor], Tensor]:
    def forward(linear: nn.Linear, x: Tensor) -> Tensor:
        x = x if x.requires_grad else x.detach().requires_grad_()
        return checkpoint(twice, linear, x, use_reentrant=reentrant)  # type: ignore[no-any-return]

    return forward


def two_checkpoints(linear: nn.Linear, x: Tensor) -> Tensor:
    x = x if x.requires_grad else x.detach().requires_grad_()
    for _ in range(2):
        x = checkpoint(lambda x: torch.tanh(linear(x)), x, use_reentrant=True)
    return x


def as_plain(forward: Callable[[nn.Linear, Tensor], Tensor]) -> Callable[[nn.Linear, Tensor], Tensor]:
    """The same function without a checkpoint, for the truth."""
    return (lambda linear, x: torch.tanh(twice(linear, x))) if forward is two_checkpoints else twice


@pytest.mark.parametrize(
    "forward", [twice, checked(False), checked(True), two_checkpoints],
    ids=["plain", "saved_tensor_hooks", "reentrant", "two_reentrant"],
)  # fmt: skip
@pytest.mark.parametrize("method", ["direct", "ghost"])
def test_a_layer_used_twice_gives_one_value_per_sample_and_batch(
    forward: Callable[[nn.Linear, Tensor], Tensor], method: Any
) -> None:
    linear = layer()
    weights, biases = truth(as_plain(forward), linear, X)
    with GradNormRecorder({"l": linear}, quantity="per_sample", method=method) as recorder:
        for _ in range(2):  # two backward calls are two batches
            forward(linear, X).square().sum().backward()
    found = recorder.norms()["l"]
    assert found.weight_values.shape == (8,)
    torch.testing.assert_close(found.weight_values.double(), weights.repeat(2), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.bias_values.double(), biases.repeat(2), rtol=1e-5, atol=1e-6)
    with GradNormRecorder({"l": linear}, quantity="per_batch", method=method) as recorder:
        forward(linear, X).square().sum().backward()
    whole, _ = truth(as_plain(forward), linear, X[None])
    torch.testing.assert_close(recorder.norms()["l"].weight_values.double(), whole, rtol=1e-5, atol=1e-6)


def test_two_forwards_before_their_backwards_are_two_batches() -> None:
    linear = layer()
    weights, _ = truth(lambda m, x: m(x), linear, X)
    with GradNormRecorder({"l": linear}, quantity="per_sample") as recorder:
        losses = [linear(part).square().sum() for part in X.split(2)]
        for loss in losses:
            loss.backward()
        with torch.no_grad():
            linear(X)  # an evaluation in between changes nothing
        linear(X).square().sum().backward()
    torch.testing.assert_close(
        recorder.norms()["l"].weight_values.double(), weights.repeat(2), rtol=1e-5, atol=1e-6
    )  # fmt: skip


def test_called_without_a_gradient_is_told_apart() -> None:
    linear, other = layer(), layer()
    with GradNormRecorder({"l": linear, "o": other}) as recorder:
        linear(X)
        other(X).sum().backward()
    assert [recorder.norms()[name].calls for name in ("l", "o")] == [0, 1]


@pytest.mark.parametrize("quantity", ["accumulated", "per_batch", "per_sample"])
@pytest.mark.parametrize("what", ["grad_nan", "x_inf"])
def test_masked_tokens_may_hold_anything(quantity: Any, what: str) -> None:
    linear = layer()
    mask = torch.ones(4, 5, dtype=torch.bool)
    mask[1, 3:] = mask[3, 4:] = False
    x = X.clone()
    if what == "x_inf":
        x[1, 4] = float("inf")
    scale = torch.ones(4, 5, 1)
    if what == "grad_nan":
        scale[1, 3] = float("nan")
    with GradNormRecorder({"l": linear}, quantity=quantity) as recorder, recorder.mask(mask):
        (linear(x) * scale).square().sum().backward()
    clean = torch.where(mask[..., None], X, 0.0)

    def forward(m: nn.Linear, sample: Tensor) -> Tensor:
        rows = (sample != 0).any(-1, keepdim=True)
        return torch.where(rows, m(sample), torch.zeros((), dtype=sample.dtype))  # type: ignore[no-any-return]

    weights, biases = truth(forward, linear, clean)
    found = recorder.norms()["l"]
    if quantity == "per_sample":
        torch.testing.assert_close(found.weight_values.double(), weights, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.bias_values.double(), biases, rtol=1e-5, atol=1e-6)
    else:
        whole, bias = truth(forward, linear, clean[None])
        assert found.weight == pytest.approx(float(whole[0]), rel=1e-5)
        assert found.bias == pytest.approx(float(bias[0]), rel=1e-5)


@pytest.mark.parametrize("quantity", ["accumulated", "per_batch", "per_sample"])
def test_an_empty_batch_adds_nothing(quantity: Any) -> None:
    linear = layer()
    with GradNormRecorder({"l": linear}, quantity=quantity) as recorder:
        linear(X[:0]).sum().backward()
        linear(X).sum().backward()
    expected, _ = truth(lambda m, x: m(x).sum().sqrt() if x.dtype == torch.float32 else m(x), linear, X)
    found = recorder.norms()["l"]
    assert found.calls == 2
    assert found.weight > 0 and bool(torch.isfinite(found.weight_values).all())
    assert found.weight_values.numel() == {"accumulated": 0, "per_batch": 2, "per_sample": 4}[quantity]
    assert expected.shape == (4,)


def test_input_by_keyword_and_one_dimension() -> None:
    linear = layer()
    with GradNormRecorder({"l": linear}, quantity="per_sample") as recorder:
        linear(input=X).square().sum().backward()
        linear(X[0, 0]).square().sum().backward()
    weights, _ = truth(lambda m, x: m(x), linear, X)
    one, _ = truth(lambda m, x: m(x), linear, X[:1, :1])
    torch.testing.assert_close(
        recorder.norms()["l"].weight_values.double(), torch.cat([weights, one]), rtol=1e-5, atol=1e-6
    )  # fmt: skip


def test_a_residual_in_place_is_right_and_an_input_changed_in_place_raises() -> None:
    linear = layer()

    def residual(m: nn.Linear, x: Tensor) -> Tensor:
        y = m(x)
        y += x
        return y  # type: ignore[no-any-return]

    with GradNormRecorder({"l": linear}, quantity="per_sample") as recorder:
        residual(linear, X).square().sum().backward()
    weights, _ = truth(residual, linear, X)
    torch.testing.assert_close(recorder.norms()["l"].weight_values.double(), weights, rtol=1e-5, atol=1e-6)
    with GradNormRecorder({"l": linear}, quantity="per_sample"):
        x = X.clone()
        y = linear(x)
        x.mul_(2.0)
        with pytest.raises(ValueError, match="the input of 'l' was modified in place after the call"):
            y.square().sum().backward()


def test_the_base_of_a_layer_with_experts() -> None:
    gates = ExpertGates()
    wrapped = MultiLoRALinear(layer(), gates=gates)
    wrapped.bank.add("charts", rank=2, alpha=4.0)
    nn.init.normal_(wrapped.bank.expert("charts").lora_b)
    with GradNormRecorder({"l": wrapped.base}, quantity="per_sample") as recorder:
        with gates.use(torch.ones(4, 1), ["charts"]):
            wrapped(X).square().sum().backward()
    expert = wrapped.bank.expert("charts")
    delta = expert.scale * (X @ expert.lora_a.t() @ expert.lora_b.t()).detach()

    def forward(m: nn.Linear, x: Tensor) -> Tensor:
        sample = next(s for s in range(4) if torch.equal(X[s : s + 1].double(), x))
        return m(x) + delta[sample].double()  # type: ignore[no-any-return]

    weights, _ = truth(forward, wrapped.base, X)
    torch.testing.assert_close(recorder.norms()["l"].weight_values.double(), weights, rtol=1e-4, atol=1e-5)


def test_bias_norms_are_summed_in_float32_beside_bfloat16() -> None:
    """Large gradients that cancel: 4,096 rows of +100 and one of 1 in bfloat16 sums would lose the one."""
    linear = layer().bfloat16()
    grad = torch.full((1, 4097, 6), 100.0)
    grad[:, 2048:4096] = -100.0
    grad[:, 4096] = 1.0
    with GradNormRecorder({"l": linear}, quantity="per_sample") as recorder:
        y = linear(torch.zeros(1, 4097, 6, dtype=torch.bfloat16))
        y.backward(grad.bfloat16())
    assert recorder.norms()["l"].bias == pytest.approx(6**0.5, rel=1e-6)


def test_the_norm_of_a_large_accumulated_gradient_is_summed_in_two_stages() -> None:
    """One running float32 sum over so many squares comes out too small by a third of a percent."""
    wide = nn.Linear(11008, 2048, bias=False).requires_grad_(False)
    x, grad = torch.ones(1, 11008), torch.full((1, 2048), 0.1)
    with GradNormRecorder({"l": wide}) as recorder:
        wide(x).backward(grad)
    assert recorder.norms()["l"].weight == pytest.approx(0.1 * (11008 * 2048) ** 0.5, rel=5e-5)


def test_a_float16_model_has_float32_sums() -> None:
    linear = layer().half()
    with GradNormRecorder({"l": linear}) as recorder:
        linear(X.half()).float().square().sum().backward()
    whole, _ = truth(lambda m, x: m(x), linear, X.half()[None])
    assert recorder.norms()["l"].weight == pytest.approx(float(whole[0]), rel=2e-3)
