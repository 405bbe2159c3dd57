# SPDX-License-Identifier: Apache-2.0
"""SIGKILL at random moments: scripts/kill_resume.py on the toy stream, with a few kills."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_killed_runs_end_with_the_same_files(toy_folder: Path, tmp_path: Path) -> None:
    overrides = [
        f"stream={toy_folder}",
        "model=tiny",
        "methods=[dmole, seq_ft]",
        "threads=1",
        "checkpoint_every_steps=1",
        "training={epochs: 1, batch_size: 4}",
        "evaluation={per_device_eval_batch_size: 8, max_new_tokens: 3}",
        "lora={rank: 4, dropout: 0.2}",
        "dmole={proxy_min_samples: 4, router: {epochs: 3}}",
    ]
    command = [sys.executable, str(ROOT / "scripts" / "kill_resume.py"), "--kills", "3"]
    command += ["--output", str(tmp_path / "result.json")]
    for override in overrides:
        command += ["--set", override]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["equal"] is True
    assert result["kills"] == 3
    assert len(result["files"]) == 8
