# SPDX-License-Identifier: Apache-2.0
"""Experts in a plain `nn.Sequential`: wrap, gate, merge, save and load, without any other package.

python examples/plain_sequential.py
"""

import tempfile

import torch
from torch import nn

from dmole_kernels import convert, load_experts, save_experts

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 4))
x = torch.randn(3, 8)
plain = model(x).detach()

experts = convert(model)
experts.add("charts", rank=4)
experts.add("maps", rank=2)
optimizer = torch.optim.AdamW(experts.parameters(), lr=1e-2)
gate = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
for _ in range(50):
    with experts.use(gate, ["charts", "maps"]):
        loss = (model(x)[:2] - 1).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
with torch.no_grad(), experts.use(gate, ["charts", "maps"]):
    gated = model(x)
same = torch.allclose(gated[2], plain[2], atol=1e-6)
print(f"loss {loss.item():.4f}; the sample without an expert is the base: {same}")

with tempfile.TemporaryDirectory() as folder:
    save_experts(model, folder)
    again = convert(nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 4)))
    again.model.load_state_dict(experts.base_state_dict(), strict=False)
    load_experts(again, folder)
    with torch.no_grad(), again.use(gate, ["charts", "maps"]):
        print("loaded experts give the same outputs:", torch.equal(again.model(x), gated))

experts.merge("charts")
print("merged, 'charts' needs no gate:", torch.allclose(model(x)[0], gated[0], atol=1e-5))
experts.unmerge("charts")
print("unmerged, the base is back to the bit:", torch.equal(model(x), plain))
