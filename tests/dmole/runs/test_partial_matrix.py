# SPDX-License-Identifier: Apache-2.0
"""Runs that measure a part of the matrix: every file and table says which numbers were not measured, and none is 0."""

import csv
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from dmole.config import RunConfig, load_config
from dmole.config_error import ConfigError
from dmole.reports import tables
from dmole.reports.comparison import compare
from dmole.reports.stored import ResultsError, StoredRun, read_runs
from dmole.reports.verify import verify_results
from dmole.runs.runner import run

Configure = Callable[..., RunConfig]
METHODS = "methods=[dmole, seq_ft, finetune, joint]"


def configured(toy_folder: Path, output: Path, *overrides: str) -> RunConfig:
    fast = (
        f"stream={toy_folder}", "model=tiny", f"output={output}", "threads=1", METHODS, "train_samples=4",
        "training={num_train_epochs: 1, per_device_train_batch_size: 4}", "evaluation.max_new_tokens=3", "lora.rank=4",
        "dmole={proxy_min_samples: 4, router: {epochs: 3, margin: 50.0}}",
    )  # fmt: skip
    return load_config(overrides=(*fast, *overrides))


def finished(folder: Path) -> dict[str, StoredRun]:
    return {stored.method: stored for stored in read_runs(folder)}


@pytest.fixture(scope="module")
def outputs(toy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("partial")
    settings = {
        "all": ("evaluation.stages=all",),
        "diagonal": ("evaluation.stages=diagonal",),
        "last": ("evaluation={stages: last, zero_shot: false}",),
    }
    return {
        mode: run(configured(toy_folder, root / mode, *extra), console=Console(file=io.StringIO()))
        for mode, extra in settings.items()
    }


def measured(stored: StoredRun) -> list[str]:
    return ["".join("." if np.isnan(value) else "x" for value in row) for row in stored.matrix]


def test_the_cells_that_are_measured(outputs: dict[str, Path]) -> None:
    diagonal, last = finished(outputs["diagonal"]), finished(outputs["last"])
    assert measured(diagonal["seq_ft"]) == measured(diagonal["dmole"]) == ["xxx", "x..", ".x.", "..x"]
    assert measured(last["seq_ft"]) == measured(last["dmole"]) == ["...", "...", "...", "xxx"]
    assert measured(diagonal["finetune"]) == ["xxx", "x..", ".x.", "..x"]
    assert measured(last["finetune"]) == ["...", "x..", ".x.", "..x"]
    assert measured(diagonal["joint"]) == ["xxx", "...", "...", "xxx"]
    assert measured(last["joint"]) == ["...", "...", "...", "xxx"]


def test_measured_cells_are_those_of_the_whole_matrix(outputs: dict[str, Path]) -> None:
    whole = finished(outputs["all"])
    for mode in ("diagonal", "last"):
        for method, stored in finished(outputs[mode]).items():
            kept = ~np.isnan(stored.matrix)
            np.testing.assert_array_equal(stored.matrix[kept], whole[method].matrix[kept])


def test_what_is_left_out_is_listed_and_is_nothing_that_the_protocol_lacks(outputs: dict[str, Path]) -> None:
    names = finished(outputs["all"])["seq_ft"].tasks
    assert all(stored.not_measured == frozenset() for stored in finished(outputs["all"]).values())
    diagonal, last = finished(outputs["diagonal"]), finished(outputs["last"])
    off = {(row, names[i]) for row in (1, 2, 3) for i in range(3) if i != row - 1}
    assert diagonal["seq_ft"].not_measured == off
    assert diagonal["finetune"].not_measured == diagonal["joint"].not_measured == frozenset()
    zero = {(0, name) for name in names}
    assert last["finetune"].not_measured == last["joint"].not_measured == zero
    assert last["dmole"].not_measured == zero | {(row, name) for row in (1, 2) for name in names}
    assert diagonal["finetune"].final_rows == (1, 2, 3) and diagonal["seq_ft"].final_rows == (3, 3, 3)


def test_numbers_that_need_a_missing_cell_are_empty_in_the_files(outputs: dict[str, Path]) -> None:
    def row(mode: str, method: str) -> dict[str, str]:
        rows = csv.DictReader((outputs[mode] / "summary.csv").read_text().splitlines())
        return next(row for row in rows if row["method"] == method)

    whole = row("all", "seq_ft")
    assert all(whole[column] for column in ("AVG", "Last", "BWT"))
    # The mean of the diagonal is Finetune's Last, but not that of a method whose later stages were not tested.
    assert [row("diagonal", "seq_ft")[column] for column in ("AVG", "Last", "BWT")] == ["", "", ""]
    assert row("diagonal", "finetune")["Last"] == row("all", "finetune")["Last"] != ""
    assert [row("last", "seq_ft")[column] for column in ("AVG", "BWT")] == ["", ""]
    assert row("last", "seq_ft")["Last"] == whole["Last"]
    # Row 3 of a diagonal run holds the third task alone: no routing accuracy over all tasks.
    assert row("diagonal", "dmole")["routing_accuracy"] == row("diagonal", "dmole")["base_model_share"] == ""
    assert row("last", "dmole")["routing_accuracy"] == row("all", "dmole")["routing_accuracy"] != ""
    lines = (outputs["last"] / "runs" / "seq_ft-seed0-default" / "matrix.csv").read_text().splitlines()
    assert lines[1:4] == ["0,,,", "1,,,", "2,,,"]


def test_tables_say_not_measured(outputs: dict[str, Path]) -> None:
    def cells(table: tables.Table, method: str) -> dict[str, str]:
        return next(row for row in tables.rows_of(table) if row["method"] == method)

    diagonal, last = read_runs(outputs["diagonal"]), read_runs(outputs["last"])
    summary = cells(tables.summary_table(diagonal), "seq_ft")
    assert [summary[column] for column in ("AVG", "Last", "BWT")] == ["not measured"] * 3
    # What the protocol does not define is no matter of measuring.
    assert cells(tables.summary_table(diagonal), "finetune")["AVG"] == "-"
    assert cells(tables.summary_table(last), "dmole")["AVG"] == "not measured"
    assert cells(tables.summary_table(last), "dmole")["Last"] not in ("not measured", "-")
    for table in (tables.last_table(diagonal), tables.well_formed_table(diagonal)):
        shown = {name: [row[i] for row in table.rows] for i, name in enumerate(table.columns)}
        for method in ("seq_ft", "dmole"):
            # The last stage tests the task that it learned, whose final score this is.
            assert shown[method][:2] == ["not measured"] * 2 and shown[method][2] != "not measured", table.title
        assert "not measured" not in shown["finetune"] + shown["joint"]
    matrix = tables.matrix_table(finished(outputs["last"])["seq_ft"])
    assert matrix.rows[0][1:] == matrix.rows[2][1:] == ("not measured",) * 3
    assert tables.conventions_table(diagonal).rows == () and tables.conventions_table(last).rows == ()
    assert tables.routing_table(diagonal).rows == ()
    assert [row[0] for row in tables.routing_table(last).rows] == ["dmole"]


def test_one_run_without_the_number_leaves_no_mean_over_the_others(outputs: dict[str, Path]) -> None:
    mixed = [finished(outputs["all"])["seq_ft"], finished(outputs["diagonal"])["seq_ft"]]
    assert tables.rows_of(tables.summary_table(mixed))[0]["Last"] == "not measured"


def test_without_row_zero_every_number_but_forward_transfer_is_there(toy_folder: Path, tmp_path: Path) -> None:
    config = configured(toy_folder, tmp_path / "out", "evaluation.zero_shot=false", "methods=seq_ft")
    (stored,) = read_runs(run(config, console=Console(file=io.StringIO())))
    assert measured(stored) == ["...", "xxx", "xxx", "xxx"]
    assert not (tmp_path / "out" / "zero_shot").exists()
    assert all(stored.summary[column] is not None for column in ("AVG", "Last", "BWT"))
    names = [row[0] for row in tables.conventions_table([stored]).rows]
    assert "CoIN MAA" in names and "FWT" not in names
    assert verify_results(tmp_path / "out").ok


def test_comparisons_have_the_statistics_that_both_runs_have(outputs: dict[str, Path]) -> None:
    whole = {c.statistic: c for c in compare(read_runs(outputs["all"]), "dmole", "seq_ft")}
    assert set(whole) == {"AVG", "Last", "BWT"}
    (only,) = compare(read_runs(outputs["last"]), "dmole", "seq_ft")
    assert only == whole["Last"]
    with pytest.raises(ResultsError, match="no common seed and order with complete last rows.*evaluation.stages all"):
        compare(read_runs(outputs["diagonal"]), "dmole", "seq_ft")


def test_the_picture_is_grey_where_nothing_was_measured(outputs: dict[str, Path]) -> None:
    def grey(mode: str) -> int:
        with Image.open(outputs[mode] / "runs" / "seq_ft-seed0-default" / "matrix.png") as picture:
            pixels = np.asarray(picture.convert("RGB"))
        return int((pixels == round(0.85 * 255)).all(axis=2).sum())

    # Six of twelve cells, nine of twelve, and none.
    assert grey("last") > 1.3 * grey("diagonal") > 10_000
    assert grey("all") < 500


@pytest.mark.parametrize("mode", ["all", "diagonal", "last"])
def test_verify_accepts_a_part_and_finds_an_edit(mode: str, outputs: dict[str, Path]) -> None:
    checked = str(verify_results(outputs[mode]))
    # Four runs: 2 x 6 cells beside the diagonal; 4 x 3 of row 0 and 2 x 6 of the rows before the last.
    count = {"all": "", "diagonal": ", 12 cells not measured", "last": ", 24 cells not measured"}[mode]
    assert checked.startswith("verified 4 runs, ") and checked.endswith(f" aggregates{count}: all as stored")
    path = outputs[mode] / "runs" / "seq_ft-seed0-default" / "result.json"
    good = path.read_bytes()
    try:
        result = json.loads(good)
        result["cut_at_max_new_tokens"]["3"][sorted(result["final_rows"])[0]] = 77
        result["final_rows"] = dict.fromkeys(result["final_rows"], 2)
        result["not_measured"] = [[3, stored] for stored in result["final_rows"]]
        path.write_text(json.dumps(result))
        found = "\n".join(map(str, verify_results(outputs[mode]).differences))
    finally:
        path.write_bytes(good)
    assert "not_measured, stage 3" in found
    assert "cut_at_max_new_tokens.3" in found
    if mode == "last":
        assert re.search(r"summary\.Last: stored [\d.]+, recomputed not measured", found)


def test_a_number_where_nothing_was_measured_is_found(outputs: dict[str, Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(outputs["last"], tmp_path / "copy"))
    path = copy / "runs" / "seq_ft-seed0-default" / "matrix.csv"
    path.write_text(path.read_text().replace("1,,,\n", "1,0.0,,\n"))
    found = [str(difference) for difference in verify_results(copy).differences]
    assert any(text.endswith("stage 1, task colours: stored 0.0, recomputed not measured") for text in found)


def test_settings_that_cannot_be(toy_config: Configure) -> None:
    cases = [
        (("methods=[seq_ft, zero_shot]", "evaluation.zero_shot=false"), "expected True for the method zero_shot"),
        (
            ("evaluation.max_new_tokens=2",),
            r"max_new_tokens: got 2 for an answer of 3 tokens with its end of turn; expected at least 3",
        ),
    ]
    for overrides, message in cases:
        with pytest.raises(ConfigError, match=message):
            run(toy_config(*overrides), console=Console(file=io.StringIO()))


def test_the_shared_row_is_the_same_whatever_the_stages(toy_folder: Path, tmp_path: Path) -> None:
    for mode, seed in (("all", 0), ("diagonal", 1)):
        extra = (f"evaluation.stages={mode}", f"seeds={seed}", "methods=seq_ft")
        run(configured(toy_folder, tmp_path / "out", *extra), console=Console(file=io.StringIO()))
    assert len(list((tmp_path / "out" / "zero_shot").iterdir())) == 1
