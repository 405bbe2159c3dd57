# SPDX-License-Identifier: Apache-2.0
"""Tables in Markdown files come from results; the repository's own files are up to date."""

from pathlib import Path

import pytest

from dmole.reports.readme import filled, stale, update
from dmole.reports.stored import ResultsError, read_predictions, read_runs

ROOT = Path(__file__).resolve().parents[3]


def page(results: Path, *markers: str) -> Path:
    path = results.parent / "README.md"
    blocks = [f"<!-- results: {marker} -->\nold\n<!-- /results -->" for marker in markers]
    path.write_text("# Title\n\n" + "\n\ntext\n\n".join(blocks) + "\n\nend\n")
    return path


def test_tables_are_made_between_the_markers(results: Path) -> None:
    path = page(results, "summary results", "comparison results keeper loser", "last results")
    assert stale(path)
    assert update(path) and not stale(path) and not update(path)
    text = path.read_text()
    assert text.startswith("# Title\n\n<!-- results: summary results -->\n\n| method | AVG |")
    assert "| keeper | 65.28 ± 1.96 | 87.50 ± 5.89 |" in text
    assert "| keeper - loser | default | Last |" in text and "old" not in text and text.endswith("\n\nend\n")


def test_an_edited_table_is_stale(results: Path) -> None:
    path = page(results, "summary results")
    update(path)
    path.write_text(path.read_text().replace("87.50", "88.50"))
    assert stale(path)


def test_errors_name_the_file_and_the_marker(results: Path) -> None:
    path = page(results, "sumary results")
    with pytest.raises(ResultsError, match=r"README.md: marker has 'sumary results'; expected one of summary, last"):
        filled(path)
    path = page(results, "summary nowhere")
    with pytest.raises(ResultsError, match=r"README.md: .*nowhere has no finished run"):
        filled(path)
    path.write_text("<!-- results: summary results -->\n")
    with pytest.raises(ResultsError, match="README.md: a marker has no partner"):
        filled(path)


def test_a_csv_file_is_shown_as_it_is(results: Path) -> None:
    (results / "measured.csv").write_text("task,points,note\nmaps,61.0,a|b\n")
    path = page(results, "csv results/measured.csv", "csv results/measured.csv note task")
    assert update(path)
    assert "| task | points | note |\n|---|---:|---:|\n| maps | 61.0 | a\\|b |\n" in path.read_text()
    assert "| note | task |\n|---|---:|\n| a\\|b | maps |\n" in path.read_text()
    with pytest.raises(ResultsError, match=r"measured.csv: got no column score; expected some of task, points, note"):
        filled(page(results, "csv results/measured.csv score"))
    with pytest.raises(ResultsError, match=r"README.md: .*none.csv: cannot be read"):
        filled(page(results, "csv results/none.csv"))


def marked_files() -> list[Path]:
    folders = ("docs", "dmole", "mini_cmit")
    found = [*ROOT.glob("*.md"), *(path for folder in folders for path in (ROOT / folder).rglob("*.md"))]
    return sorted(path for path in found if "<!-- results:" in path.read_text(encoding="utf-8"))


def test_the_repository_s_own_tables_are_up_to_date() -> None:
    assert [path.name for path in marked_files() if stale(path)] == []


def test_the_shares_of_second_experts_in_the_text_are_those_of_the_stored_routes() -> None:
    total = two = newer = 0
    for run in read_runs(ROOT / "results" / "mini"):
        for prediction in read_predictions(run.folder):
            if prediction.route is None or prediction.stage != len(run.tasks):
                continue
            total += 1
            two += len(prediction.route) == 2
            places = [run.tasks.index(task) for task in prediction.route]
            newer += prediction.route[:1] == (prediction.task,) and places[1:] > places[:1]
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert total == 2700
    assert f"After the last stage {100 * two / total:.0f} % of the test samples get two experts" in text
    assert f"for {100 * newer / total:.0f} % of all samples the second one is newer than their own" in text
