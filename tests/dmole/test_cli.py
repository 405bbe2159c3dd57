# SPDX-License-Identifier: Apache-2.0
"""The command line on real folders: what it prints, what it leaves on disk, how it fails."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from dmole.cli import FAILED, USAGE_ERROR, WRONG_INPUT, run_config, status
from dmole.recipes import RECIPES

FAST = [
    "--model", "tiny", "--set", "threads=1", "--set", "training.num_train_epochs=1",
    "--set", "training.per_device_train_batch_size=4",
    "--set", "evaluation.max_new_tokens=3", "--set", "lora.rank=4", "--set", "dmole.proxy_min_samples=4",
    "--set", "dmole.router.epochs=3",
]  # fmt: skip


def config_of(**options: object) -> object:
    given: dict[str, object] = dict.fromkeys(
        ("stream", "methods", "seeds", "orders", "model", "recipe", "config", "output")
    )
    return run_config(**{**given, "settings": [], **options})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def finished(toy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of `dmole run` with two methods on the toy stream."""
    output = tmp_path_factory.mktemp("cli") / "out"
    code = status(["run", str(toy_folder), "--method", "dmole,seq_ft", "--seed", "0", "-o", str(output), *FAST])
    assert code == 0
    return output


def copy_of(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def test_run_leaves_everything_on_disk(finished: Path) -> None:
    for method in ("dmole", "seq_ft"):
        folder = finished / "runs" / f"{method}-seed0-default"
        for name in (
            "config.json", "environment.json", "matrix.csv", "predictions.jsonl.gz", "references.jsonl.gz",
            "losses.csv", "matrix.png", "result.json",
        ):  # fmt: skip
            assert (folder / name).stat().st_size > 0, name
    rows = list(csv.DictReader((finished / "summary.csv").read_text().splitlines()))
    assert [row["method"] for row in rows] == ["dmole", "seq_ft"]
    assert all(float(row["AVG"]) >= 0 and row["BWT"] for row in rows)


def test_a_real_run_verifies_and_an_edit_does_not(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy_of(finished, tmp_path)
    assert status(["verify", str(folder)]) == 0
    assert capsys.readouterr().out.startswith("verified 2 runs, ")
    matrix = folder / "runs" / "seq_ft-seed0-default" / "matrix.csv"
    lines = matrix.read_text().splitlines()
    stage, first, *rest = lines[-1].split(",")
    lines[-1] = ",".join([stage, repr(float(first) + 25.0), *rest])
    matrix.write_text("\n".join(lines) + "\n")
    assert status(["verify", str(folder)]) == FAILED
    complaint = capsys.readouterr().err
    assert f"runs/seq_ft-seed0-default/matrix.csv: stage 3, task colours: stored {float(first) + 25.0}, " in complaint
    assert f"recomputed {float(first)}" in complaint


def test_report_shows_the_tables_again(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    markdown = tmp_path / "new" / "report.md"
    arguments = ["report", str(finished), "--compare", "dmole,seq_ft", "--matrices", "--markdown", str(markdown)]
    assert status(arguments) == 0
    shown = capsys.readouterr().out
    assert "Results" in shown and "Paired differences" in shown and "seq_ft, seed 0, order default" in shown
    text = markdown.read_text()
    assert "## Results\n\n| method | AVG | Last | BWT |" in text and "| dmole - seq_ft | default | Last | - |" in text


def test_an_existing_run_needs_resume_or_fresh(
    finished: Path, toy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy_of(finished, tmp_path)
    command = ["run", str(toy_folder), "--method", "seq_ft", "-o", str(folder), *FAST]
    assert status(command) == WRONG_INPUT
    assert (
        f"{folder} already holds seq_ft-seed0-default; expected no run of that name. Pass --resume"
        in capsys.readouterr().err
    )
    before = (folder / "runs" / "seq_ft-seed0-default" / "result.json").read_bytes()
    assert status([*command, "--resume"]) == 0
    assert "seq_ft-seed0-default: finished earlier, kept" in capsys.readouterr().out
    assert (folder / "runs" / "seq_ft-seed0-default" / "result.json").read_bytes() == before
    assert status([*command, "--fresh"]) == 0
    again = json.loads((folder / "runs" / "seq_ft-seed0-default" / "result.json").read_bytes())
    for column in ("AVG", "Last", "BWT"):
        assert again["summary"][column] == json.loads(before)["summary"][column]
    assert status(["verify", str(folder)]) == 0


def test_settings_come_from_recipe_file_options_and_set_in_that_order(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("seeds: [5]\ntraining: {num_train_epochs: 7, per_device_train_batch_size: 9}\nlora: {rank: 3}\n")
    config = config_of(
        recipe="demo",
        config=file,
        seeds=["6,7"],
        settings=["training.per_device_train_batch_size=11"],
        methods=["dmole", "joint"],
    )
    assert config.train_samples is not None  # type: ignore[attr-defined] # the recipe's
    assert config.seeds == (6, 7)  # type: ignore[attr-defined]
    assert config.training.num_train_epochs == 7  # type: ignore[attr-defined]
    assert config.training.per_device_train_batch_size == 11  # type: ignore[attr-defined]
    assert config.lora.rank == 3  # type: ignore[attr-defined]
    assert config.methods == ("dmole", "joint")  # type: ignore[attr-defined]


def test_an_order_may_list_names_with_commas() -> None:
    config = config_of(orders=["c,a,b", "reversed"], stream="some: folder # with signs")
    assert config.orders == ("c,a,b", "reversed")  # type: ignore[attr-defined]
    assert config.stream == "some: folder # with signs"  # type: ignore[attr-defined]


ERRORS: dict[str, tuple[list[str], str]] = {
    "unknown option": (["run", "--methd", "x"], "dmole run: No such option: --methd"),
    "unknown command": (["fly"], "dmole: No such command 'fly'"),
    "no subcommand": (["tasks"], "dmole tasks: Missing command."),
    "missing argument": (["verify"], "dmole verify: Missing argument 'results'"),
    "unknown method": (["run", "--method", "dmol"], "error: methods has 'dmol'; did you mean 'dmole'?"),
    "unknown recipe": (["run", "--recipe", "dmo"], "error: --recipe is 'dmo'; expected one of coin, demo, mini, paper"),
    "unknown setting": (["run", "--set", "training.epoch=3"], "error: unknown key 'training.epoch'"),
    "setting without value": (["run", "--set", "epochs"], "error: --set got 'epochs'; expected key=value"),
    "seed a word": (["run", "--seed", "0,x"], "error: --seed is 'x'; expected a whole number"),
    "empty method": (
        ["run", "--method", "dmole,,joint"],
        "error: --method is 'dmole,,joint'; expected names with commas",
    ),
    "missing configuration": (["run", "--config", "/no/such.yaml"], "error: /no/such.yaml cannot be read"),
    "resume and fresh": (["run", "--resume", "--fresh"], "error: --resume and --fresh were both given"),
    "nothing to verify": (["verify", "/no/such/folder"], "error: /no/such/folder has no finished run"),
    "nothing to report": (["report", "/no/such/folder"], "error: /no/such/folder has no finished run"),
    "no stream": (["tasks", "check", "/no/such/folder"], "stream.yaml: file is missing"),
    "no readme": (["readme", "/no/such/README.md"], "error: /no/such/README.md: No such file or directory"),
    "no model": (
        ["run", "mini", "--model", "/no/such/model", "-m", "dmole", "-o", "/no/such/output"],
        "error: model: the folder '/no/such/model' does not exist; expected one, or a hub id",
    ),
    "no stream given": (
        ["run", "--method", "dmole", "--model", "tiny"],
        "error: stream: got none; expected a folder with stream.yaml, or one of mini. Give it with dmole run STREAM, "
        "or a recipe that sets it with --recipe (registered: coin, demo, mini, paper, released_code).",
    ),
    "no model given": (
        ["run", "mini", "--method", "dmole"],
        "error: model: got none; expected a folder or hub id of a model, or one of mini, tiny. Give it with --model",
    ),
    "no method given": (
        ["run", "mini", "--model", "tiny"],
        "error: methods: got none; expected names of dmole, finetune, joint, seq_ft, zero_shot. Give it with --method",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_one_clear_line_and_exit_with_two(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, expected = ERRORS[case]
    assert status(arguments) == WRONG_INPUT
    captured = capsys.readouterr()
    assert expected.lower() in captured.err.lower() and captured.out == ""
    assert "Traceback" not in captured.err
    # A data set's findings are one line each; everything else is one line.
    assert len(captured.err.splitlines()) == (2 if case == "no stream" else 1), captured.err


def test_bad_data_is_found_before_any_training(
    toy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stream = Path(shutil.copytree(toy_folder, tmp_path / "stream"))
    (stream / "captions" / "test1.png").write_bytes((stream / "captions" / "test1.png").read_bytes()[:-20])
    lines = (stream / "colours" / "train.jsonl").read_text().splitlines()
    lines[3] = json.dumps({**json.loads(lines[3]), "answers": [3]})
    (stream / "colours" / "train.jsonl").write_text("\n".join(lines) + "\n")
    output = tmp_path / "out"
    assert status(["run", str(stream), "--method", "seq_ft", "-o", str(output), *FAST]) == WRONG_INPUT
    errors = capsys.readouterr().err
    assert errors.splitlines()[0] == f"error: 2 problems in the data set {stream}:"
    assert "colours/train.jsonl:4: answers[0] is the number 3; expected a string" in errors
    assert "captions/test.jsonl:2: image test1.png cannot be decoded" in errors
    assert not output.exists()


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("budget.fraction=1.5", "budget: got 39 linears, more than the 26 candidates"),
        ("budget.fraction=0.01", "budget: got 0 linears, smaller than one linear per tower"),
        ("dmole.budget_fraction=0.5", "unknown key 'dmole.budget_fraction': it is now called budget.fraction"),
    ],
)
def test_budgets_that_cannot_be_met_are_found_before_any_training(
    setting: str, expected: str, toy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert (
        status(["run", str(toy_folder), "--method", "dmole", "-o", str(output), *FAST, "--set", setting]) == WRONG_INPUT
    )
    assert expected in capsys.readouterr().err
    assert not (output / "runs").exists()


def test_tasks_check(toy_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status(["tasks", "check", str(toy_folder)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "colours: exact_match, 10 train, 0 validation, 4 test, ceiling 100.0",
        "letters: option_letter, 10 train, 0 validation, 4 test, ceiling 100.0",
        "captions: cider, 10 train, 0 validation, 4 test, ceiling 500.0",
        "leaks (entities, image bytes, question with images, across splits and tasks): none",
        "toy: 3 tasks, nothing wrong",
    ]


def test_tasks_check_says_which_pictures_are_not_used_as_stored(
    toy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stream = Path(shutil.copytree(toy_folder, tmp_path / "stream"))
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue", "green")]
    frames[0].save(stream / "letters" / "test1.png", save_all=True, append_images=frames[1:])
    assert status(["tasks", "check", str(stream)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3] == "note: letters/test.jsonl:2: image test1.png has 3 frames; the first one is used"


def test_readme_command(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copy_of(finished, tmp_path)
    page = folder / "README.md"
    page.write_text("<!-- results: summary . -->\n<!-- /results -->\n")
    assert status(["readme", str(page), "--check"]) == FAILED
    assert "not up to date" in capsys.readouterr().out
    assert status(["readme", str(page)]) == 0 and status(["readme", str(page), "--check"]) == 0
    assert "| dmole |" in page.read_text()


def test_doctor_lists_what_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert status(["doctor"]) in (0, FAILED)
    shown = capsys.readouterr().out
    for word in ("python", "torch", "backend", "memory", "cache folder", "mini benchmark", "mini base model"):
        assert word in shown


def test_traceback_on_request(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("DMOLE_TRACEBACK", "1")
    assert status(["verify", "/no/such/folder"]) == WRONG_INPUT
    assert "Traceback" in capsys.readouterr().err


def test_usage_errors_are_click_s() -> None:
    assert USAGE_ERROR.__name__ == "UsageError"


def test_python_dash_m(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dmole", "verify", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == WRONG_INPUT and done.stdout == ""
    assert done.stderr.startswith(f"error: {tmp_path} has no finished run") and len(done.stderr.splitlines()) == 1


def test_version_and_help_are_quick_to_ask_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert status(["--version"]) == 0 and capsys.readouterr().out.startswith("dmole ")
    assert status([]) == 0 and "Usage: dmole" in capsys.readouterr().out
    # Neither needs torch, which takes seconds to import.
    code = "import sys, dmole.cli; dmole.cli.status(['--version']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_a_missing_package_is_one_line_and_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lacking(**given: object) -> None:
        raise ModuleNotFoundError("no module named 'stem'. Run `pip install stem`.")

    monkeypatch.setattr("dmole.cli.run_config", lacking)
    assert status(["run", "mini"]) == WRONG_INPUT
    assert capsys.readouterr().err == (
        "error: no module named 'stem'. Run `pip install stem`. (`dmole doctor` lists what is missing)\n"
    )


def test_a_name_alone_chooses_no_recipe() -> None:
    named, recipe = config_of(stream="mini"), config_of(recipe="mini")
    assert (named.stream, named.model, named.methods) == ("mini", "", ())  # type: ignore[attr-defined]
    assert named.lora.rank == 8 and named.test_samples is None  # type: ignore[attr-defined]
    assert recipe.to_dict() == RECIPES["mini"]().to_dict()  # type: ignore[attr-defined]
