# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from dmole_kernels import router_score, router_select
from dmole_kernels.testing import poisoned_memory


def tensors(samples: int = 5, tasks: int = 3, width: int = 6, hidden: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((samples, width), (tasks, hidden, width), (tasks, hidden), (tasks, width, hidden), (tasks, width))
    return [torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in shapes]


def test_score_by_hand() -> None:
    """z = [1, 2], hidden = relu([[1, -1]] z + 2) = 1, linear output [3, 0] + [0, 1] = [3, 1]: (2^2 + 1^2) / 2."""
    z = torch.tensor([[1.0, 2.0]])
    arguments = (
        z,
        torch.tensor([[[1.0, -1.0]]]),
        torch.tensor([[2.0]]),
        torch.tensor([[[3.0], [0.0]]]),
        torch.tensor([[0.0, 1.0]]),
    )
    assert float(router_score(*arguments, decoder="linear")) == pytest.approx(2.5)
    sigmoid = [1 / (1 + math.exp(-3)), 1 / (1 + math.exp(-1))]
    expected = ((sigmoid[0] - 1) ** 2 + (sigmoid[1] - 2) ** 2) / 2
    assert float(router_score(*arguments)) == pytest.approx(expected)


@pytest.mark.parametrize("decoder", ["sigmoid", "linear"])
def test_score_equals_autoencoders_of_modules(decoder: str) -> None:
    z, we, be, wd, bd = tensors()
    with poisoned_memory():
        error = router_score(z, we, be, wd, bd, decoder=decoder)  # type: ignore[arg-type]
    assert error.shape == (5, 3)
    for t in range(3):
        encoder, output = nn.Linear(6, 2).double(), nn.Linear(2, 6).double()
        encoder.load_state_dict({"weight": we[t], "bias": be[t]})
        output.load_state_dict({"weight": wd[t], "bias": bd[t]})
        last = nn.Sigmoid() if decoder == "sigmoid" else nn.Identity()
        rebuilt = nn.Sequential(encoder, nn.ReLU(), output, last)(z)
        torch.testing.assert_close(error[:, t], (rebuilt - z).square().mean(1).detach())


@pytest.mark.parametrize("decoder", ["sigmoid", "linear"])
def test_gradcheck(decoder: str) -> None:
    leaves = [tensor.requires_grad_() for tensor in tensors(samples=4)]
    assert torch.autograd.gradcheck(lambda *t: router_score(*t, decoder=decoder), leaves)  # type: ignore[arg-type]


def test_score_of_no_samples() -> None:
    z, *weights = tensors(samples=0)
    assert router_score(z, *weights).shape == (0, 3)


@given(st.integers(0, 4), st.integers(1, 5), st.integers(1, 6), st.integers(0, 99))
def test_select_equals_the_definition(samples: int, tasks: int, top_k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Few distinct values, so that ties and errors on the threshold happen.
    error = torch.randint(0, 4, (samples, tasks), generator=generator).float()
    threshold = torch.randint(0, 4, (tasks,), generator=generator).float()
    gate = router_select(error, threshold, top_k=top_k)
    for n in range(samples):
        admitted = [t for t in range(tasks) if error[n, t] <= threshold[t]]
        chosen = sorted(admitted, key=lambda t: (float(error[n, t]), t))[:top_k]
        assert gate[n].nonzero().flatten().tolist() == sorted(chosen)


def test_select_by_the_docstring_s_example_and_never_a_nan() -> None:
    error = torch.tensor([[0.1, 0.3, 0.2], [0.5, 0.3, 0.6], [0.9, 0.9, 0.9], [float("nan"), 0.1, float("inf")]])
    gate = router_select(error, torch.tensor([0.25, 0.4, 0.25]))
    assert gate.tolist() == [[1, 0, 1], [0, 1, 0], [0, 0, 0], [0, 1, 0]]


def test_errors_tell_what_to_do() -> None:
    z, we, be, wd, bd = tensors()
    with pytest.raises(
        ValueError, match=r"decoder_weight has shape \(3, 2, 6\); expected \(3, 6, 2\) beside encoder_weight"
    ):
        router_score(z, we, be, wd.transpose(1, 2), bd)
    with pytest.raises(
        ValueError, match=r"features has shape \(6,\) and encoder_weight \(3, 2, 6\); expected \[samples, fea"
    ):
        router_score(z[0], we, be, wd, bd)
    with pytest.raises(ValueError, match="decoder='tanh'; expected 'sigmoid' or 'linear'"):
        router_score(z, we, be, wd, bd, decoder="tanh")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"error has shape \(5, 3\) and threshold \(2,\); expected \[samples, tasks\]"):
        router_select(torch.rand(5, 3), torch.rand(2))
    with pytest.raises(ValueError, match="top_k=0; expected at least 1. The paper's is 2"):
        router_select(torch.rand(5, 3), torch.rand(3), top_k=0)
    with pytest.raises(
        ValueError, match=r"threshold is NaN for tasks \[1\]; expected numbers, or -inf for a task that"
    ):
        router_select(torch.rand(5, 3), torch.tensor([0.1, float("nan"), 0.2]))
    with pytest.raises(
        ValueError, match=r"features has shape \(5, 4\); expected \(5, 6\) beside encoder_weight \(3, 2, 6\). Stack"
    ):
        router_score(z[:, :4], we, be, wd, bd)
    with pytest.raises(ValueError, match=r"encoder_bias has shape \(3, 3\); expected \(3, 2\) beside encoder_weight"):
        router_score(z, we, be[:, :1].expand(3, 3), wd, bd)
    with pytest.raises(ValueError, match=r"decoder_bias has shape \(2, 6\); expected \(3, 6\) beside encoder_weight"):
        router_score(z, we, be, wd, bd[:2])
    with pytest.raises(
        ValueError, match="features is int64; expected a floating-point dtype. Cast it, e.g. with .float"
    ):
        router_score(*(t.long() for t in (z, we, be, wd, bd)))
    with pytest.raises(
        ValueError, match="decoder_bias is float32 and features float64; expected one dtype. Cast the aut"
    ):
        router_score(z, we, be, wd, bd.float())
    with pytest.raises(ValueError, match="encoder_bias is on meta and features on cpu; expected one device"):
        router_score(z, we, be.to("meta"), wd, bd)
    with pytest.raises(ValueError, match="error is int64; expected a floating-point dtype"):
        router_select(torch.ones(5, 3, dtype=torch.int64), torch.rand(3))
    with pytest.raises(ValueError, match="threshold is on meta and error on cpu; expected one device"):
        router_select(torch.rand(5, 3), torch.rand(3).to("meta"))
    with pytest.raises(ValueError, match=r"error has shape \(5,\) and threshold \(3,\); expected \[samples, tasks\]"):
        router_select(torch.rand(5), torch.rand(3))
