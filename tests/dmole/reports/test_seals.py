# SPDX-License-Identifier: Apache-2.0
"""`verify` on runs of the program itself: every leaf of every document, every file, and damage of any kind."""

import copy
import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dmole.config import load_config
from dmole.reports import verify as verification
from dmole.reports.differences import Verification
from dmole.reports.seals import SEALED, verify_seals
from dmole.reports.stored import read_run
from dmole.reports.verify import verify_results
from dmole.runs.runner import run

RUN = "runs/dmole-seed0-default"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, toy_folder: Path) -> Path:
    overrides = [
        f"stream={toy_folder}",
        "model=tiny",
        f"output={tmp_path_factory.mktemp('sealed') / 'out'}",
        "threads=1",
        "methods=[dmole, zero_shot]",
        "training={num_train_epochs: 1, per_device_train_batch_size: 4}",
        "evaluation={per_device_eval_batch_size: 8, max_new_tokens: 3}",
        "lora.rank=4",
        "dmole={proxy_min_samples: 4, router: {epochs: 3}}",
    ]
    return run(load_config(overrides=overrides), console=Console(file=io.StringIO()))


@pytest.fixture
def results(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "out", ignore=shutil.ignore_patterns(".locks"))


def test_a_finished_folder_verifies(finished: Path) -> None:
    report = verify_results(finished)
    assert report.ok and report.runs == 2, str(report)
    result = json.loads((finished / RUN / "result.json").read_text())
    assert set(result["files"]) == set(SEALED) and len(result["model"]) == 64
    assert set(result["made_with"]) == {"version", "commit", "kernels"}


def leaves(document: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in items:
        if isinstance(value, dict | list) and value:
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key)


def edited(document: Any, path: tuple[Any, ...]) -> Any:
    changed = copy.deepcopy(document)
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    value = inner[path[-1]]
    inner[path[-1]] = value + 1 if type(value) in (int, float) else not value if isinstance(value, bool) else "other"
    return changed


@pytest.mark.parametrize("name", ["config.json", "environment.json", "result.json"])
def test_every_edited_leaf_is_seen(results: Path, name: str) -> None:
    path = results / RUN / name
    document = json.loads(path.read_text())
    found = list(leaves(document))
    assert len(found) > 20
    for leaf in found:
        path.write_text(json.dumps(edited(document, leaf), indent=1))
        report = Verification()
        try:
            verify_seals(read_run(results / RUN), f"{RUN}/result.json", report)
        except verification.MALFORMED:
            report = verify_results(results)
        assert not report.ok, leaf
    path.write_text(json.dumps(document, indent=1) + "\n")
    assert verify_results(results).ok


@pytest.mark.parametrize("method", ["dmole", "zero_shot"])
def test_a_readable_setting_that_decides_numbers_is_compared_with_the_identity(results: Path, method: str) -> None:
    """Also without seals, as in results of before."""
    folder = results / "runs" / f"{method}-seed0-default"
    result = json.loads((folder / "result.json").read_text())
    for key in ("files", "sha256", "made_with", "model", "fingerprint"):
        del result[key]
    (folder / "result.json").write_text(json.dumps(result))
    assert verify_results(results).ok
    config = json.loads((folder / "config.json").read_text())
    config["config"]["training"]["learning_rate"] = 0.5
    (folder / "config.json").write_text(json.dumps(config))
    assert "config.json: config.training.learning_rate: stored 0.5, recomputed" in str(verify_results(results))


def files(results: Path) -> list[str]:
    found = sorted(path for path in (results / RUN).rglob("*") if path.is_file() and path.suffix != ".png")
    return [path.relative_to(results).as_posix() for path in found] + ["summary.csv", "profile.csv"]


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(bytes(data))


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "cut": cut,
    "a bit": flip,
    "empty": lambda path: path.write_bytes(b""),
    "binary": lambda path: path.write_bytes(bytes(range(256))),
    "a list": lambda path: path.write_text("[1]"),
    "an object": lambda path: path.write_text('{"summary": {"method": 1, "seed": [], "order": null}, "files": {}}'),
    "deep": lambda path: path.write_text("[" * 10**5),
    "long": lambda path: path.write_text("9" * 5000),
    "missing": Path.unlink,
    "a folder": as_folder,
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_of_any_file_is_a_difference_and_the_other_run_is_verified(results: Path, kind: str) -> None:
    whole = verify_results(results)
    for name in files(results):
        path = results / name
        kept = path.read_bytes()
        DAMAGE[kind](path)
        report = verify_results(results)
        assert not report.ok, name
        assert report.scores >= 3 and whole.scores == 15, name  # row 0 of zero_shot at the least
        path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
        path.write_bytes(kept)
    assert verify_results(results).ok


def test_values_of_another_type_are_differences(results: Path) -> None:
    """Every leaf and every container of result.json with a value of each type: no traceback, and always seen."""
    path = results / RUN / "result.json"
    document = json.loads(path.read_text())
    keys = [(key,) for key in document] + [("summary", key) for key in document["summary"]]
    keys += [("profile", key) for key in document["profile"]]
    for key in keys:
        for value in (None, True, "text", 1e308, [], [[]], {}, {"x": []}):
            changed = copy.deepcopy(document)
            inner = changed[key[0]] if len(key) == 2 else changed
            if inner[key[-1]] == value:
                continue
            inner[key[-1]] = value
            path.write_text(json.dumps(changed))
            report = Verification()
            try:
                run_read = read_run(results / RUN)
                verification._verify_run(results, run_read, report)
                verification._verify_summary(results, [run_read], report)
                verification._verify_profile(results, [run_read], report)
            except verification.MALFORMED:
                report = verify_results(results)
            assert not report.ok, (key, value)
        assert verify_results(results).runs == 2


def test_the_saved_model_is_looked_at(results: Path) -> None:
    folder = results / RUN / "model"
    document = json.loads((folder / "dmole.json").read_text())
    other = results / "runs" / "zero_shot-seed0-default" / "model"
    kept = results / "kept"
    folder.rename(kept)
    report = verify_results(results)
    assert report.ok and "1 runs without their model" in str(report)
    shutil.copytree(other, folder)
    assert f"{RUN}/model/dmole.json: sha256: stored" in str(verify_results(results))
    shutil.rmtree(folder)
    kept.rename(folder)
    (folder / "extra").write_text("")
    assert "is not in dmole.json" in str(verify_results(results))
    (folder / "extra").unlink()
    assert document["origin"] is None and verify_results(results).ok


def test_a_model_that_forgot_a_task_still_belongs_to_its_run(results: Path) -> None:
    from dmole.grown.forget import forget

    forget(results / RUN, "letters")
    report = verify_results(results)
    assert report.ok, str(report)
    path = results / RUN / "result.json"
    assert json.loads((results / RUN / "model" / "dmole.json").read_text())["origin"] in path.read_text()
