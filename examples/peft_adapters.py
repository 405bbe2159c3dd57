# SPDX-License-Identifier: Apache-2.0
"""PEFT's own LoRA adapters as gated experts: each sample of a batch uses its own. Needs peft. No downloads.

Models, adapters, files and `generate` stay PEFT's; only the config is registered with gates.
"""

import tempfile

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from dmole_kernels import ExpertGates
from dmole_kernels.peft import register_gated_lora


def base_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.1,
    )
    return LlamaForCausalLM(config)


TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
gates = ExpertGates()
config = register_gated_lora(LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS), gates)
model = get_peft_model(base_model(), config, adapter_name="up")
model.add_adapter("down", register_gated_lora(LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS), gates))

names = ["up", "down"]
adapters = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
for parameter in adapters:
    parameter.requires_grad_(True)  # PEFT trains the active adapter only
optimizer = torch.optim.AdamW(adapters, lr=1e-2)
gate = torch.eye(2).repeat_interleave(16, dim=0)
step_of_sample = torch.tensor([1, -1]).repeat_interleave(16)
for _ in range(60):
    numbers = (torch.randint(0, 32, (32, 1)) + step_of_sample[:, None] * torch.arange(6)) % 32
    with gates.use(gate, names):
        model(input_ids=numbers, labels=numbers).loss.backward()
    optimizer.step()
    optimizer.zero_grad()

model.eval()
start = torch.tensor([[10], [10]])
greedy = dict(attention_mask=torch.ones_like(start), max_new_tokens=5, do_sample=False, eos_token_id=None)
with gates.use(torch.eye(2), names):
    mixed = model.generate(input_ids=start, **greedy)
print("one batch, two adapters:", dict(zip(names, mixed.tolist(), strict=True)))

with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)  # stock folders: up/ and down/
    stock = PeftModel.from_pretrained(base_model(), f"{folder}/down").eval()
    alone = stock.generate(input_ids=start, **greedy)
    print("stock PEFT, the adapter down:", alone[0].tolist())
