# SPDX-License-Identifier: Apache-2.0
"""Every program in examples/ runs and prints what it promises."""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dmole_kernels import convert, load_experts, save_experts

EXAMPLES = Path(__file__).parents[1] / "examples"


def loaded(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tensors(handle: Any) -> dict[str, Tensor]:
    return {
        f"{place}.{name}.{side}": parameter.detach().clone()
        for place, layer in handle.layers.items()
        for name in layer.bank.names
        for side, parameter in layer.bank.expert(name).named_parameters()
    }


def assert_same(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert torch.equal(value, two[key]), key


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small gain nothing from threads, which on a busy machine wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def trainer_example() -> ModuleType:
    return loaded("trainer_with_gates")


def test_trainer_with_gates(trainer_example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer_example.main(str(tmp_path))
    out = capsys.readouterr().out
    assert "resumed at step 20, the same experts bit for bit: True" in out
    assert float(out.split("evaluation loss ")[1].split()[0]) < 1.0
    # Only experts on disk: two LoRA folders and the state of the training, no weight of the base.
    checkpoint = tmp_path / "checkpoint-20"
    assert {path.name for path in checkpoint.iterdir()} == {
        "up", "down", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json",
    }  # fmt: skip
    files = {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*.safetensors")}
    assert files == {"up/adapter_model.safetensors", "down/adapter_model.safetensors"}


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non_reentrant", "reentrant"])
def test_trainer_with_gradient_checkpointing_trains_the_same_numbers(
    trainer_example: ModuleType, tmp_path: Path, use_reentrant: bool
) -> None:
    """Checkpointing of both kinds, with dropout, against none: the same experts bit for bit."""
    ends = []
    for kind, settings in {
        "none": dict(activation_checkpointing=False, activation_checkpointing_kwargs=None),
        "checkpointed": dict(activation_checkpointing_kwargs={"use_reentrant": use_reentrant}),
    }.items():
        model, handle = trainer_example.build_model()
        start = tensors(handle)
        settings = trainer_example.arguments(str(tmp_path / kind), max_steps=3, save_strategy="no", **settings)
        trainer = trainer_example.GatedTrainer(model, settings, train_dataset=trainer_example.rows(96, 1))
        trainer.train()
        ends.append(tensors(handle))
        assert all(not torch.equal(start[key], ends[-1][key]) for key in start)
        assert model.model.gradient_checkpointing == (kind != "none")
    assert_same(*ends)


def test_trainer_accumulates_gradients(trainer_example: ModuleType, tmp_path: Path) -> None:
    """Two micro-batches of 8 rows train what one of 16 does."""
    ends = []
    for size, accumulated in ((16, 1), (8, 2)):
        model, handle = trainer_example.build_model()
        for layer in handle.layers.values():
            layer.dropout = 0.0
        settings = trainer_example.arguments(
            str(tmp_path / f"{size}"), max_steps=2, save_strategy="no", per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulated, optim="sgd",
        )  # fmt: skip
        trainer_example.GatedTrainer(model, settings, train_dataset=trainer_example.rows(32, 1)).train()
        ends.append(tensors(handle))
    for key, value in ends[0].items():
        torch.testing.assert_close(ends[1][key], value, rtol=1e-4, atol=1e-7)


def test_trainer_goes_on_in_the_same_process(trainer_example: ModuleType, tmp_path: Path) -> None:
    """The experts of a checkpoint are loaded in place; the best model is loaded at the end."""
    model, handle = trainer_example.build_model()
    settings = trainer_example.arguments(
        str(tmp_path), max_steps=4, save_steps=2, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True
    )
    data = dict(train_dataset=trainer_example.rows(64, 1), eval_dataset=trainer_example.rows(16, 2))
    trainer = trainer_example.GatedTrainer(model, settings, **data)
    parameters = handle.parameters()
    trainer.train()
    end = tensors(handle)
    with torch.no_grad():
        for parameter in parameters:
            parameter.zero_()
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(one is two for one, two in zip(parameters, handle.parameters(), strict=True))
    assert_same(end, tensors(handle))


def test_trainer_evaluates_with_each_rows_own_expert(trainer_example: ModuleType, tmp_path: Path) -> None:
    model, handle = trainer_example.build_model()
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    rows = trainer_example.rows(4, 3)
    settings = trainer_example.arguments(str(tmp_path), per_device_eval_batch_size=4)
    got = trainer_example.GatedTrainer(model, settings, eval_dataset=rows).evaluate()["eval_loss"]
    model.eval()
    losses = []
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad(), handle.use(torch.ones(1, 1), [trainer_example.TASKS[row["task"]]]):
            losses.append(float(model(input_ids=ids, labels=ids).loss))
    assert got == pytest.approx(sum(losses) / 4, rel=1e-5)
    with torch.no_grad():
        ids = torch.tensor([row["input_ids"] for row in rows])
        assert abs(got - float(model(input_ids=ids, labels=ids).loss)) > 1e-2


COUNTED = "{'up': [10, 11, 12, 13, 14, 15], 'down': [10, 9, 8, 7, 6, 5]}"


def test_every_example_is_run_here() -> None:
    source = Path(__file__).read_text()
    names = [path.stem for path in EXAMPLES.glob("*.py")]
    assert len(names) >= 6 and all(f"def test_{name}(" in source for name in names)


def test_multi_lora_in_your_model(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "multi_lora_in_your_model.py"))
    assert COUNTED in capsys.readouterr().out


def test_plain_sequential(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "plain_sequential.py"))
    out = capsys.readouterr().out
    assert float(re.findall(r"error of a mixed batch: (\S+)", out)[0]) < 0.01
    assert float(re.findall(r"at most (\S+)", out)[0]) < 1e-5
    assert "MultiLoRALinear" not in out


# PEFT asks transformers for a name that transformers has renamed, and looks for the base's folder.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning")
def test_peft_adapters(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("peft")
    runpy.run_path(str(EXAMPLES / "peft_adapters.py"))
    out = capsys.readouterr().out
    assert COUNTED in out
    assert "stock PEFT, the adapter down: [10, 9, 8, 7, 6, 5]" in out


def test_vision_language_model(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "vision_language_model.py"), run_name="__main__")
    out = capsys.readouterr().out
    for name in ("llava", "qwen2_5_vl"):
        start, end = re.findall(rf"{name}: \d+ layers, loss (\S+) -> (\S+)", out)[0]
        assert float(end) < float(start)
        assert f"{name}: two beams, loaded again" in out


def torchrun(example: str, *arguments: str, preload: str = "") -> str:
    """What the example prints on two processes; torchrun --standalone finds a free port by itself."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        str(EXAMPLES / f"{example}.py"), *arguments,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent), "LD_PRELOAD": preload}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_two_processes() -> None:
    assert "{'up': [10, 11, 12], 'down': [10, 9, 8]}" in torchrun("two_processes")


@pytest.mark.slow
def test_trainer_with_gates_under_ddp(tmp_path: Path) -> None:
    """Both processes resume to the same experts; the checkpoint holds experts and no base."""
    out = torchrun("trainer_with_gates", str(tmp_path))
    assert out.count("resumed at step 20, the same experts bit for bit: True") == 2
    files = {path.relative_to(tmp_path).as_posix() for path in (tmp_path / "checkpoint-20").rglob("*.safetensors")}
    assert files == {f"checkpoint-20/{name}/adapter_model.safetensors" for name in ("up", "down")}


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux" or shutil.which("cc") is None, reason="needs LD_PRELOAD and a C compiler")
@pytest.mark.parametrize("example", ["two_processes", "trainer_with_gates"])
def test_processes_end_while_gloo_still_frees_tensors(example: str, tmp_path: Path) -> None:
    """They did not: a thread that frees a tensor while the interpreter shuts down aborts the process (SIGABRT)."""
    source, library = Path(__file__).with_name("slow_gloo.c"), tmp_path / "slow_gloo.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", str(source), "-o", str(library), "-ldl"], check=True)
    torchrun(example, *([str(tmp_path / "out")] if example == "trainer_with_gates" else []), preload=str(library))


def readme_block() -> str:
    readme = (EXAMPLES.parent / "README.md").read_text()
    (block,) = (code for code in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "convert(model)" in code)
    return block


def vision_language(name: str) -> tuple[Callable[[], nn.Module], Any, Callable[[nn.Module, Any], Tensor]]:
    example = loaded("vision_language_model")
    example.UNITS = [1, 1, 1]
    torch.manual_seed(0)
    batch = getattr(example, f"{name}_inputs")()
    batch["labels"] = batch["input_ids"].masked_fill(batch["input_ids"] < 10, -100)
    return (lambda: getattr(example, name)().eval()), batch, lambda model, batch: model(**batch).loss


def sequential() -> tuple[Callable[[], nn.Module], Any, Callable[[nn.Module, Any], Tensor]]:
    batch = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    return (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)),
        batch,
        lambda model, batch: model(batch).square().mean(),
    )


@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl", "sequential"])
def test_the_lines_of_the_readme(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build, batch, loss_of = sequential() if kind == "sequential" else vision_language(kind)

    def model() -> nn.Module:
        torch.manual_seed(1)
        return build()

    def outputs(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return model(batch) if kind == "sequential" else model(**batch).logits  # type: ignore[no-any-return]

    monkeypatch.chdir(tmp_path)
    before = outputs(model())
    names: dict[str, Any] = {"model": model(), "batch": batch, "loss_of": loss_of}
    exec(readme_block(), names)

    experts = names["experts"]
    assert len(experts.layers) == {"llava": 28, "qwen2_5_vl": 26, "sequential": 2}[kind]
    for key, parameter in names["model"].named_parameters():
        assert (parameter.grad is not None) == (".bank." in key) == parameter.requires_grad
        if key.endswith("lora_b"):
            assert parameter.grad is not None and parameter.grad.norm() > 0, key
    assert {path.name for path in (tmp_path / "experts").iterdir()} == {"captions", "charts"}

    # "the last sample gets the base model", and the experts are another model's after load_experts.
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(std=0.3)
    save_experts(names["model"], "experts")
    other = model()
    again = convert(other)
    load_experts(other, "experts")
    for handle in (experts, again):
        with handle.use(names["gate"], ["captions", "charts"], units=[1, 1, 1]):
            after = outputs(handle.model)
        torch.testing.assert_close(after[2], before[2], rtol=1e-4, atol=1e-5)
        assert all((after[s] - before[s]).abs().max() > 1e-2 for s in (0, 1))
        if handle is experts:
            first = after
    assert torch.equal(first, after)
