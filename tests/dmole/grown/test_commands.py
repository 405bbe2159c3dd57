# SPDX-License-Identifier: Apache-2.0
"""`dmole ask`, `export`, `forget` on the command line; `serve` in a process of its own."""

import io
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from dmole.cli import status
from dmole.data.sample import Stream

from .test_saved import stored

Runs = dict[str, Path]
Capture = pytest.CaptureFixture[str]


def test_ask_prints_the_answer_and_why(finished: Runs, toy_stream: Stream, capsys: Capture) -> None:
    task = toy_stream.tasks[0]
    sample = task.test[0]
    wanted, route = stored(finished["dmole"])[task.name, sample.id]
    assert status(["ask", str(finished["dmole"]), str(sample.images[0]), sample.instruction]) == 0
    answer, why = capsys.readouterr().out.splitlines()
    assert answer.startswith(wanted) and route is not None
    assert why.startswith(f"route: {' + '.join(route)} (error of threshold: ")
    assert status(["ask", str(finished["dmole"]), "--task", "letters", sample.instruction]) == 0
    assert capsys.readouterr().out.splitlines()[1] == "route: letters"


def test_one_question_of_each_task_and_the_line_that_asks_again(
    finished: Runs, toy_stream: Stream, capsys: Capture
) -> None:
    for method in ("dmole", "seq_ft", "finetune"):
        assert status(["ask", str(finished[method]), "--each-task"]) == 0
        out = capsys.readouterr().out
        wanted = stored(finished[method])
        for task in toy_stream.tasks:
            answer = r"answer: (.*?)(?:  \[cut\])?    reference: "
            shown = re.search(rf"^{task.name}: .*\n  {answer}{task.test[0].answers[0]}$", out, re.MULTILINE)
            assert shown is not None and shown[1] == wanted[task.name, task.test[0].id][0]
        again = shlex.split(out.splitlines()[-1].removeprefix("ask again: dmole "))
        assert status(again) == 0
        assert capsys.readouterr().out.splitlines()[0].startswith(wanted["colours", toy_stream.tasks[0].test[0].id][0])


def test_export_and_forget(finished: Runs, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Path(shutil.copytree(finished["dmole"], tmp_path / "run"))
    assert status(["export", str(run), "--task", "colours", "--pair", "letters", "--to", str(tmp_path / "lora")]) == 0
    assert "PeftModel.from_pretrained" in capsys.readouterr().out
    assert (tmp_path / "lora" / "adapter_config.json").is_file()
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert status(["forget", str(run), "--task", "colours"]) != 0  # nobody has confirmed
    assert "forgetting colours:" in capsys.readouterr().out
    assert (run / "model" / "experts" / "t01_colours").is_dir()
    assert status(["forget", str(run), "--task", "colours", "--yes"]) == 0
    assert not (run / "model" / "experts" / "t01_colours").exists()


def test_serve_answers_until_it_is_stopped(finished: Runs) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen([sys.executable, "-m", "dmole", "serve", str(finished["dmole"]), "--port", str(port)])
    try:
        for _ in range(1000):
            assert server.poll() is None
            try:
                models = httpx.get(f"http://127.0.0.1:{port}/v1/models").json()
                break
            except httpx.TransportError:
                time.sleep(0.2)
        assert [model["id"] for model in models["data"]] == ["grown", "colours", "letters", "captions"]
    finally:
        server.terminate()
        server.wait(30)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ask", "RUN"], "TEXT, --each-task: got neither; expected a question, or --each-task"),
        (["ask", "RUN", "--each-task", "why?"], "TEXT, --each-task: got both"),
        (["ask", "RUN", "nothing.png", "why?"], "image nothing.png"),
        (["ask", "nowhere", "why?"], "has no model/dmole.json; expected the folder of a finished run"),
        (["export", "RUN", "--task", "maps", "--to", "x"], "task: got 'maps'; expected one of colours"),
        (["forget", "RUN", "--task", "maps", "--yes"], "task: got 'maps'; expected one with an expert of its own"),
    ],
)
def test_errors_are_one_line(arguments: list[str], message: str, finished: Runs, capsys: Capture) -> None:
    given = [str(finished["dmole"]) if word == "RUN" else word for word in arguments]
    assert status(given) == 2
    assert message in capsys.readouterr().err
