# SPDX-License-Identifier: Apache-2.0
"""SIGKILL at random moments: scripts/kill_resume.py on the toy stream, with a few kills."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


TRAINING = {
    "plain": "num_train_epochs: 1, per_device_train_batch_size: 4",
    "everything": (
        "num_train_epochs: 2, per_device_train_batch_size: 1, gradient_accumulation_steps: 4, bf16: true, "
        "activation_checkpointing: true, eval_strategy: steps, eval_steps: 2, load_best_model_at_end: true, "
        "early_stopping_patience: 2"
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(TRAINING))
def test_killed_runs_end_with_the_same_files(kind: str, validated_folder: Path, tmp_path: Path) -> None:
    overrides = [
        f"stream={validated_folder}",
        "model=tiny",
        "methods=[dmole, seq_ft]",
        "threads=1",
        f"training={{{TRAINING[kind]}, save_steps: 1}}",
        "evaluation={per_device_eval_batch_size: 8, max_new_tokens: 3}",
        "lora={rank: 4, dropout: 0.2}",
        "dmole={proxy_min_samples: 4, router: {epochs: 3}}",
    ]
    command = [sys.executable, str(ROOT / "scripts" / "kill_resume.py"), "--kills", "1", "--inside-writes", "2"]
    command += ["--output", str(tmp_path / "result.json")]
    for override in overrides:
        command += ["--set", override]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["equal"] is True
    assert result["kills"] == 3
    assert sum("at_file_operation" in moment for moment in result["moments"]) == 2
    assert len(result["files"]) == 8
