# SPDX-License-Identifier: Apache-2.0
"""Every program in examples/ runs and says what it claims; so do README's lines, on three kinds of models."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dmole_kernels import convert

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))
SAID = {
    "multi_lora_in_your_model": ["{'up': [10, 11, 12, 13, 14, 15], 'down': [10, 9, 8, 7, 6, 5]}"],
    "peft_adapters": ["'charts' alone: True", "'maps' alone: True", "in stock PEFT: True"],
    "plain_sequential": ["is the base: True", "the same outputs: True", "needs no gate: True", "to the bit: True"],
    "trainer_with_gates": ["'down', 'optimizer.pt'", "resumed equals uninterrupted: True"],
    "vision_language_model": ["LlavaForConditionalGeneration: sample 0 has its own expert beside any others: True",
                              "Qwen2_5_VLForConditionalGeneration: sample 0 has its own expert beside any others: True",
                              "loaded: True"],
}  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_says_what_it_claims(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert "False" not in said
    for line in SAID[name]:
        assert line in said


def loaded(name: str) -> ModuleType:
    found = ModuleType(name)
    sys.modules[name] = found
    exec(compile((ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8"), name, "exec"), found.__dict__)
    return found


def test_trainer_gives_the_same_experts_with_either_kind_of_checkpointing_and_without(tmp_path: Path) -> None:
    example = loaded("trainer_with_gates")
    kinds: dict[str, dict[str, Any]] = {
        "off": {"activation_checkpointing": False, "activation_checkpointing_kwargs": None},
        "saved_tensor_hooks": {"activation_checkpointing_kwargs": {"use_reentrant": False}},
        "reentrant": {"activation_checkpointing_kwargs": {"use_reentrant": True}},
    }
    found: dict[str, list[Tensor]] = {}
    for kind, changes in kinds.items():
        trainer = example.trainer(tmp_path / kind, max_steps=4, save_steps=4, **changes)
        before = [p.detach().clone() for p in trainer.experts.parameters()]
        base = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
        trainer.train()
        found[kind] = [p.detach().clone() for p in trainer.experts.parameters()]
        assert not any(torch.equal(one, two) for one, two in zip(before, found[kind], strict=True))
        assert all(torch.equal(p, base[n]) for n, p in trainer.model.named_parameters() if n in base)
        weights = [path for path in (tmp_path / kind / "checkpoint-4").rglob("*.safetensors")]
        assert sorted(path.parent.name for path in weights) == ["down", "up"]
    for kind in ("saved_tensor_hooks", "reentrant"):
        for one, two in zip(found["off"], found[kind], strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_trainer_resumes_with_the_same_parameter_objects(tmp_path: Path) -> None:
    """The optimizer of a resumed run holds the Parameters that `load_experts` filled in place."""
    example = loaded("trainer_with_gates")
    example.trainer(tmp_path, max_steps=2, save_steps=2).train()
    resumed = example.trainer(tmp_path, max_steps=4, save_steps=4)
    held = {id(p) for p in resumed.experts.parameters()}
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert {id(p) for p in resumed.experts.parameters()} == held
    optimized = {id(p) for group in resumed.optimizer.param_groups for p in group["params"]}
    assert optimized == held


class Scored(nn.Sequential):
    """A plain model with a loss, as README's lines call it."""

    def forward(self, x: Tensor) -> Any:
        from types import SimpleNamespace

        return SimpleNamespace(loss=super().forward(x).square().mean())


@pytest.mark.parametrize("kind", ["llava", "qwen", "sequential"])
def test_the_lines_of_the_readme_are_true(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block = next(
        b for b in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S) if "convert" in b
    )
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    if kind == "sequential":
        model: nn.Module = Scored(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4))
        batch: dict[str, Any] = {"x": torch.randn(3, 8)}
        block = block.replace('["q_proj", "v_proj"]', "None")
    else:
        model, batch, _ = loaded("vision_language_model").__dict__[kind]()
        batch["labels"] = batch["input_ids"]
    names: dict[str, Any] = {"model": model, "batch": batch}
    exec(block, names)
    experts = names["experts"]
    assert sorted(path.name for path in (tmp_path / "experts").iterdir()) == ["captions", "charts"]
    trained = [p for p in experts.parameters() if p.grad is not None and bool(p.grad.any())]
    assert trained and all(not p.requires_grad for n, p in model.named_parameters() if ".bank." not in n)
    assert convert is names["convert"]
