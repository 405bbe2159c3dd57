# SPDX-License-Identifier: Apache-2.0
"""GradNormRecorder refuses parameters that others use, and layers that are never called."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dmole_kernels import GradNormRecorder
from tests.kernels.recorder_truth import (
    BATCHES,
    Function,
    make_layer,
)

# Parameters that others use


def test_a_parameter_of_another_module_is_refused() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(6, 6), "head": nn.Linear(6, 6), "other": nn.Linear(6, 6)})
    linears = {"the head": model["head"]}
    GradNormRecorder(linears, model=model)  # type: ignore[arg-type]
    model["twice"] = model["head"]
    GradNormRecorder(linears, model=model)  # type: ignore[arg-type]
    model["other"].bias = model["head"].bias
    with pytest.raises(ValueError, match=r"the bias of 'the head' is also other.bias of model; expected a parameter"):
        GradNormRecorder(linears, model=model)  # type: ignore[arg-type]
    del model["other"]
    model["embed"].weight = model["head"].weight
    with pytest.raises(
        ValueError, match=r"the weight of 'the head' is also embed.weight of model; .* Leave 'the head'"
    ):
        GradNormRecorder(linears, model=model)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="linear 'a' is not a module of model; expected one"):
        GradNormRecorder({"a": nn.Linear(2, 2)}, model=model)
    with pytest.raises(ValueError, match="linears 'a' and 'b' share one bias; expected distinct parameters"):
        tied = nn.Linear(2, 2)
        other = nn.Linear(2, 2)
        other.bias = tied.bias
        GradNormRecorder({"a": tied, "b": other})


READS: dict[str, Function] = {
    "linear": lambda layer, x: F.linear(x, layer.weight),
    "keyword": lambda layer, x: F.linear(input=x, weight=layer.weight),
    "matmul": lambda layer, x: x @ layer.weight,
    "transpose": lambda layer, x: x @ layer.weight.T,
    "penalty": lambda layer, x: layer.weight.square().sum(),
    "bias": lambda layer, x: x + layer.bias,
    "in_a_list": lambda layer, x: torch.cat([x[0], layer.weight]),
}


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("name", READS)
def test_use_of_a_parameter_outside_its_layer_is_refused(name: str, frozen: bool) -> None:
    layer, x = make_layer().requires_grad_(not frozen), BATCHES[0]
    side = "bias" if name == "bias" else "weight"
    with GradNormRecorder({"q": layer}):
        layer(x)
        with pytest.raises(ValueError, match=f"the {side} of 'q' is used by .* outside the forward of its layer; expe"):
            READS[name](layer, x)
    READS[name](layer, x)


def test_reads_without_gradient_are_allowed() -> None:
    layer, x = make_layer(), BATCHES[0]
    with GradNormRecorder({"q": layer}):
        assert layer.weight.shape == (6, 6)
        assert x.to(layer.weight).type_as(layer.weight).dtype == layer.weight.dtype
        F.linear(x, layer.weight.detach())
        F.linear(x, layer.weight.data)
        torch.zeros_like(layer.weight)
        layer.weight.new_zeros(2)
        assert bool((layer.weight != 0).all())
        layer.requires_grad_(False)
        with torch.no_grad():
            layer.weight.mul_(1.0)


# Layers without a call or gradient


def test_a_layer_that_is_never_called_is_an_error_by_name() -> None:
    layer, unused, dead, silent = (make_layer() for _ in range(4))
    linears = {"used": layer, "unused": unused, "dead": dead, "silent": silent}
    with GradNormRecorder(linears) as recorder:
        dead(BATCHES[0])
        layer(BATCHES[0]).sum().backward()
        with torch.no_grad():
            silent(BATCHES[0])
    with pytest.raises(ValueError, match=r"linears \['unused', 'silent'\] were never called while recording; expected"):
        recorder.norms()
    with GradNormRecorder({"used": layer, "silent": silent}) as recorder:
        layer(BATCHES[0]).sum().backward()
        with torch.no_grad():
            silent(BATCHES[0])
    with pytest.raises(ValueError, match=r"linears \['silent'\] were called only under torch.no_grad while recording"):
        recorder.norms()
    with GradNormRecorder({"used": layer, "dead": dead}) as recorder:
        dead(BATCHES[0])
        layer(BATCHES[0]).sum().backward()
    norm = recorder.norms()["dead"]
    assert (norm.weight, norm.bias, norm.calls, norm.forward_calls) == (0.0, 0.0, 0, 1)


def test_a_layer_called_on_another_process_only_is_no_error() -> None:
    with GradNormRecorder({"layer": make_layer()}) as recorder:
        pass
    recorder.reduce_(lambda tensor: tensor.add_(2))
    norm = recorder.norms()["layer"]
    assert (norm.calls, norm.forward_calls, norm.weight) == (2, 2, pytest.approx(12.0))
