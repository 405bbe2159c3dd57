# SPDX-License-Identifier: Apache-2.0
"""Experts in a plain nn.Sequential: one frozen network learns sin and cos, an expert each. No downloads.

The rows of one batch alternate between the two functions; the gate says which expert each row uses. The experts can be
merged into the weights when only one is needed.
"""

import tempfile

import torch
from torch import nn

from dmole_kernels import convert, load_experts, save_experts

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))

experts = convert(model)
experts.add("sin", rank=8)
experts.add("cos", rank=8)
names = ["sin", "cos"]
optimizer = torch.optim.AdamW(experts.parameters(), lr=1e-2)
gate = torch.eye(2).repeat(64, 1)  # [128 samples, 2 experts]: sin, cos, sin, cos, ...
for _ in range(300):
    x = 6 * torch.rand(128, 1) - 3
    target = torch.stack([x[0::2].sin(), x[1::2].cos()], 1).view(128, 1)
    with experts.use(gate, names):
        loss = nn.functional.mse_loss(model(x), target)
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print(f"error of a mixed batch: {loss.item():.4f}")

x = torch.linspace(-3, 3, 50)[:, None]
with tempfile.TemporaryDirectory() as folder, torch.no_grad():
    save_experts(model, folder)  # one stock PEFT LoRA folder per expert
    with experts.use(torch.ones(50, 1), ["cos"]):
        before = model(x)
    experts.remove("cos")
    load_experts(model, folder, names=["cos"])
    with experts.use(torch.ones(50, 1), ["cos"]):
        assert torch.equal(model(x), before)
    experts.merge("cos")  # into the weights: the plain network is now a cosine
    plain = experts.unconvert()
    print(f"merged into the weights, away from the gated network by at most {(plain(x) - before).abs().max():.0e}")
    print(plain)
