# SPDX-License-Identifier: Apache-2.0
"""Two experts in one frozen Transformer, each sample with its own, in training and in generation. No downloads.

Every linear layer of a small random Llama carries experts. Half of each batch counts up, half counts down: the first
number alone cannot tell which, so only the right expert for each sample can.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dmole_kernels import convert

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=32,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    initializer_range=0.1,
)
model = LlamaForCausalLM(config)

# What a model of yours needs: convert it, name the experts, train their parameters under a gate.
experts = convert(model, dropout=0.05)  # every linear but the output head; freezes the base
experts.add("up", rank=8, alpha=16.0)
experts.add("down", rank=4, alpha=8.0)
print(experts)
names = ["up", "down"]
optimizer = torch.optim.AdamW(experts.parameters(), lr=1e-2)
gate = torch.eye(2).repeat_interleave(16, dim=0)  # [32 samples, 2 experts]: 16 rows for each
step_of_sample = torch.tensor([1, -1]).repeat_interleave(16)
for step in range(60):
    first = torch.randint(0, 32, (32, 1))
    numbers = (first + step_of_sample[:, None] * torch.arange(6)) % 32
    with experts.use(gate, names):
        loss = model(input_ids=numbers, labels=numbers).loss
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 20 == 0 or step == 59:
        print(f"step {step:2d}  loss {loss.item():.2f}")

model.eval()
start = torch.tensor([[10], [10]])
with experts.use(torch.eye(2), names):
    mixed = model.generate(
        start, attention_mask=torch.ones_like(start), max_new_tokens=5, do_sample=False, eos_token_id=None
    )
print("one batch, two experts:", dict(zip(names, mixed.tolist(), strict=True)))
alone = model(input_ids=start).logits
with experts.use(torch.zeros(2, 2), names):
    assert torch.equal(model(input_ids=start).logits, alone)  # no active expert: exactly the base model
