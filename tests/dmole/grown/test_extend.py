# SPDX-License-Identifier: Apache-2.0
"""A run over two tasks, extended by the third, beside a run that had all three from the start."""

import gzip
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dmole.cli import status
from dmole.config import RunConfig, load_config
from dmole.config_error import ConfigError
from dmole.data.sample import Task
from dmole.grown.extend import extend
from dmole.grown.forget import forget
from dmole.grown.saved import SavedModelError
from dmole.methods.dmole.method import DMoLE
from dmole.models.vision_language import VisionLanguageModel
from dmole.reports.verify import verify_results
from dmole.runs.evaluation import Evaluation
from dmole.runs.locks import LockedError, locked
from dmole.runs.rows import write_sealed
from dmole.runs.runner import run

METHODS = ("dmole", "finetune", "seq_ft")
REFUSED = ("joint", "zero_shot")


def part(toy: Path, to: Path, names: list[str]) -> Path:
    """The stream's folder with some of its tasks alone."""
    shutil.copytree(toy, to)
    lines = (toy / "stream.yaml").read_text().splitlines()
    kept = [line for line in lines[2:] if any(f"name: {name}," in line for name in names)]
    (to / "stream.yaml").write_text("\n".join([*lines[:2], *kept]) + "\n")
    return to


def config(stream: Path, output: Path, *more: str) -> RunConfig:
    return load_config(
        overrides=(
            f"stream={stream}", "model=tiny", f"output={output}", f"methods=[{', '.join(METHODS)}]",
            "training.num_train_epochs=4", "training.per_device_train_batch_size=4", "training.learning_rate=0.01",
            "lora.rank=4", "evaluation.per_device_eval_batch_size=5", "evaluation.max_new_tokens=6",
            "dmole.proxy_min_samples=4", "dmole.router.epochs=30", "training.report_to=[none]", *more,
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def folders(toy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of all methods over two tasks and over three, and the folder of the third task."""
    root = tmp_path_factory.mktemp("extended")
    two = part(toy_folder, root / "two", ["colours", "letters"])
    return {
        "two": run(config(two, root / "short")) / "runs",
        "three": run(config(toy_folder, root / "whole", f"methods=[{', '.join((*METHODS, *REFUSED))}]")) / "runs",
        "stream": two,
        "toy": toy_folder,
        "task": part(toy_folder, root / "captions", ["captions"]),
    }


def lines(folder: Path) -> list[dict[str, Any]]:
    with gzip.open(folder / "predictions.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("method", METHODS)
def test_it_ends_as_a_run_that_had_the_task_from_the_start(
    method: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    name = f"{method}-seed0-default"
    before = files(folders["two"] / name)
    extended = extend(folders["two"] / name, folders["task"], output=tmp_path / "out")
    assert files(folders["two"] / name) == before
    assert extended == tmp_path / "out" / "runs" / name
    whole = folders["three"] / name
    model = files(whole / "model")
    assert any(path.startswith("experts/") for path in model)
    assert files(extended / "model") == model
    last = [line for line in lines(whole) if line["stage"] == 3]
    assert [line for line in lines(extended) if line["stage"] == 3] == last
    old = lines(folders["two"] / name)
    assert [line for line in lines(extended) if line["stage"] < 3] == old
    assert (extended / "losses.csv").read_bytes() == (whole / "losses.csv").read_bytes()
    missing = json.loads((extended / "result.json").read_text())["not_measured"]
    rows = [0] if method == "finetune" else [0, 1, 2]
    assert missing == [[row, "captions"] for row in rows]
    report = verify_results(tmp_path / "out")
    assert report.ok, str(report)


@pytest.mark.parametrize("method", ["dmole", "finetune"])
def test_backfill_measures_the_cells_of_a_run_from_the_start(
    method: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    name = f"{method}-seed0-default"
    extended = extend(folders["two"] / name, folders["task"], output=tmp_path / "out", backfill=True)
    new = [line for line in lines(extended) if line["task"] == "captions"]
    assert new == [line for line in lines(folders["three"] / name) if line["task"] == "captions"]
    assert {line["stage"] for line in new} == ({0, 3} if method == "finetune" else {0, 1, 2, 3})
    assert json.loads((extended / "result.json").read_text())["not_measured"] == []
    assert files(extended / "model") == files(folders["three"] / name / "model")
    assert verify_results(tmp_path / "out").ok


def test_what_cannot_be_extended_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    task, output = folders["task"], tmp_path / "out"
    two, three = folders["two"] / "dmole-seed0-default", folders["three"]
    other = part(folders["task"], tmp_path / "other", [])
    (other / "stream.yaml").write_text("name: other\ntasks: [{name: new, metric: cider, directory: captions}]\n")
    with pytest.raises(ValueError, match="run: got one of joint, which trains on joint, not task after task"):
        extend(three / "joint-seed0-default", other, output=output)
    with pytest.raises(ValueError, match="run: got one of zero_shot, which trains nothing, not task after task"):
        extend(three / "zero_shot-seed0-default", other, output=output)
    with pytest.raises(ValueError, match="task: got 'captions', which .* has learned .*expected a new name"):
        extend(three / "dmole-seed0-default", task, output=output)
    with pytest.raises(ValueError, match="backfill: got a model of seq_ft, which keeps nothing of what it was"):
        extend(folders["two"] / "seq_ft-seed0-default", task, output=output, backfill=True)
    with pytest.raises(ConfigError, match="output: got .*short, where the run itself is; expected a new folder"):
        extend(two, task, output=folders["two"].parent)
    with pytest.raises(ValueError, match=r"whose stream.yaml lists 2 tasks \(colours, letters\); expected one"):
        extend(two, folders["stream"], output=output)
    assert not output.exists()


def test_a_changed_or_damaged_run_is_refused_by_name(folders: dict[str, Path], tmp_path: Path) -> None:
    copied = Path(shutil.copytree(folders["two"] / "dmole-seed0-default", tmp_path / "run"))
    forgotten = Path(shutil.copytree(copied, tmp_path / "forgotten"))
    forget(forgotten, "colours")
    with pytest.raises(SavedModelError, match=r"was changed after its run \(forget colours, .*Extend first"):
        extend(forgotten, folders["task"], output=tmp_path / "out")
    (copied / "predictions.jsonl.gz").write_bytes(gzip.compress(b"", mtime=0))
    with pytest.raises(SavedModelError, match="matrix.csv: row 0, colours, differs; expected what the run wrote"):
        extend(copied, folders["task"], output=tmp_path / "out")
    shutil.copy(folders["two"] / "dmole-seed0-default" / "predictions.jsonl.gz", copied)
    text = (copied / "config.json").read_text()
    (copied / "config.json").write_text(text.replace('"num_train_epochs": 4', '"num_train_epochs": 7'))
    with pytest.raises(SavedModelError, match="config.json was edited: its fingerprint does not match"):
        extend(copied, folders["task"], output=tmp_path / "out")
    document = json.loads(text)
    document["config"]["training"]["learning_rate"] = 0.02  # and not in the identity, which the fingerprint seals
    (copied / "config.json").write_text(json.dumps(document))
    with pytest.raises(SavedModelError, match="run: .* was made with another training than is here now"):
        extend(copied, folders["task"], output=tmp_path / "out")
    shutil.copy(folders["two"] / "dmole-seed0-default" / "config.json", copied)
    losses = (copied / "losses.csv").read_text().splitlines(keepends=True)
    (copied / "losses.csv").write_text("".join(line for line in losses if not line.startswith("2,")))
    with pytest.raises(SavedModelError, match="losses.csv: with result.json it lacks '2'; expected what the run wrote"):
        extend(copied, folders["task"], output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_data_and_another_base_are_refused(
    folders: dict[str, Path], toy_folder: Path, tmp_path: Path, tiny_model: VisionLanguageModel
) -> None:
    two = part(toy_folder, tmp_path / "two", ["colours", "letters"])
    done = run(config(two, tmp_path / "done", "methods=[finetune]", "training.num_train_epochs=1"))
    with torch.no_grad():
        next(tiny_model.model.parameters()).add_(1.0)
    tiny_model.model.save_pretrained(tmp_path / "base")
    tiny_model.processor.save_pretrained(tmp_path / "base")
    with pytest.raises(SavedModelError, match="base: got .*base, whose sha256 is .*expected tiny with"):
        extend(done, folders["task"], output=tmp_path / "out", base=str(tmp_path / "base"))
    file = two / "colours" / "train.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(SavedModelError, match=r"was made with another stream \(the data of its tasks\) than is here"):
        extend(done, folders["task"], output=tmp_path / "out")


@pytest.mark.parametrize("stop", ["raised", pytest.param("killed", marks=pytest.mark.slow)])
def test_a_stopped_extension_goes_on_to_the_same_files(
    stop: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped inside the backfill, then at the end of the stage; the same call goes on both times."""
    run_folder, output = folders["two"] / "dmole-seed0-default", tmp_path / "out"
    stages = output / "runs" / "dmole-seed0-default" / "stages"

    def stop_at(moment: str) -> None:
        if stop == "killed":
            arguments = [str(run_folder), "--task", str(folders["task"]), "--output", str(output), "--backfill"]
            command = [sys.executable, "-c", KILLED, moment, *arguments]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
            assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr
            return
        with monkeypatch.context() as patched, pytest.raises(Stopped):
            raise_at(moment, patched)
            extend(run_folder, folders["task"], output=output, backfill=True)

    stop_at("backfill-2.json")
    assert (stages / "backfill-1.json").exists() and not (stages / "backfill-2.json").exists()
    stop_at("end_stage")
    assert list((stages.parent / "checkpoints").iterdir()) and not (stages.parent / "result.json").exists()
    resumed = extend(run_folder, folders["task"], output=output, backfill=True)
    straight = extend(run_folder, folders["task"], output=tmp_path / "straight", backfill=True)
    for file in ("predictions.jsonl.gz", "references.jsonl.gz", "matrix.csv", "losses.csv"):
        assert (resumed / file).read_bytes() == (straight / file).read_bytes()
    assert files(resumed / "model") == files(straight / "model")
    again = files(resumed)
    assert extend(run_folder, folders["task"], output=output, backfill=True) == resumed
    assert files(resumed) == again
    with pytest.raises(ConfigError, match="output: .* holds another run; expected a new folder"):
        extend(run_folder, folders["task"], output=output)


class Stopped(BaseException):
    """What stops an extension in this process."""


def raise_at(moment: str, patched: pytest.MonkeyPatch) -> None:
    def end_stage(self: DMoLE, stage: int, task: Task) -> None:
        raise Stopped

    def write(file: Path, result: Evaluation) -> None:
        if file.name == moment:
            raise Stopped
        write_sealed(file, result)

    patched.setattr("dmole.grown.extend.write_sealed", write)
    if moment == "end_stage":
        patched.setattr(DMoLE, "end_stage", end_stage)


KILLED = """
import os, signal, sys
from dmole.cli import status
from dmole.methods.dmole.method import DMoLE

moment = sys.argv[1]

def look(event, arguments):
    if event == "open" and moment in str(arguments[0]):
        os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(look)
if moment == "end_stage":
    DMoLE.end_stage = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
sys.exit(status(["extend", *sys.argv[2:]]))
"""


def test_one_command_at_a_time_extends_into_a_folder(folders: dict[str, Path], tmp_path: Path) -> None:
    name, output = "dmole-seed0-default", tmp_path / "out"
    with locked(output, [name]), pytest.raises(LockedError, match=f"{name} is in use by process"):
        extend(folders["two"] / name, folders["task"], output=output)
    assert not (output / "runs").exists()


def test_an_extended_run_is_extended_again(folders: dict[str, Path], tmp_path: Path) -> None:
    first = extend(folders["two"] / "dmole-seed0-default", folders["task"], output=tmp_path / "first")
    fourth = part(folders["task"], tmp_path / "fourth", [])
    (fourth / "stream.yaml").write_text("name: other\ntasks: [{name: new, metric: cider, directory: captions}]\n")
    second = extend(first, fourth, output=tmp_path / "second")
    assert json.loads((second / "config.json").read_text())["tasks"] == ["colours", "letters", "captions", "new"]
    assert sorted(path.name for path in (second / "model" / "experts").iterdir()) == [
        "t01_colours", "t02_letters", "t03_captions", "t04_new",
    ]  # fmt: skip
    experts = files(first / "model" / "experts")
    assert {name: files(second / "model" / "experts")[name] for name in experts} == experts
    assert verify_results(tmp_path / "second").ok


def test_the_command_says_what_is_empty(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copied = Path(shutil.copytree(folders["two"].parent, tmp_path / "first"))
    name = "finetune-seed0-default"
    assert status(["extend", str(copied / "runs" / name), "--task", str(folders["task"])]) == 0
    said = capsys.readouterr().out
    assert "captions: not measured in rows 0, from before it was there" in said
    assert (tmp_path / "first-captions" / "runs" / name / "result.json").exists()


def test_a_run_in_another_order_is_extended_at_its_end(folders: dict[str, Path], tmp_path: Path) -> None:
    few = ("methods=[finetune]", "orders=[reversed]", "training.num_train_epochs=1", "train_samples=6")
    done = run(config(folders["stream"], tmp_path / "done", *few))
    extended = extend(done, folders["task"], output=tmp_path / "out")
    document = json.loads((extended / "config.json").read_text())
    assert document["tasks"] == ["letters", "colours", "captions"]
    assert document["order"].startswith("order-") and extended.name == f"finetune-seed0-{document['order']}"
    whole = config(folders["toy"], tmp_path / "whole", *few, "orders=['letters,colours,captions']")
    straight = run(whole) / "runs" / extended.name
    assert files(extended / "model") == files(straight / "model")
    assert verify_results(tmp_path / "out").ok


def test_an_interrupted_extension_names_the_same_command(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: DMoLE, stage: int, task: Task) -> None:
        signal.raise_signal(signal.SIGTERM)
        begin(self, stage, task)

    begin = DMoLE.begin_stage
    arguments = ["extend", str(folders["two"] / "dmole-seed0-default"), "--task", str(folders["task"])]
    arguments += ["--output", str(tmp_path / "out")]
    with monkeypatch.context() as patched:
        patched.setattr(DMoLE, "begin_stage", interrupt)
        assert status(arguments) == 128 + signal.SIGTERM
    said = capsys.readouterr().err.splitlines()
    assert said[-1] == "  " + " ".join(["dmole", *arguments])
    assert "a checkpoint is saved" in said[-2]
    assert status(arguments) == 0
    whole = files(folders["three"] / "dmole-seed0-default" / "model")
    assert files(tmp_path / "out" / "runs" / "dmole-seed0-default" / "model") == whole
