# SPDX-License-Identifier: Apache-2.0
"""Tables show means and spreads over seeds, and nothing where a protocol defines nothing."""

import gzip
import json
from pathlib import Path

import pytest
from rich.console import Console

from dmole.reports import tables
from dmole.reports.stored import ResultsError, read_runs


def by_method(table: tables.Table) -> dict[str, dict[str, str]]:
    return {row["method"]: row for row in tables.rows_of(table)}


def test_summary(results: Path) -> None:
    rows = by_method(tables.summary_table(read_runs(results)))
    # Last of the keeper: seed 0 (100 + 75 + 100) / 3 = 91.67, seed 1 (100 + 50 + 100) / 3 = 83.33.
    assert rows["keeper"]["Last"] == "87.50 ± 5.89"
    assert rows["keeper"]["seeds"] == "2" and rows["keeper"]["routing accuracy %"] == "75.00 ± 0.00"
    assert rows["loser"]["BWT"] == "-68.75 ± 0.00" and rows["loser"]["routing accuracy %"] == "-"
    assert rows["finetune"]["AVG"] == "-" and rows["finetune"]["BWT"] == "-" and rows["finetune"]["Last"] == "91.67"


def test_last_per_task(results: Path) -> None:
    table = tables.last_table(read_runs(results))
    assert table.columns == ("task", "finetune", "keeper", "loser", "ceiling")
    assert table.rows == (
        ("boxes", "100.00", "100.00 ± 0.00", "0.00 ± 0.00", "100.00"),
        ("words", "75.00", "62.50 ± 17.68", "25.00 ± 0.00", "100.00"),
        ("letters", "100.00", "100.00 ± 0.00", "100.00 ± 0.00", "100.00"),
    )


def test_a_caption_task_shows_what_its_taught_answers_score(results: Path) -> None:
    path = results / "runs" / "keeper-seed0-default" / "references.jsonl.gz"
    rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]
    for row in rows[:4]:
        row.update(metric="cider", answers=[row["id"], f"no {row['id']}"])
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    shown = {row["task"]: row["ceiling"] for row in tables.rows_of(tables.last_table(read_runs(results)))}
    # One word against itself and against two: a quarter of 10 and a part of that. The other runs have boxes.
    assert shown["words"] == "100.00"
    ceilings = [float(points) for points in shown["boxes"].split(" / ")]
    assert len(ceilings) == 2 and 100.0 in ceilings and 125.0 < max(ceilings) < 250.0


def test_well_formed_shares_stand_in_the_same_rows(results: Path) -> None:
    path = results / "runs" / "finetune-seed0-default" / "result.json"
    result = json.loads(path.read_text())
    result["well_formed"]["2"]["words"] = 0.25
    path.write_text(json.dumps(result))
    table = tables.well_formed_table(read_runs(results))
    assert table.rows[1] == ("words", "25.0", "100.0 ± 0.0", "100.0 ± 0.0")
    assert table.rows[0] == ("boxes", "100.0", "100.0 ± 0.0", "100.0 ± 0.0")


def test_matrix(results: Path) -> None:
    table = tables.matrix_table(read_runs(results)[0])
    assert table.title == "finetune, seed 0, order default"
    assert table.rows == (
        ("0 untrained", "0.0", "25.0", "0.0"),
        ("1 boxes", "100.0", "not measured", "not measured"),
        ("2 words", "not measured", "75.0", "not measured"),
        ("3 letters", "not measured", "not measured", "100.0"),
    )


def test_cut_answers_are_counted_in_the_row_of_the_final_score(results: Path) -> None:
    assert tables.cut_table(read_runs(results)).rows == (), "these results did not record it"
    for run in read_runs(results):
        final = {"boxes": 1, "words": 2, "letters": 3} if run.method == "finetune" else dict.fromkeys(run.tasks, 3)
        counts = {str(row): dict.fromkeys(run.tasks, row) for row in range(4)}
        if run.method == "loser":
            counts["3"] = dict.fromkeys(run.tasks, 0)
        result = {**run.result, "final_rows": final, "not_measured": [], "cut_at_max_new_tokens": counts}
        (run.folder / "result.json").write_text(json.dumps(result))
    table = tables.cut_table(read_runs(results))
    assert table.columns == ("task", "finetune", "keeper", "loser")
    assert table.rows == (
        ("boxes", "1.0", "3.0 ± 0.0", "0.0 ± 0.0"),
        ("words", "2.0", "3.0 ± 0.0", "0.0 ± 0.0"),
        ("letters", "3.0", "3.0 ± 0.0", "0.0 ± 0.0"),
    )


@pytest.mark.parametrize("rows", [{"boxes": 1}, {"boxes": 1, "words": 4, "letters": 0}])
def test_final_rows_that_cannot_be_are_refused_by_name(results: Path, rows: dict[str, int]) -> None:
    path = results / "runs" / "finetune-seed0-default" / "result.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "final_rows": rows}))
    with pytest.raises(ResultsError, match=r"result.json: final_rows is .*; expected a row from 0 to 3 for each task"):
        read_runs(results)


def test_time_and_routing_and_conventions(results: Path) -> None:
    runs = read_runs(results)
    times = by_method(tables.time_table(runs))
    assert times["keeper"]["proxy % of run"] == "2.50 ± 0.00" and times["loser"]["router s"] == "0.00 ± 0.00"
    assert list(by_method(tables.routing_table(runs))) == ["keeper"]
    assert by_method(tables.routing_table(runs))["keeper"]["two experts %"] == "0.00 ± 0.00"
    conventions = tables.conventions_table(runs)
    assert conventions.columns == ("number", "keeper", "loser")
    loser = {row[0]: row[2] for row in conventions.rows}
    assert loser["GEM BWT (over N-1)"] == "-75.00 ± 0.00" and loser["CoIN BWT (over N)"] == "-50.00 ± 0.00"


def test_samples_with_two_experts_are_counted_after_the_last_stage(results: Path) -> None:
    path = results / "runs" / "keeper-seed0-default" / "predictions.jsonl.gz"
    lines = [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]
    for line in lines:
        # After the last stage 3 of 12 samples; the ones before do not count.
        if line["route"] and (line["stage"] < 3 or line["task"] == "words"):
            line["route"] = ["words", "boxes"]
    path.write_bytes(gzip.compress("".join(json.dumps(line) + "\n" for line in lines).encode()))
    (keeper, *_) = [run for run in read_runs(results) if run.folder == path.parent]
    assert tables.several_experts(keeper) == 25.0
    (loser, *_) = [run for run in read_runs(results) if run.method == "loser"]
    assert tables.several_experts(loser) is None


def test_markdown_and_terminal_show_the_same(results: Path) -> None:
    table = tables.summary_table(read_runs(results))
    markdown = table.markdown().splitlines()
    assert markdown[0].startswith("| method | AVG | Last | BWT |") and markdown[1].startswith("|---|---:|")
    assert markdown[-1] == tables.CONVENTION + "."
    console = Console(width=200, record=True, file=(Path(results) / "log").open("w"))
    console.print(table.rich())
    shown = console.export_text()
    console.file.close()
    assert all(cell in shown for row in table.rows for cell in row)


def test_cells_are_text_not_markup() -> None:
    table = tables.Table(title="[x]", columns=("a|b",), rows=(("[bold]y",),))
    assert table.markdown().splitlines()[0] == "| a\\|b |"
    console = Console(width=80)
    with console.capture() as captured:
        console.print(table.rich())
    assert "[bold]y" in captured.get() and "[x]" in captured.get()


@pytest.mark.parametrize(
    ("values", "text"), [([1.0], "1.00"), ([1.0, 3.0], "2.00 ± 1.41"), ([None], "-"), ([1.0, None], "-"), ([], "-")]
)
def test_spread(values: list[float | None], text: str) -> None:
    assert tables.spread(values) == text
