# SPDX-License-Identifier: Apache-2.0
"""What torchao and torch log about their builds is shown by transformers alone, and not where dmole comes first."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dmole.notices import NOTICES, leave_out_notices

ROOT = Path(__file__).resolve().parents[2]
SPAWNED = """
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

if __name__ == "__main__":
    from mini_cmit.tasks.build import task_rows
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            pool.submit(task_rows, "no_task", None).result()
        except ValueError as error:
            print(error)
"""


def stderr_of(tmp_path: Path, script: str, stdout: str = "") -> str:
    file = tmp_path / "script_of_a_user.py"
    file.write_text(script)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(file)], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.startswith(stdout)
    return done.stderr


@pytest.mark.slow
def test_no_process_that_imports_dmole_first_shows_them(tmp_path: Path) -> None:
    """A worker spawned as the data build spawns its own, and its parent. Without dmole they are shown."""
    pytest.importorskip("torchao", exc_type=ImportError)
    alone = stderr_of(tmp_path, "from transformers import ProcessorMixin")
    if "Failed to load " not in alone and "is an Enum subclass" not in alone:
        pytest.skip("this torchao and this torch have nothing to say about their builds")
    assert stderr_of(tmp_path, SPAWNED, stdout="task is 'no_task'") == ""


def test_everything_else_of_these_loggers_is_shown(caplog: pytest.LogCaptureFixture) -> None:
    leave_out_notices()
    for name, start in NOTICES.items():
        logger = logging.getLogger(name)
        filters = list(logger.filters)
        leave_out_notices()
        assert logger.filters == filters
        with caplog.at_level(logging.WARNING, logger=name):
            logger.warning(start + "and so on", *["it"] * start.count("%s"))
            logger.warning("int8 weights are wrong")
    # torch's loggers do not reach caplog's handler.
    assert [record.getMessage() for record in caplog.records] == ["int8 weights are wrong"] * len(caplog.records)
    assert caplog.records
