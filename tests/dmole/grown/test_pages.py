# SPDX-License-Identifier: Apache-2.0
"""The Python of the README and of docs/grown.md about what a run leaves runs as it stands."""

import re
from pathlib import Path

import pytest

from dmole.data.sample import Stream

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    ("page", "heading"), [("README.md", "## What a run leaves\n"), ("docs/grown.md", "# The model")]
)
def test_the_lines_run(
    page: str, heading: str, finished: dict[str, Path], toy_stream: Stream, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    section = text[text.index(heading) :].split("\n## Speed\n")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert blocks
    task = toy_stream.tasks[0]
    names = {
        "run": finished["dmole"],
        "photo": str(task.test[0].images[0]),
        "question": task.test[0].instruction,
        "task": task.name,
    }
    for block in blocks:
        exec(block, names)
    assert capsys.readouterr().out
