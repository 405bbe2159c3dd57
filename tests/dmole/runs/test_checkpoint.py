# SPDX-License-Identifier: Apache-2.0
"""A checkpoint comes back as it was, or is refused by the name of the file that is wrong."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dmole.models.identity import tensors_digest
from dmole.runs import checkpoint
from dmole.runs.checkpoint import CheckpointError
from mini_cmit.model.tiny import build_tiny_model


def saved(root: Path) -> Path:
    tensors = {"method": {"a": torch.arange(6.0).reshape(2, 3).T, "n": torch.tensor(3)}, "empty": {}}
    return checkpoint.save(root, tensors, {"position": {"stage": 2, "losses": [0.1, 1 / 3]}})


def test_round_trip(tmp_path: Path) -> None:
    folder = saved(tmp_path / "c")
    assert checkpoint.latest(tmp_path / "c") == folder
    loaded = checkpoint.load(folder)
    assert torch.equal(loaded.tensors["method"]["a"], torch.arange(6.0).reshape(2, 3).T)
    assert loaded.tensors["method"]["n"].item() == 3
    assert loaded.tensors["empty"] == {}
    assert loaded.documents == {"position": {"stage": 2, "losses": [0.1, 1 / 3]}}
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}


def test_only_the_newest_is_kept_and_leftovers_go(tmp_path: Path) -> None:
    root = tmp_path / "c"
    assert checkpoint.latest(root) is None
    first = saved(root)
    (root / "000002.partial").mkdir()
    (root / "000002.partial" / "half").write_text("")
    assert checkpoint.latest(root) == first
    second = saved(root)
    assert [path.name for path in root.iterdir()] == [second.name] == ["000002"]
    # Killed between the rename and the deletion of the old one: the newest number counts.
    (root / "000001").mkdir()
    assert checkpoint.latest(root) == second


def test_names_that_no_save_gives_are_left_alone(tmp_path: Path) -> None:
    root = tmp_path / "c"
    folder = saved(root)
    for name in ("notes", "7", "000007.bak", "\u0661\u0662\u0663\u0664\u0665\u0666", "\u00b2"):
        (root / name).mkdir()
    (root / "000009").write_text("a file")
    assert checkpoint.latest(root) == folder
    assert saved(root).name == "000002"
    assert len(list(root.iterdir())) == 7


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(bytes(data))


def edit_manifest(path: Path) -> None:
    manifest = json.loads(path.read_text())
    manifest["files"]["position.json"] = "0" * 64
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("method.safetensors", truncate, "was truncated or edited: its sha256 is not the manifest's"),
        ("method.safetensors", flip, "was truncated or edited"),
        ("position.json", truncate, "was truncated or edited"),
        ("position.json", flip, "was truncated or edited"),
        ("position.json", Path.unlink, "is missing"),
        ("manifest.json", truncate, "is not JSON: it was truncated or edited"),
        ("manifest.json", edit_manifest, "was edited: its own sha256 does not match"),
        ("manifest.json", Path.unlink, "is missing"),
        ("manifest.json", lambda path: path.write_text("[]"), "is not a manifest"),
        ("extra.json", lambda path: path.write_text("{}"), "is not in the manifest"),
    ],
)
def test_damage_is_refused_by_name(tmp_path: Path, name: str, damage: Callable[[Path], None], message: str) -> None:
    folder = saved(tmp_path)
    damage(folder / name)
    with pytest.raises(CheckpointError, match=rf"{name} {message}.*delete .* to start over"):
        checkpoint.load(folder)


def test_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "VERSION", 2)
    folder = saved(tmp_path)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"manifest.json has version 2; this program reads version 1"):
        checkpoint.load(folder)


def test_the_digest_of_the_tensors_sees_every_weight() -> None:
    model = build_tiny_model(0).model
    before = tensors_digest(model)
    assert before == tensors_digest(build_tiny_model(0).model)
    assert before != tensors_digest(build_tiny_model(1).model)
    with torch.no_grad():
        model.model.multi_modal_projector.linear_1.weight[0, 0] += 1e-3
    assert before != tensors_digest(model)


KILLED_IN_A_SAVE = """
import importlib.util, itertools, os, shutil, sys
from pathlib import Path
import torch
from dmole.runs import checkpoint

spec = importlib.util.spec_from_file_location("kill_resume", sys.argv[1])
kill_resume = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kill_resume)
root = Path(sys.argv[2])

def save(value):
    checkpoint.save(root, {"method": {"w": torch.full((3,), float(value))}}, {"position": {"n": value}})

for number in itertools.count(1):
    shutil.rmtree(root, ignore_errors=True)
    save(0)
    child = os.fork()
    if child == 0:
        kill_resume.kill_at(root, number)
        save(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    found = checkpoint.load(checkpoint.latest(root))
    assert found.tensors["method"]["w"].tolist() == [float(found.documents["position"]["n"])] * 3
    print(found.documents["position"]["n"], end="", flush=True)
    save(2)
    assert [path.name for path in root.iterdir()] == [checkpoint.latest(root).name]
    if status == 0:
        break
"""


@pytest.mark.slow
def test_a_kill_at_any_file_operation_of_a_save_leaves_the_old_or_the_new_checkpoint(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(
        [sys.executable, "-c", KILLED_IN_A_SAVE, str(root / "scripts" / "kill_resume.py"), str(tmp_path / "c")],
        capture_output=True, text=True, cwd=root, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"0{8,}1{3,}", done.stdout), done.stdout
