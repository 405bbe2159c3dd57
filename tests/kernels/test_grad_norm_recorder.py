# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dmole_kernels import ExpertGates, GradNorm, GradNormRecorder, MultiLoRALinear


def make_model(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    # In-place activation right after a recorded layer: the recorder must not get in its way.
    return nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 5, bias=False)
    ).to(dtype)


BATCHES = [torch.randn(3, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in range(3)]


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().sum()


def gradients(model: nn.Sequential, inputs: list[Tensor]) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Autograd's own weight gradients, summed over the inputs."""
    model.requires_grad_(True).zero_grad()
    for x in inputs:
        loss(model, x).backward()
    found = {
        name: (model[int(name)].weight.grad, getattr(model[int(name)].bias, "grad", None)) for name in ("0", "2", "4")
    }
    model.zero_grad(set_to_none=True)
    return found


def linears(model: nn.Sequential) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_children() if isinstance(module, nn.Linear)}


def check(norm: GradNorm, weight: Tensor, bias: Tensor | None) -> None:
    assert norm.weight == pytest.approx(float(weight.norm()), rel=1e-10)
    assert norm.bias == pytest.approx(0.0 if bias is None else float(bias.norm()), rel=1e-10)


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trainable"])
def test_accumulated_equals_autograd_over_all_batches(frozen: bool) -> None:
    model = make_model()
    expected = gradients(model, BATCHES)
    model.requires_grad_(not frozen)
    with GradNormRecorder(linears(model)) as recorder:
        for x in BATCHES:
            loss(model, x).backward()
    norms = recorder.norms()
    assert list(norms) == ["0", "2", "4"]
    for name, norm in norms.items():
        check(norm, *expected[name])
        assert (norm.calls, norm.relative_std) == (3, 0.0)


def test_leaves_the_model_as_it_was_and_allocates_no_gradient() -> None:
    model = make_model().requires_grad_(False)
    exact = model(BATCHES[0])
    with GradNormRecorder(linears(model)) as recorder:
        inside = model(BATCHES[0])
        inside.sum().backward()
        with torch.no_grad():
            assert not model(BATCHES[0]).requires_grad
    assert torch.equal(inside, exact)
    outside = model(BATCHES[0])
    assert torch.equal(outside, exact)
    assert not outside.requires_grad
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert recorder.norms()["0"].calls == 1


def test_a_backward_after_the_block_is_not_recorded() -> None:
    model = make_model().requires_grad_(False)
    with GradNormRecorder(linears(model)) as recorder:
        late = loss(model, BATCHES[0])
    late.backward()
    assert {norm.calls for norm in recorder.norms().values()} == {0}
    assert {norm.weight for norm in recorder.norms().values()} == {0.0}


def test_a_later_layer_alone_stops_backward_there() -> None:
    model = make_model().requires_grad_(False)
    reached: list[str] = []
    model[0].register_full_backward_hook(lambda *_: reached.append("0"))
    with GradNormRecorder({"4": model[4]}) as recorder:
        loss(model, BATCHES[0]).backward()
    assert not reached
    assert recorder.norms()["4"].weight > 0


@pytest.mark.parametrize("method", ["auto", "direct", "ghost"])
def test_per_batch_and_per_sample(method: str) -> None:
    model = make_model()
    for quantity, inputs in (
        ("per_batch", BATCHES),
        ("per_sample", [sample[None] for x in BATCHES for sample in x]),
    ):
        expected = [gradients(model, [x]) for x in inputs]
        model.requires_grad_(False)
        with GradNormRecorder(linears(model), quantity=quantity, method=method) as recorder:  # type: ignore[arg-type]
            for x in BATCHES:
                loss(model, x).backward()
        for name, norm in recorder.norms().items():
            weights = torch.stack([found[name][0].norm() for found in expected])
            torch.testing.assert_close(norm.weight_values, weights)
            assert norm.weight == pytest.approx(float(weights.mean()))
            if name != "4":
                biases = torch.stack([found[name][1].norm() for found in expected])  # type: ignore[union-attr]
                torch.testing.assert_close(norm.bias_values, biases)


def test_sketch_is_close_and_adds_up_over_processes() -> None:
    model = make_model()
    expected = gradients(model, BATCHES)
    model.requires_grad_(False)
    recorders = []
    for x in BATCHES:
        with GradNormRecorder(linears(model), method="sketch", sketch_size=64) as recorder:
            loss(model, x).backward()
        recorders.append(recorder)
    first, *others = recorders
    sent: list[list[Tensor]] = [[], []]
    for other, tensors in zip(others, sent, strict=True):
        other.reduce_(lambda tensor, tensors=tensors: tensors.append(tensor.clone()))
    waiting = list(zip(*sent, strict=True))

    def all_reduce(tensor: Tensor) -> None:
        for other in waiting.pop(0):
            tensor += other

    first.reduce_(all_reduce)
    assert not waiting
    for name, norm in first.norms().items():
        weight, bias = expected[name]
        assert norm.weight == pytest.approx(float(weight.norm()), rel=4 * norm.relative_std)
        assert 0 < norm.relative_std < 0.13
        assert (norm.calls, norm.forward_calls) == (3, 3)
        assert norm.bias == pytest.approx(0.0 if bias is None else float(bias.norm()))


def test_reduce_gives_a_layer_without_batches_its_share_of_the_calls() -> None:
    model = make_model()
    shapes: list[tuple[int, ...]] = []
    recorder = GradNormRecorder(linears(model))
    recorder.reduce_(lambda tensor: shapes.append(tuple(tensor.shape)))
    assert shapes == [(8, 6), (8,), (2,), (7, 8), (7,), (2,), (5, 7), (2,)]
    with pytest.raises(ValueError, match="reduce_ got quantity='per_batch'; expected 'accumulated'"):
        GradNormRecorder(linears(model), quantity="per_batch").reduce_(lambda tensor: None)


def test_padding_is_masked_where_named() -> None:
    model = make_model()
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
    outputs: list[Tensor] = []
    with GradNormRecorder(linears(model.requires_grad_(False))) as recorder, recorder.mask(mask, ["2", "4"]):
        hook = model[2].register_forward_hook(lambda m, i, o: outputs.extend((i[0].clone(), o)))
        loss(model, BATCHES[0]).backward()
        hook.remove()
    x, y = (tensor.detach() for tensor in outputs)
    y = (x @ model[2].weight.t() + model[2].bias).detach().requires_grad_()
    model[4](model[3](y)).square().sum().backward()
    grad = y.grad * mask[..., None]
    check(recorder.norms()["2"], torch.einsum("btp,btd->pd", grad, x), grad.sum((0, 1)))
    check(recorder.norms()["0"], *gradients(model, BATCHES[:1])["0"])


def test_two_dimensional_inputs_make_each_row_a_sample() -> None:
    model = make_model().requires_grad_(False)
    with GradNormRecorder(linears(model), quantity="per_sample") as recorder:
        loss(model, BATCHES[0][:, 0]).backward()
    assert recorder.norms()["0"].weight_values.shape == (3,)


def test_checkpointing_counts_every_layer_once() -> None:
    model = make_model()
    expected = gradients(model, BATCHES[:1])
    model.requires_grad_(False)
    with GradNormRecorder(linears(model)) as recorder:
        hidden = model[:2](BATCHES[0])
        checkpoint(model[2:], hidden, use_reentrant=False).square().sum().backward()
    for name, norm in recorder.norms().items():
        check(norm, *expected[name])
        assert norm.calls == 1


def test_bfloat16_model_is_accumulated_in_float32() -> None:
    model = make_model(torch.bfloat16).requires_grad_(False)
    with GradNormRecorder(linears(model)) as recorder:
        loss(model, BATCHES[0].bfloat16()).backward()
    assert recorder._weight_sums["0"].dtype == torch.float32


def test_the_base_of_a_multi_lora_linear() -> None:
    model = make_model()
    expected = gradients(model, BATCHES[:1])
    gates = ExpertGates()
    model[2] = MultiLoRALinear(model[2], gates=gates)
    model.requires_grad_(False)
    with GradNormRecorder({"2": model[2].base}) as recorder:
        loss(model, BATCHES[0]).backward()
    check(recorder.norms()["2"], *expected["2"])


def test_errors_tell_what_to_do() -> None:
    model = make_model()
    tied = nn.Linear(8, 8)
    tied.weight = model[0].weight
    with pytest.raises(
        ValueError, match="linears 'a' and 'b' share one weight; expected distinct parameters. Leave one"
    ):
        GradNormRecorder({"a": model[0], "b": tied})
    with pytest.raises(ValueError, match="quantity='sum'; expected one of accumulated, per_batch, per_sample"):
        GradNormRecorder({}, quantity="sum")  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match="method='ghost' for quantity='accumulated'; expected one of auto, exact, sketch"
    ):
        GradNormRecorder({}, method="ghost")
    with pytest.raises(ValueError, match="sketch_size=0; expected at least 1"):
        GradNormRecorder({}, sketch_size=0)
    recorder = GradNormRecorder(linears(model))
    with recorder:
        with pytest.raises(ValueError, match="already recording"):
            recorder.__enter__()
        with pytest.raises(ValueError, match=r"names has \['9'\]; expected some of \['0', '2', '4'\]"):
            recorder.mask(torch.ones(1, 1, dtype=torch.bool), ["9"]).__enter__()
        with (
            recorder.mask(torch.ones(3, 5, dtype=torch.bool)),
            pytest.raises(ValueError, match=r"mask has shape \(3, 5\) but the input of '0'"),
        ):
            model(BATCHES[0])
