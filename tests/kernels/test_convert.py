# SPDX-License-Identifier: Apache-2.0
"""`convert` on any nn.Module: which linears, what their rows are, what it refuses; a refusal changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dmole_kernels import ExpertGates, ExpertHandle, MultiLoRALinear, convert, experts_of


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(8, 8)
        self.v_proj = nn.Linear(8, 8, bias=False)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.v_proj(self.q_proj(x).relu()))  # type: ignore[no-any-return]


class Model(nn.Module):
    """An embedding tied to its head, two blocks, a convolution and a linear that is there twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.conv = nn.Conv1d(8, 8, 1)
        self.shared = nn.Linear(8, 8)
        self.again = self.shared
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        x = self.conv(x.transpose(1, 2)).transpose(1, 2)
        return self.head(self.again(self.shared(x)))  # type: ignore[no-any-return]


IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


def made(kind: Callable[[], nn.Module] = Model) -> Any:
    torch.manual_seed(0)
    return kind()


def snapshot(model: nn.Module) -> list[object]:
    types = [(name, type(module)) for name, module in model.named_modules()]
    return [*types, *((name, id(p), p.requires_grad) for name, p in model.named_parameters())]


def fill(handle: ExpertHandle) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in handle.parameters():
        with torch.no_grad():
            parameter.normal_(std=0.5, generator=generator)


def test_outputs_stay_the_same_and_the_whole_model_is_frozen() -> None:
    model = made()
    # A convolution's algorithm depends on whether its weight learns.
    model.requires_grad_(False)
    before = model(IDS)
    model.requires_grad_(True)
    handle = convert(model)
    assert torch.equal(model(IDS), before)
    assert not any(p.requires_grad for p in model.parameters())
    handle.add("charts", rank=2)
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in handle.parameters()}


def test_none_takes_every_linear_but_tied_ones_and_says_what_it_skipped() -> None:
    handle = convert(made())
    assert list(handle.layers) == ["blocks.0.q_proj", "blocks.0.v_proj", "blocks.1.q_proj", "blocks.1.v_proj", "shared"]
    assert handle.skipped == {"head": "its weight is shared with 'embed'"}


def test_a_plain_sequential_in_three_lines() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    handle = convert(model)
    handle.add("charts", rank=2, alpha=3.0)
    fill(handle)
    x = torch.randn(2, 6)
    with handle.use(torch.tensor([[1.0], [0.0]]), ["charts"]):
        y = model(x)

    def linear(at: int, x: Tensor, gate: float) -> Tensor:
        layer = handle.layers[str(at)]
        expert = layer.bank.expert("charts")
        weight = layer.weight.double() + gate * 1.5 * expert.lora_b.double() @ expert.lora_a.double()
        return x @ weight.t() + layer.bias.double()  # type: ignore[union-attr]

    truth = [linear(2, linear(0, x[s].double(), gate).tanh(), gate) for s, gate in enumerate((1.0, 0.0))]
    torch.testing.assert_close(y.double(), torch.stack(truth), rtol=1e-5, atol=1e-6)


def test_the_output_head_is_skipped_by_what_the_model_says_and_by_its_usual_name() -> None:
    class Says(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.out, self.inner = nn.Linear(2, 2), nn.Linear(2, 2), nn.ModuleDict()
            self.inner["lm_head"] = nn.Linear(2, 2)

        def get_output_embeddings(self) -> nn.Module:
            return self.out

    handle = convert(Says())
    assert list(handle.layers) == ["body"]
    assert handle.skipped == {"out": "the output head", "inner.lm_head": "the output head"}


@pytest.mark.parametrize(
    "targets, expected",
    [
        (["q_proj"], ["blocks.0.q_proj", "blocks.1.q_proj"]),
        (["1.q_proj", "blocks.0.v_proj"], ["blocks.0.v_proj", "blocks.1.q_proj"]),
        (r"blocks\.1\..*_proj", ["blocks.1.q_proj", "blocks.1.v_proj"]),
        (("shared",), ["shared"]),
    ],
    ids=["ending", "endings_and_names", "regex", "name"],
)
def test_targets(targets: Any, expected: list[str]) -> None:
    model = made()
    assert list(convert(model, targets).layers) == expected
    assert [n for n, m in model.named_modules() if isinstance(m, MultiLoRALinear)] == expected


def test_a_full_name_means_that_module_alone() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
    assert list(convert(model, ["0"]).layers) == ["0"]


def test_a_module_that_is_there_twice_stays_one_layer() -> None:
    model = made()
    handle = convert(model, ["shared"])
    assert model.again is model.shared is handle.layers["shared"]


def test_modes_are_kept() -> None:
    model = made()
    model.blocks[0].eval()
    handle = convert(model)
    assert [layer.training for layer in handle.layers.values()] == [False, False, True, True, True]
    assert model.training and not model.blocks[0].training


def test_settings_reach_every_layer() -> None:
    gates = ExpertGates()
    handle = convert(made(), gates=gates, dropout=0.25, dropout_mode="per_expert", backend="reference", rows="samples")
    assert handle.gates is gates
    for name, layer in handle.layers.items():
        assert (layer.gates, layer.dropout, layer.dropout_mode) == (gates, 0.25, "per_expert")
        assert (layer.backend, layer.rows, layer.place) == ("reference", "samples", name)


def test_a_second_convert_leaves_the_experts_of_the_first_trainable() -> None:
    model = made()
    first = convert(model, ["q_proj"])
    first.add("charts", rank=2)
    second = convert(model, ["v_proj"])
    assert all(p.requires_grad for p in first.parameters())
    assert (list(first.layers), list(second.layers)) == (
        ["blocks.0.q_proj", "blocks.1.q_proj"],
        ["blocks.0.v_proj", "blocks.1.v_proj"],
    )
    with pytest.raises(ValueError, match=r"its layers have 2 different gates \(at \['blocks.0.q_proj', 'blocks.0.v_pr"):
        experts_of(model)
    assert experts_of(model, gates=second.gates).layers == second.layers
    with pytest.raises(ValueError, match="gates: no layer of the model has these; expected one of the 2"):
        experts_of(model, gates=ExpertGates())


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(8, 2)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.plain = nn.Linear(8, 8)


class OwnForward(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


@pytest.mark.parametrize(
    "name, reason",
    [
        ("mha.out_proj", "nn.MultiheadAttention reads its weight without calling it, so experts would never act"),
        ("encoder.self_attn.out_proj", "nn.MultiheadAttention reads its weight without calling it"),
        ("encoder.linear1", "the inference path of nn.TransformerEncoderLayer reads its weight without calling it"),
        ("encoder.linear2", "the inference path of nn.TransformerEncoderLayer reads its weight without calling it"),
    ],
)
def test_places_that_are_read_without_a_call_are_refused_by_name_and_skipped_by_default(name: str, reason: str) -> None:
    model = made(Attention)
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"targets: '{name}' cannot carry experts: {reason}"):
        convert(model, [name, "plain"])
    assert snapshot(model) == before
    handle = convert(model)
    assert list(handle.layers) == ["plain"]
    assert handle.skipped[name].startswith(reason)


def test_a_decoder_layer_calls_its_linears_in_training_and_at_test() -> None:
    torch.manual_seed(0)
    model = nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    handle = convert(model)
    assert list(handle.layers) == ["linear1", "linear2"]
    handle.add("charts", rank=2)
    fill(handle)
    x = torch.randn(2, 3, 8)
    outputs = []
    with handle.use(torch.ones(2, 1), ["charts"]):
        outputs.append(model(x, x))
        with torch.inference_mode():
            outputs.append(model.eval()(x, x))
    torch.testing.assert_close(*outputs)
    assert (outputs[1] - model(x, x)).abs().max() > 0.05


def test_subclasses_tied_weights_and_other_modules_are_refused_by_name() -> None:
    model = made()
    model.odd = OwnForward(8, 8)
    model.bare = nn.Linear(8, 8)
    del model.bare.weight
    before = snapshot(model)
    for targets, text in (
        (["odd"], "targets: 'odd' cannot carry experts: a OwnForward is a subclass of nn.Linear, whose forward is not"),
        (["head"], "targets: 'head' cannot carry experts: its weight is shared with 'embed'"),
        (["bare"], "targets: 'bare' cannot carry experts: it has no weight tensor"),
        (["q_proj", "conv"], "targets: 'conv' matches 'conv', a Conv1d; expected nn.Linear modules only"),
        (["norm"], r"targets: 'norm' matches 'blocks.0.norm', a LayerNorm; expected nn.Linear modules only"),
        (r"blocks\..*", "matches 'blocks.0', a Block; expected nn.Linear modules only"),
    ):
        with pytest.raises(ValueError, match=text):
            convert(model, targets)
    assert snapshot(model) == before
    assert convert(model).skipped.keys() == {"head", "odd", "bare"}


@pytest.mark.parametrize(
    "targets, text",
    [
        (["q_prok"], "targets: 'q_prok' is neither the name nor the ending of a module; .* Did you mean .*'q_proj'"),
        (["proj"], "targets: 'proj' is neither the name nor the ending"),
        ("q_proj", r"the regular expression 'q_proj' matches the whole name of no module; .* Use \['q_proj'\]"),
        ("(", r"targets: '\(' is not a regular expression"),
        ([], "targets: got no names; expected at least one. Pass None for every linear"),
        ([3], "targets: got a int; expected names as strings"),
        (["blocks.0.q_proj", ""], "targets: '' is neither"),
    ],
)
def test_targets_that_match_nothing_are_errors_with_near_names(targets: Any, text: str) -> None:
    model = made()
    before = snapshot(model)
    with pytest.raises(ValueError, match=text):
        convert(model, targets)
    assert snapshot(model) == before


def test_wrong_settings_change_nothing() -> None:
    model = made()
    before = snapshot(model)
    for settings, text in (
        (dict(dropout=1.5), "dropout is 1.5; expected a chance"),
        (dict(dropout_mode="each"), "dropout_mode is 'each'"),
        (dict(backend="tpu"), "backend='tpu' is not in this build"),
        (dict(gates=["a"]), "gates is a list; expected ExpertGates or None"),
        (dict(rows="tiles"), "rows: got 'tiles' for 'blocks.0.q_proj'; expected 'auto', 'samples'"),
        (dict(rows={"blocs": "units"}), "rows: 'blocs' is not a module of the model; .* Did you mean 'blocks'"),
    ):
        with pytest.raises(ValueError, match=text):
            convert(model, **settings)  # type: ignore[arg-type]
    assert snapshot(model) == before


def test_what_is_converted_already_and_what_cannot_be() -> None:
    model = made()
    convert(model, ["q_proj"])
    with pytest.raises(ValueError, match="targets: 'blocks.0.q_proj' already carries experts; .* Use experts_of"):
        convert(model, ["q_proj"])
    convert(model)
    with pytest.raises(ValueError, match="has no nn.Linear that can carry experts and carries none yet"):
        convert(model)
    with pytest.raises(ValueError, match="model: a Linear has no modules inside to replace; .* Use MultiLoRALinear"):
        convert(nn.Linear(2, 2), ["weight"])
    with pytest.raises(ValueError, match="it is the whole model; use MultiLoRALinear"):
        convert(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="model is a str; expected an nn.Module"):
        convert("llava")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Block has no MultiLoRALinear with gates; .* Call convert"):
        experts_of(Block())


def test_rows_by_mapping_and_by_function() -> None:
    handle = convert(made(), rows={"": "samples", "blocks.1": "units", "blocks.1.v_proj": None})
    assert [layer.rows for layer in handle.layers.values()] == ["samples", "samples", "units", None, "samples"]
    handle = convert(made(), rows=lambda name: "units" if "q_proj" in name else None)
    assert [layer.rows for layer in handle.layers.values()] == ["units", None, "units", None, None]


class Vlm(nn.Module):
    """Two towers and a projector, with configs as in transformers."""

    def __init__(self, *, own_text_config: bool = True) -> None:
        super().__init__()
        text, vision = SimpleNamespace(), SimpleNamespace()
        self.config = SimpleNamespace(vision_config=vision)
        self.config.get_text_config = lambda: text if own_text_config else self.config
        self.vision_tower, self.projector, self.language_model = Block(), nn.Linear(8, 8), Block()
        self.vision_tower.config, self.language_model.config = vision, text
        self.language_model.inner = Block()
        self.language_model.inner.config = text

    def forward(self, pixels: Tensor, owners: list[int], x: Tensor) -> Tensor:
        images = self.projector(self.vision_tower(pixels))
        for image, owner in zip(images, owners, strict=True):
            x = x.clone()
            x[owner] = x[owner] + image
        return self.language_model(x)  # type: ignore[no-any-return]


def test_rows_follow_the_config_of_a_model_with_a_vision_tower_wherever_it_is() -> None:
    for model, prefix in ((Vlm(), ""), (nn.ModuleDict({"vlm": Vlm(), "extra": nn.Linear(8, 8)}), "vlm.")):
        rows = {name: layer.rows for name, layer in convert(model).layers.items()}
        assert rows.pop("extra", None) is None
        assert {name for name, kind in rows.items() if kind == "samples"} == {
            f"{prefix}language_model.{part}" for part in ("q_proj", "v_proj", "inner.q_proj", "inner.v_proj")
        }
        assert {name for name, kind in rows.items() if kind == "units"} == {
            f"{prefix}{part}" for part in ("vision_tower.q_proj", "vision_tower.v_proj", "projector")
        }


def test_rows_that_the_config_does_not_tell_are_an_error_until_they_are_given() -> None:
    model = Vlm(own_text_config=False)
    before = snapshot(model)
    with pytest.raises(ValueError, match="rows: the config of 'Vlm' has a vision or audio tower, and the modules with"):
        convert(model)
    assert snapshot(model) == before
    assert convert(model, rows={"": "units", "language_model": "samples"}).layers["projector"].rows == "units"


def test_images_owned_unevenly_need_units_and_with_them_follow_their_sample() -> None:
    torch.manual_seed(0)
    model = Vlm().eval()
    handle = convert(model)
    for name in ("a", "b"):
        handle.add(name, rank=2)
    fill(handle)
    owners, x, pixels = [0, 0, 2], torch.randn(3, 4, 8), torch.randn(3, 4, 8)
    gate = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
    with handle.use(gate, ["a", "b"]), pytest.raises(ValueError, match=r"^vision_tower.q_proj: the rows of this layer"):
        model(pixels, owners, x)
    with handle.use(gate, ["a", "b"], units=[2, 0, 1]):
        mixed = model(pixels, owners, x)
    for sample in range(3):
        with handle.use(gate[sample].expand(3, 2), ["a", "b"], units=[2, 0, 1]):
            torch.testing.assert_close(mixed[sample], model(pixels, owners, x)[sample])


def test_errors_of_a_gate_name_the_layer() -> None:
    model = made()
    handle = convert(model)
    handle.add("charts", rank=2)
    with handle.use(torch.ones(3, 1), ["charts"]), pytest.raises(ValueError, match=r"^blocks.0.q_proj: gate has shape"):
        model(IDS)
    with pytest.raises(ValueError, match="got 'maps', which blocks.0.v_proj does not hold"):
        model.blocks[0].v_proj(torch.ones(1, 8), torch.ones(1, 1), ["maps"])


def test_the_input_may_be_a_keyword() -> None:
    handle = convert(made())
    handle.add("charts", rank=2)
    fill(handle)
    layer, x = handle.layers["shared"], torch.randn(2, 8)
    with handle.use(torch.ones(2, 1), ["charts"]):
        assert torch.equal(layer(input=x), layer(x))
