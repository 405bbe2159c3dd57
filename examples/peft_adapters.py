# SPDX-License-Identifier: Apache-2.0
"""PEFT's own adapters as gated experts: one batch, each sample by its own adapter. Needs peft.

python examples/peft_adapters.py
"""

import tempfile

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from dmole_kernels import ExpertGates
from dmole_kernels.peft import register_gated_lora


def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


gates = ExpertGates()
targets = ["q_proj", "v_proj"]
model = get_peft_model(base(), register_gated_lora(LoraConfig(r=8, target_modules=targets), gates), "charts")
model.add_adapter("maps", register_gated_lora(LoraConfig(r=4, target_modules=targets), gates))
for name, parameter in model.named_parameters():
    if "lora_" in name:
        nn.init.normal_(parameter, std=0.2)
model.eval()
ids = torch.randint(3, 60, (2, 6))
with torch.no_grad(), gates.use(torch.eye(2), ["charts", "maps"]):
    mixed = model(input_ids=ids).logits
for sample, name in enumerate(["charts", "maps"]):
    model.set_adapter(name)
    with torch.no_grad():
        alone = model(input_ids=ids[sample : sample + 1]).logits[0]
    print(f"sample {sample} equals PEFT's own {name!r} alone:", torch.allclose(mixed[sample], alone, atol=1e-5))
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    stock = PeftModel.from_pretrained(base(), f"{folder}/maps").eval()
    with torch.no_grad():
        print("the saved folder in stock PEFT:", torch.allclose(stock(input_ids=ids).logits[1], mixed[1], atol=1e-5))
