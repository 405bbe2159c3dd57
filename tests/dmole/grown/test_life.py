# SPDX-License-Identifier: Apache-2.0
"""The whole life of a skill: train three tasks, load, ask, extend by a fourth, export two, serve, forget, load, verify.

On folders of two families with tasks of one image, two images and none, and on the mini model.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image

import dmole
from dmole.cli import status
from dmole.data.collate import collate
from dmole.data.reading import read_stream
from dmole.grown.serving import create_app
from dmole.sources import open_base

from ..models.folders import write_folder
from ..test_persons_day import SETTINGS, write_stream

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
Place = Callable[[Path], str]


def folder_of(family: str) -> Place:
    return lambda root: str(write_folder(family, root / "model"))


def write_fourth_task(root: Path) -> Path:
    """A stream of one more task, with one image a sample."""
    (root / "shade").mkdir(parents=True)
    task = "{name: shade, metric: exact_match, directory: shade}"
    (root / "stream.yaml").write_text(f"name: more\ntasks:\n  - {task}\n")
    for split, count in (("train", 6), ("test", 3)):
        rows = []
        for number in range(count):
            name = f"{split}{number}.png"
            Image.new("RGB", (40, 40), ["blue", "white"][number % 2]).save(root / "shade" / name)
            rows.append(
                {
                    "id": f"shade-{split}-{number}",
                    "image": name,
                    "instruction": "Say it. " + "now " * (number % 3),
                    "answers": [["blue", "white"][number % 2]],
                }
            )
        (root / "shade" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.mark.parametrize("model", ["llava", "gemma3", "mini"])
def test_a_skill_lives(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = "mini" if model == "mini" else folder_of(model)(tmp_path)
    stream = write_stream(tmp_path / "stream")
    changes = [part for setting in (*SETTINGS, "training.learning_rate=0.01") for part in ("--set", setting)]

    def dmole_command(*words: object) -> str:
        code = status([str(word) for word in words])
        said = capsys.readouterr()
        assert code == 0, said.err
        return said.out

    out = tmp_path / "out"
    dmole_command("run", stream, "--model", place, "--method", "dmole", "--output", out, *changes)
    run = out / "runs" / "dmole-seed0-default"
    samples = {task.name: task.test[0] for task in read_stream(stream).tasks}
    said = dmole_command("ask", run, *samples["same"].images, samples["same"].instruction)
    assert "route: " in said

    more = tmp_path / "more"
    dmole_command("extend", run, "--task", write_fourth_task(tmp_path / "shade"), "--output", more)
    grown_run = more / "runs" / "dmole-seed0-default"
    before, after = dmole.load(run), dmole.load(grown_run)
    assert (before.tasks, after.tasks) == (("colour", "same", "capital"), ("colour", "same", "capital", "shade"))
    for expert in before.experts:
        name = f"experts/{expert.name}/adapter_model.safetensors"
        assert (run / "model" / name).read_bytes() == (grown_run / "model" / name).read_bytes()

    for task in ("colour", "shade"):
        dmole_command("export", grown_run, "--task", task, "--to", tmp_path / f"lora-{task}")
        batch = collate(after.vlm, [samples["colour"]] * 2, with_answers=False)
        inputs = after.vlm.on_device(batch.encoded.inputs)
        base = open_base(place, declaration=after.vlm.declaration).model
        stock = peft.PeftModel.from_pretrained(base, tmp_path / f"lora-{task}").eval()
        with torch.no_grad():
            wanted = stock(**inputs).logits
            with after.method.task_gates(batch, [(task,)] * 2):
                torch.testing.assert_close(after.vlm.model(**inputs).logits, wanted, rtol=1e-3, atol=1e-3)

    with TestClient(create_app(after)) as client:
        body = {"messages": [{"role": "user", "content": samples["capital"].instruction}]}
        reply = client.post("/v1/chat/completions", json=body).json()
        wanted_answer = after.answer(text=samples["capital"].instruction)
        assert reply["choices"][0]["message"]["content"] == wanted_answer.text
        assert reply["dmole"]["route"] == list(wanted_answer.route.tasks)

    kept = shutil.copytree(more, tmp_path / "kept")
    dmole_command("forget", grown_run, "--task", "colour", "--yes")
    assert dmole.load(grown_run).tasks == ("same", "capital", "shade")
    assert "all as stored" in dmole_command("verify", out)
    assert "all as stored" in dmole_command("verify", kept)
