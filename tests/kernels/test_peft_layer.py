# SPDX-License-Identifier: Apache-2.0
"""PEFT's own adapters as gated experts, beside stock PEFT on the same weights."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

peft = pytest.importorskip("peft")

from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402

from dmole_kernels import ExpertGates  # noqa: E402
from dmole_kernels.peft import GatedLoraLinear, check_gated, reduce_gradients, register_gated_lora  # noqa: E402

# PEFT asks transformers for a name that transformers has renamed.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # PEFT 0.20 looks for the base's folder, which a model made in memory has not.
    pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning"),
]

TARGETS = ["q_proj", "v_proj", "down_proj"]
IDS = torch.randint(3, 60, (3, 7), generator=torch.Generator().manual_seed(0))
MIXED = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, -1.0]])
NAMES = ["charts", "maps"]


def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    ).eval()  # fmt: skip


def config(rank: int, dropout: float = 0.0) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS, lora_dropout=dropout)


def gated(gates: ExpertGates, dropout: float = 0.0) -> PeftModel:
    model = get_peft_model(base(), register_gated_lora(config(4, dropout), gates), adapter_name="charts")
    model.add_adapter("maps", register_gated_lora(config(2, dropout), gates))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
            parameter.requires_grad_(True)
    return model.eval()


def alone(model: PeftModel, sample: int, weights: Tensor) -> Tensor:
    """The logits of one sample by stock PEFT: its adapters combined by hand, with their weights."""
    stock = get_peft_model(base(), config(4), adapter_name="charts")
    stock.add_adapter("maps", config(2))
    stock.load_state_dict(model.state_dict())
    for layer in stock.modules():
        if isinstance(layer, peft.tuners.lora.Linear):
            for name, weight in zip(NAMES, weights.tolist(), strict=True):
                layer.scaling[name] *= weight
    stock.base_model.set_adapter(NAMES)
    found: Tensor = stock.eval()(input_ids=IDS[sample : sample + 1]).logits[0]
    return found


def test_a_mixed_batch_equals_stock_peft_sample_by_sample() -> None:
    gates = ExpertGates()
    model = gated(gates)
    check_gated(model)
    with torch.no_grad(), gates.use(MIXED, NAMES):
        logits = model(input_ids=IDS).logits
    with torch.no_grad():
        for sample in range(3):
            torch.testing.assert_close(logits[sample], alone(model, sample, MIXED[sample]), rtol=1e-4, atol=1e-5)


def test_gradients_equal_those_of_stock_peft() -> None:
    gates = ExpertGates()
    model = gated(gates)
    with gates.use(torch.tensor([[1.0, 0.0]] * 3), NAMES):
        model(input_ids=IDS, labels=IDS).loss.backward()
    stock = get_peft_model(base(), config(4), adapter_name="charts").eval()
    stock.load_state_dict({k: v for k, v in model.state_dict().items() if "maps" not in k})
    stock(input_ids=IDS, labels=IDS).loss.backward()
    expected = {name: p.grad for name, p in stock.named_parameters() if p.grad is not None}
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert expected.keys() == found.keys() and len(expected) == 12
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-6)


def test_outside_a_block_it_is_peft_itself() -> None:
    gates = ExpertGates()
    model = gated(gates)
    stock = get_peft_model(base(), config(4), adapter_name="charts").eval()
    stock.load_state_dict({k: v for k, v in model.state_dict().items() if "maps" not in k})
    assert torch.equal(model(input_ids=IDS).logits, stock(input_ids=IDS).logits)
    with model.disable_adapter():
        assert torch.equal(model(input_ids=IDS).logits, base()(input_ids=IDS).logits)


def test_generates_with_beams_each_sample_by_its_own_adapters() -> None:
    gates = ExpertGates()
    model = gated(gates)
    settings = dict(max_new_tokens=4, do_sample=False, num_beams=2, attention_mask=torch.ones_like(IDS))
    with gates.use(MIXED, NAMES, units=1):
        mixed = model.generate(input_ids=IDS, **settings)
    for sample in range(3):
        with gates.use(MIXED[sample].expand(3, 2), NAMES, units=1):
            assert torch.equal(model.generate(input_ids=IDS, **settings)[sample], mixed[sample])


def test_saved_folders_are_stock_and_load_again_as_gated_experts(tmp_path: Path) -> None:
    gates = ExpertGates()
    model = gated(gates)
    model.save_pretrained(tmp_path)
    with torch.no_grad(), gates.use(torch.tensor([[0.0, 1.0]] * 3), NAMES):
        expected = model(input_ids=IDS).logits
    stock = PeftModel.from_pretrained(base(), tmp_path / "maps").eval()
    torch.testing.assert_close(stock(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)
    others = ExpertGates()
    folder = tmp_path / "maps"
    again = PeftModel.from_pretrained(
        base(), folder, adapter_name="maps", config=register_gated_lora(LoraConfig.from_pretrained(folder), others)
    ).eval()
    with torch.no_grad(), others.use(torch.ones(3, 1), ["maps"]):
        torch.testing.assert_close(again(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)


def test_transformers_add_adapter() -> None:
    gates = ExpertGates()
    model = base()
    model.add_adapter(register_gated_lora(config(4), gates), "charts")
    assert sum(isinstance(m, GatedLoraLinear) for m in model.modules()) == 6
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    with torch.no_grad(), gates.use(torch.tensor([[1.0], [0.0], [0.0]]), ["charts"]):
        logits = model(input_ids=IDS).logits
    plain = base()(input_ids=IDS).logits
    assert not torch.allclose(logits[0], plain[0])
    torch.testing.assert_close(logits[1:], plain[1:])


def test_dropout_draws_a_mask_in_training_only() -> None:
    gates = ExpertGates()
    model = gated(gates, dropout=0.3)
    with torch.no_grad(), gates.use(MIXED, NAMES):
        assert torch.equal(model(input_ids=IDS).logits, model(input_ids=IDS).logits)
        model.train()
        assert not torch.equal(model(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_a_copy_has_gates_of_its_own() -> None:
    gates = ExpertGates()
    model = gated(gates)
    copied = copy.deepcopy(model)
    with torch.no_grad(), gates.use(MIXED, NAMES):
        expected = model(input_ids=IDS).logits
        with pytest.raises(ValueError, match="the layer's gates are a copy, and the open block belongs to"):
            copied(input_ids=IDS)
    own = next(m.gates for m in copied.modules() if isinstance(m, GatedLoraLinear))
    with torch.no_grad(), own.use(MIXED, NAMES):
        assert torch.equal(copied(input_ids=IDS).logits, expected)


def test_what_cannot_be_gated_is_refused() -> None:
    gates = ExpertGates()
    with pytest.raises(ValueError, match="config has use_dora=True; expected a plain LoRA"):
        register_gated_lora(LoraConfig(use_dora=True), gates)
    model = gated(gates)
    with pytest.raises(ValueError, match="got 'chart', which no layer .* Did you mean 'charts'"):
        gates.use(torch.ones(3, 1), ["chart"])
    model.add_adapter("more", LoraConfig(r=2, target_modules=["up_proj"]))
    with pytest.raises(ValueError, match="2 LoRA layers of the model are not gated, such as .*up_proj"):
        check_gated(model)
    model.merge_adapter(["charts"])
    with gates.use(MIXED, NAMES), pytest.raises(ValueError, match=r"adapters \['charts'\] are merged into the base"):
        model(input_ids=IDS)


def test_sharded_adapters_are_refused(tmp_path: Path) -> None:
    """Also when blocks were open before: FSDP2 exchanges the Parameters without a word."""
    from torch import distributed
    from torch.distributed.fsdp import fully_shard

    gates = ExpertGates()
    model = gated(gates)
    with gates.use(MIXED, NAMES):
        model(input_ids=IDS)
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        with gates.use(MIXED[:, :1], NAMES[:1]):
            model(input_ids=IDS, labels=IDS).loss.backward()
        adapters = [(name, p) for name, p in model.named_parameters() if "lora_" in name]
        gradients = [None if p.grad is None else p.grad.clone() for _, p in adapters]
        reduce_gradients(model)  # of one process: as they were
        for (name, parameter), gradient in zip(adapters, gradients, strict=True):
            assert (gradient is None) == (".maps." in name)
            assert parameter.grad is None if gradient is None else torch.equal(parameter.grad, gradient)
        fully_shard(model)
        with pytest.raises(ValueError, match=r"got 'charts', whose parameters are sharded \(DTensor\)"):
            gates.use(MIXED, NAMES)
        with pytest.raises(ValueError, match=r"dmole_kernels\.peft\.reduce_gradients\(model\)"):
            reduce_gradients(model)
    finally:
        distributed.destroy_process_group()
