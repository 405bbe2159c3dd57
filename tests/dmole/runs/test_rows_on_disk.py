# SPDX-License-Identifier: Apache-2.0
"""Runs whose rows stay on the disk, dry runs, and what limits leave out."""

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from dmole.cli import WRONG_INPUT, status
from dmole.config import RunConfig
from dmole.data.sample import Stream
from dmole.published import PUBLISHED, layout_findings
from dmole.recipes import RECIPES
from dmole.runs import checkpoint
from dmole.runs.runner import run

Configure = Callable[..., RunConfig]
COMPARED = ("matrix.csv", "predictions.jsonl.gz", "references.jsonl.gz", "losses.csv")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DMOLE_CACHE", str(tmp_path_factory.mktemp("cache")))


def screen() -> Console:
    return Console(file=io.StringIO(), width=400)


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def files(output: Path) -> dict[str, bytes]:
    return {f"{run.name}/{name}": (run / name).read_bytes() for run in (output / "runs").iterdir() for name in COMPARED}


def test_rows_on_the_disk_give_the_same_bytes_stopped_or_not(
    toy_config: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = toy_config("methods=[dmole, joint]", "training.save_steps=1", "lora.dropout=0.2", "train_samples=8")
    expected = files(run(config, console=screen()))
    disk = config.replace(rows="disk", output=str(tmp_path / "disk"))
    save, saved = checkpoint.save, []

    def save_and_stop(root: Path, tensors: dict, documents: dict) -> Path:  # type: ignore[type-arg]
        save(root, tensors, documents)
        saved.append(root)
        if len(saved) % 3 == 0:
            raise KeyboardInterrupt
        return root

    monkeypatch.setattr(checkpoint, "save", save_and_stop)
    stops = 0
    while True:
        try:
            run(disk, console=screen())
            break
        except KeyboardInterrupt:
            stops += 1
            assert stops < 20
    assert stops >= 3 and files(tmp_path / "disk") == expected


def test_a_finished_run_is_kept_wherever_its_rows_are(toy_config: Configure) -> None:
    config = toy_config("methods=zero_shot")
    run(config, console=screen())
    again = screen()
    run(config.replace(rows="disk"), console=again)
    assert "zero_shot-seed0-default: finished earlier, kept" in shown(again)


def test_what_a_limit_leaves_out_is_said(toy_config: Configure) -> None:
    console = screen()
    run(toy_config("methods=zero_shot", "train_samples=4", "test_samples=3"), console=console, dry_run=lambda _: [])
    assert "train_samples: keeps 12 of the 30 train samples of toy; --set train_samples=null keeps all" in shown(
        console
    )
    assert "test_samples: keeps 9 of the 12 test samples of toy; --set test_samples=null keeps all" in shown(console)
    whole = screen()
    run(toy_config("methods=zero_shot", "train_samples=400"), console=whole, dry_run=lambda _: [])
    assert "keeps" not in shown(whole)


def test_a_recipe_says_what_it_cuts_of_a_users_stream(
    toy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["run", str(toy_folder), "--recipe", "demo", "--model", "tiny", "--dry-run", "--set", "test_samples=2"]
    fast = ["--set", "training.per_device_train_batch_size=2", "--set", "evaluation.max_new_tokens=3"]
    assert status([*command, *fast, "-o", str(tmp_path / "out")]) == 0
    assert "test_samples: keeps 6 of the 12 test samples of toy" in capsys.readouterr().out.replace("\n", " ")


def test_a_dry_run_counts_and_writes_nothing(
    toy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    command = ["run", str(toy_folder), "--method", "dmole,finetune,zero_shot", "--model", "tiny", "--dry-run"]
    settings = ("training.num_train_epochs=2", "training.per_device_train_batch_size=4", "lora.rank=4")
    given = [part for setting in settings for part in ("--set", setting)]
    assert status([*command, "-o", str(output), *given]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "  colours: exact_match, 10 train, 0 validation, 4 test, 6 steps" in lines
    (dmole,) = [line for line in lines if line.startswith("dmole-seed0-default: ")]
    assert dmole.startswith("dmole-seed0-default: 3 stages, 18 steps, about ") and dmole.endswith(" 36 answers")
    assert "finetune-seed0-default: 3 stages, 18 steps, about " in "\n".join(lines)
    assert "zero_shot-seed0-default: 0 stages, 0 steps, about 0 trained weights a stage, 0 answers" in lines
    assert any(line.startswith("estimate: ") for line in lines)
    assert not output.exists()


@pytest.mark.parametrize("recipe", sorted(PUBLISHED))
def test_published_recipes_need_a_stream_and_a_model(
    recipe: str, toy_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status(["run", "--recipe", recipe, "--dry-run"]) == WRONG_INPUT
    assert "stream: got none; expected a folder with stream.yaml, or one of" in capsys.readouterr().err
    assert status(["run", str(toy_folder), "--recipe", recipe, "--dry-run"]) == WRONG_INPUT
    assert "model: got none; expected a folder or hub id of a model" in capsys.readouterr().err


def test_a_dry_run_says_how_a_stream_differs_from_the_recipes(
    toy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["run", str(toy_folder), "--recipe", "coin", "--model", "tiny", "--dry-run", "-o", str(tmp_path / "out")]
    assert status([*command, "--set", "training.per_device_train_batch_size=4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "recipe coin: the task ScienceQA is missing" in lines
    assert any(line.startswith("recipe coin: colours is none of its tasks (ScienceQA, TextVQA, ") for line in lines)


def test_layout_findings(toy_stream: Stream) -> None:
    assert layout_findings("mini", toy_stream) == [] and layout_findings(None, toy_stream) == []
    found = layout_findings("paper", toy_stream)
    assert "recipe paper: the task kvqa is missing" in found
    assert set(PUBLISHED) <= set(RECIPES)
