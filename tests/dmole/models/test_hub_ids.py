# SPDX-License-Identifier: Apache-2.0
"""`model: owner/name` from a local cache of the hub: its identity is the commit; an unknown name is an error."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dmole.models.identity import base_identity
from dmole.models.loading import load

ROOT = Path(__file__).resolve().parents[3]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
# A process of its own: huggingface_hub reads its settings when it is imported.
SCRIPT = """
import json
from dmole.config import RunConfig
from dmole.config_error import ConfigError
from dmole.sources import open_model
found = {}
for name in ("somebody/tiny-llava", "somebody/unknown"):
    try:
        model = open_model(RunConfig(model=name))
        found[name] = {"identity": model.base_identity(), "headers": model.base_identity(full=False)["kind"]}
    except ConfigError as error:
        found[name] = {"error": str(error)}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(folder_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    home = tmp_path_factory.mktemp("hub")
    repository = home / "hub" / "models--somebody--tiny-llava"
    shutil.copytree(folder_of("llava"), repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    environment |= {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def test_a_hub_id_is_read_from_the_cache_and_named_by_its_commit(
    found: dict[str, Any], folder_of: Callable[[str], Path]
) -> None:
    identity = found["somebody/tiny-llava"]["identity"]
    assert identity["source"] == "somebody/tiny-llava" and identity["commit"] == COMMIT
    assert found["somebody/tiny-llava"]["headers"] == "headers"
    folder = folder_of("llava")
    same = base_identity(load(folder).model, str(folder))
    assert identity["sha256"] == same["sha256"] and same["commit"] is None


def test_an_unknown_hub_id_is_an_error_by_name(found: dict[str, Any]) -> None:
    error = found["somebody/unknown"]["error"]
    assert error.startswith("model: 'somebody/unknown' cannot be read (")
    assert error.endswith("expected a folder of save_pretrained or a hub id. Check the name and the connection.")
