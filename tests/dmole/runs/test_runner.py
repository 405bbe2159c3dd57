# SPDX-License-Identifier: Apache-2.0
"""Whole runs on the toy stream: what they write, what they refuse, and going on after being stopped anywhere."""

import csv
import dataclasses
import gzip
import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from dmole.config import RunConfig
from dmole.data.reading import DataError
from dmole.reports.run_files import SUMMARY_COLUMNS
from dmole.runs import checkpoint
from dmole.runs.checkpoint import CheckpointError
from dmole.runs.runner import run

Configure = Callable[..., RunConfig]
COMPARED = ("matrix.csv", "predictions.jsonl.gz", "references.jsonl.gz", "losses.csv")


def quiet() -> Console:
    return Console(file=io.StringIO())


def files(output: Path) -> dict[str, bytes]:
    return {f"{run.name}/{name}": (run / name).read_bytes() for run in (output / "runs").iterdir() for name in COMPARED}


def table(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def measured(run_folder: Path) -> set[tuple[int, int]]:
    rows = list(csv.reader((run_folder / "matrix.csv").read_text().splitlines()))[1:]
    assert [int(row[0]) for row in rows] == [0, 1, 2, 3]
    return {(stage, column) for stage, row in enumerate(rows) for column, cell in enumerate(row[1:]) if cell}


@pytest.fixture(scope="module")
def all_methods(tmp_path_factory: pytest.TempPathFactory, toy_folder: Path) -> Path:
    from dmole.config import load_config

    overrides = [
        f"stream={toy_folder}",
        "model=tiny",
        f"output={tmp_path_factory.mktemp('all') / 'out'}",
        "threads=1",
        "methods=[seq_ft, finetune, joint, zero_shot, dmole]",
        "orders=[reversed]",
        "seeds=[5]",
        "training={num_train_epochs: 1, per_device_train_batch_size: 4}",
        "evaluation={per_device_eval_batch_size: 8, max_new_tokens: 3}",
        "lora.rank=4",
        "dmole={proxy_min_samples: 4, router: {epochs: 3, margin: 50.0}}",
    ]
    return run(load_config(overrides=overrides), console=quiet())


def test_each_method_fills_the_cells_of_its_protocol(all_methods: Path) -> None:
    zero = {(0, column) for column in range(3)}
    every = {(row, column) for row in range(4) for column in range(3)}
    runs = all_methods / "runs"
    assert measured(runs / "seq_ft-seed5-reversed") == every
    assert measured(runs / "dmole-seed5-reversed") == every
    assert measured(runs / "zero_shot-seed5-reversed") == zero
    assert measured(runs / "joint-seed5-reversed") == zero | {(3, column) for column in range(3)}
    assert measured(runs / "finetune-seed5-reversed") == zero | {(1, 0), (2, 1), (3, 2)}
    headers = {(run / "matrix.csv").read_text().splitlines()[0] for run in runs.iterdir()}
    assert headers == {"stage,captions,letters,colours"}


def test_a_run_records_what_it_was_made_with(all_methods: Path) -> None:
    folder = all_methods / "runs" / "dmole-seed5-reversed"
    names = {"config.json", "environment.json", "result.json", "matrix.png", "model", *COMPARED}
    assert {path.name for path in folder.iterdir()} == names
    config = json.loads((folder / "config.json").read_text())
    assert (config["method"], config["seed"], config["order"]) == ("dmole", 5, "reversed")
    assert config["config"]["dmole"]["router"]["epochs"] == 3
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["threads"] == 1
    assert environment["deterministic_algorithms"] is True
    assert environment["packages"]["torch"]
    assert len(environment["base_weights_sha256"]) == 64


def test_raw_predictions_are_kept_with_their_routes(all_methods: Path) -> None:
    def lines(method: str, name: str) -> list[dict[str, object]]:
        data = gzip.decompress((all_methods / "runs" / f"{method}-seed5-reversed" / name).read_bytes()).decode()
        return [json.loads(line) for line in data.split("\n") if line]

    said = lines("dmole", "predictions.jsonl.gz")
    assert len(said) == 4 * 12
    assert {line["stage"] for line in said} == {0, 1, 2, 3}
    assert all(line["route"] is None for line in said if line["stage"] == 0)
    assert all(isinstance(line["route"], list) for line in said if line["stage"] != 0)
    assert all(line["route"] is None for line in lines("seq_ft", "predictions.jsonl.gz"))
    references = lines("dmole", "references.jsonl.gz")
    assert len(references) == 12
    versions = {(line["metric"], line["metric_version"]) for line in references}
    assert versions == {("exact_match", 2), ("option_letter", 2), ("cider", 1)}
    config = json.loads((all_methods / "runs" / "dmole-seed5-reversed" / "config.json").read_text())
    assert set(config["identity"]["metrics"].items()) == versions


def test_result_tells_where_time_and_samples_went(all_methods: Path) -> None:
    result = json.loads((all_methods / "runs" / "dmole-seed5-reversed" / "result.json").read_text())
    profile = result["profile"]
    assert set(profile["step_ms_by_part"]) == {"data", "forward", "backward", "optimizer"}
    assert profile["step_ms"] == pytest.approx(sum(profile["step_ms_by_part"].values()))
    assert profile["steps"] == 9
    assert profile["method_seconds"].keys() == {"proxy_seconds", "router_seconds"}
    assert set(result["routing"]) == {"1", "2", "3"}
    assert set(result["well_formed"]) == {"0", "1", "2", "3"}
    assert result["peak_memory_gib"] > 0
    assert len(result["trainable_parameters_by_stage"]) == 3
    assert result["method"]["experts"]


def test_summary_and_step_times(all_methods: Path) -> None:
    rows = {row["method"]: row for row in table(all_methods / "summary.csv")}
    assert set(rows) == {"seq_ft", "finetune", "joint", "zero_shot", "dmole"}
    assert tuple(rows["dmole"]) == (*SUMMARY_COLUMNS, "proxy_seconds", "router_seconds")
    assert float(rows["dmole"]["proxy_seconds"]) > 0 and rows["seq_ft"]["proxy_seconds"] == ""
    assert rows["finetune"]["AVG"] == rows["joint"]["BWT"] == rows["zero_shot"]["BWT"] == ""
    assert all(row["Last"] for row in rows.values())
    assert all(rows["dmole"][column] for column in SUMMARY_COLUMNS)
    assert rows["seq_ft"]["routing_accuracy"] == ""
    trained = {name: int(row["trainable_parameters"]) for name, row in rows.items()}
    assert trained["zero_shot"] == 0
    assert trained["seq_ft"] == trained["finetune"] == trained["joint"]
    assert trained["seq_ft"] == pytest.approx(trained["dmole"], rel=0.25)
    steps = {row["method"]: row for row in table(all_methods / "profile.csv")}
    assert set(steps) == {"seq_ft", "finetune", "joint", "dmole"}
    assert float(steps["seq_ft"]["times_seq_ft"]) == 1.0
    assert float(steps["dmole"]["times_seq_ft"]) > 0


def test_row_zero_is_the_same_for_every_method(all_methods: Path) -> None:
    rows = {(folder / "matrix.csv").read_text().splitlines()[1] for folder in (all_methods / "runs").iterdir()}
    assert len(rows) == 1
    assert len(list((all_methods / "zero_shot").iterdir())) == 1


def test_two_runs_are_equal_bit_for_bit_and_a_third_keeps_them(toy_config: Configure, tmp_path: Path) -> None:
    settings = ("methods=[dmole, seq_ft]", "orders=[shuffled1]", "lora.dropout=0.2")
    config = toy_config(*settings)
    first = run(config, console=quiet())
    second = run(config.replace(output=str(tmp_path / "again")), console=quiet())
    assert files(first) == files(second)
    written = (first / "runs" / "dmole-seed0-shuffled1" / "result.json").read_bytes()
    screen = io.StringIO()
    run(config, console=Console(file=screen))
    assert "dmole-seed0-shuffled1: finished earlier, kept" in screen.getvalue()
    assert (first / "runs" / "dmole-seed0-shuffled1" / "result.json").read_bytes() == written


class Stopped(KeyboardInterrupt):
    """What Ctrl-C raises, at a moment of the test's choosing."""


@pytest.mark.parametrize("method", ["dmole", "seq_ft"])
def test_stopping_at_any_checkpoint_changes_nothing(
    method: str, toy_config: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extra = ("seq_ft.mode=merge_and_restart",) if method == "seq_ft" else ()
    config = toy_config(f"methods={method}", "training.save_steps=1", "lora.dropout=0.2", "train_samples=8", *extra)
    expected = files(run(config, console=quiet()))
    save, phases = checkpoint.save, []

    def save_and_stop(root: Path, tensors: dict, documents: dict) -> Path:  # type: ignore[type-arg]
        save(root, tensors, documents)
        phases.append(documents["position"]["phase"])
        # Each process gets one checkpoint further than the last one.
        raise Stopped

    disturbed = config.replace(output=str(tmp_path / "disturbed"))
    monkeypatch.setattr(checkpoint, "save", save_and_stop)
    finished = False
    while not finished:
        try:
            run(disturbed, console=quiet())
            finished = True
        except Stopped:
            assert len(phases) < 40
    # A stage: train at steps 0 and 1, evaluate, begin of the next; three stages.
    assert phases == ["train", "train", "evaluate", "begin"] * 3
    assert files(tmp_path / "disturbed") == expected
    result = json.loads(next((tmp_path / "disturbed" / "runs").glob("*/result.json")).read_text())
    assert len(result["resumes"]) == 12
    assert not list((tmp_path / "disturbed" / "runs").glob("*/checkpoints"))


def stopped_at(config: RunConfig, count: int, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that was stopped right after its checkpoint number `count`."""
    save, seen = checkpoint.save, []

    def save_and_stop(root: Path, tensors: dict, documents: dict) -> Path:  # type: ignore[type-arg]
        folder = save(root, tensors, documents)
        seen.append(folder)
        if len(seen) == count:
            raise Stopped
        return folder

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", save_and_stop)
        with pytest.raises(Stopped):
            run(config, console=quiet())
    return next((Path(config.output) / "runs").iterdir())


def test_damaged_state_is_refused_by_name(toy_config: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    config = toy_config("methods=seq_ft", "training.save_strategy='no'")
    folder = stopped_at(config, 3, monkeypatch)
    row = folder / "stages" / "1.json"
    good = row.read_bytes()
    row.write_bytes(good[:-1])
    with pytest.raises(CheckpointError, match=r"stages/1.json was truncated or edited"):
        run(config, console=quiet())
    row.unlink()
    with pytest.raises(CheckpointError, match=r"stages/1.json is missing"):
        run(config, console=quiet())
    row.write_bytes(good)
    tensors = next(folder.glob("checkpoints/*/method.safetensors"))
    tensors.write_bytes(tensors.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"method.safetensors was truncated or edited"):
        run(config, console=quiet())


def test_a_damaged_or_deleted_optimizer_state_is_refused_by_name(
    toy_config: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stock checkpoints of a Trainer go on without an optimizer or random state, and say nothing."""
    config = toy_config("methods=seq_ft", "training.save_steps=1")
    folder = stopped_at(config, 3, monkeypatch)
    for name in ("training.safetensors", "training.json"):
        path = next(folder.glob(f"checkpoints/*/{name}"))
        good = path.read_bytes()
        flipped = bytearray(good)
        flipped[len(good) // 2] ^= 1
        path.write_bytes(bytes(flipped))
        with pytest.raises(CheckpointError, match=rf"{name} was truncated or edited"):
            run(config, console=quiet())
        path.unlink()
        with pytest.raises(CheckpointError, match=rf"{name} is missing"):
            run(config, console=quiet())
        path.write_bytes(good)
    run(config, console=quiet())


@pytest.mark.parametrize("method", ["dmole", "seq_ft"])
def test_checkpoints_hold_experts_and_never_the_base(
    method: str, toy_config: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = toy_config(f"methods={method}", "training.save_steps=1")
    folder = stopped_at(config, 6, monkeypatch)  # inside the second stage
    (path,) = folder.glob("checkpoints/*")
    loaded = checkpoint.load(path)
    tensors = {f"{file}/{name}": value for file, held in loaded.tensors.items() for name, value in held.items()}
    experts = [name for name in tensors if name.endswith((".lora_a", ".lora_b"))]
    assert experts and {name.partition("/")[0] for name in tensors} == {"method", "training"}
    for name in tensors:
        expert = re.search(r"\.bank\.experts\.\w+\.lora_[ab](/\w+)?$", name)
        own = name.startswith(("method/router.", "method/stage.")) or name == "training/rng"
        assert expert or own, name


def test_a_folder_of_other_settings_is_left_alone(toy_config: Configure) -> None:
    output = run(toy_config("methods=zero_shot"), console=quiet())
    other = toy_config("methods=zero_shot", "training.num_train_epochs=2", "lora.rank=2")
    with pytest.raises(ValueError, match=r"holds a run with other settings \(different: lora, training\).*--fresh"):
        run(other, console=quiet())
    run(other, console=quiet(), fresh=True)
    config = json.loads((output / "runs" / "zero_shot-seed0-default" / "config.json").read_text())
    assert config["config"]["training"]["num_train_epochs"] == 2
    # What changes no number may differ.
    saving = dataclasses.replace(other.training, save_steps=7)
    run(other.replace(training=saving, seeds=(0, 1)), console=quiet())


def test_the_shared_row_is_refused_when_damaged_and_measured_again_when_fresh(toy_config: Configure) -> None:
    config = toy_config("methods=zero_shot")
    output = run(config, console=quiet())
    (shared,) = (output / "zero_shot").iterdir()
    good = shared.read_bytes()
    shared.write_bytes(good[:-1])
    with pytest.raises(CheckpointError, match=rf"{shared.name} was truncated or edited"):
        run(config.replace(seeds=(1,)), console=quiet())
    run(config, console=quiet(), fresh=True)
    assert shared.read_bytes() == good


def test_everything_wrong_is_found_before_training(toy_config: Configure) -> None:
    cases = [
        (("budget.fraction=1.5",), r"budget: got \d+ linears, more than the \d+ candidates"),
        (("budget.fraction=0.01",), r"budget: got 0 linears, smaller than one linear per tower"),
        (("budget.fraction=1.5", "methods=seq_ft"), r"more than the \d+ candidates"),
        (("candidates=nothing",), r"candidates is 'nothing', which matches no linear of the vision tower"),
        (("orders='colours,letters'",), r"orders has 'colours,letters'; expected 'default'"),
        (("training.epochs_of={maps: 2}",), r"training.epochs_of has 'maps'; expected a task of colours"),
        (
            ("evaluation.max_new_tokens=250",),
            r"length: got \d+ tokens with 1 images and the answer; expected at most the model's 256",
        ),
        (("test_samples=1",), r"cider, which needs at least"),
        (("model=nowhere",), r"nowhere"),
    ]
    for overrides, message in cases:
        config = toy_config("methods=[seq_ft, dmole]", *overrides)
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            run(config, console=quiet())
        assert not Path(config.output).exists()


def test_bad_data_is_found_before_training(toy_config: Configure, toy_folder: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(toy_folder, copy)
    (copy / "letters" / "train1.png").unlink()
    (copy / "colours" / "test0.png").write_bytes(b"no picture")
    config = toy_config(f"stream={copy}")
    with pytest.raises(DataError, match=r"letters/train.jsonl:2: image train1.png is missing"):
        run(config, console=quiet())
    assert not Path(config.output).exists()
