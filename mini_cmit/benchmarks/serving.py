# SPDX-License-Identifier: Apache-2.0
"""`python -m mini_cmit.benchmarks.serving RUN`: mixed batches beside one task at a time.

Requests of all tasks wait in random order, as many as fit into one batch. A server that can hold one adapter at a time
has to answer them task by task; `GrownModel` answers them in one batch, each by its own experts. Both ways answer the
same requests with the same model, in turns, and the order of each pair alternates. Routes are the caller's in both, so
that the router's time, which either could spend, is in neither.

    ratio = seconds task by task / seconds mixed       above 1: mixed batches are faster
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

import dmole
from benchmarks.machine import this_machine
from dmole.data.sample import Sample
from dmole.grown.model import GrownModel
from dmole.sources import open_stream

Request = tuple[str, Sample]


def answer(grown: GrownModel, requests: Sequence[Request]) -> list[str]:
    """The answers to one batch."""
    answers = grown.answer(
        images=[list(sample.images) for _, sample in requests],
        text=[sample.instruction for _, sample in requests],
        task=[task for task, _ in requests],
    )
    return [answer.text for answer in answers]


def mixed(grown: GrownModel, requests: Sequence[Request]) -> list[str]:
    return answer(grown, requests)


def task_by_task(grown: GrownModel, requests: Sequence[Request]) -> list[str]:
    """The same answers from one batch per task."""
    order = sorted(range(len(requests)), key=lambda place: requests[place][0])
    texts = [""] * len(requests)
    for _, group in itertools.groupby(order, key=lambda place: requests[place][0]):
        places = list(group)
        for place, text in zip(places, answer(grown, [requests[place] for place in places]), strict=True):
            texts[place] = text
    return texts


def compare(grown: GrownModel, requests: Sequence[Request], *, batch: int, rounds: int) -> dict[str, float]:
    """The ratio's quartiles over the rounds, and the median requests per second of each way."""
    chance = random.Random(batch)
    pairs = []
    for turn in range(rounds):
        waiting = chance.sample(list(requests), batch)
        seconds = {}
        texts = {}
        for way in (mixed, task_by_task)[:: 1 if turn % 2 else -1]:
            start = time.perf_counter()
            texts[way] = way(grown, waiting)
            seconds[way] = time.perf_counter() - start
        if turn:  # the first round loads kernels
            pairs.append((seconds[mixed], seconds[task_by_task]))
        if texts[mixed] != texts[task_by_task]:
            different = sum(a != b for a, b in zip(texts[mixed], texts[task_by_task], strict=True))
            print(f"batch of {batch}: {different} answers differ, by the last bits of another batch")
    first, ratio, third = statistics.quantiles([alone / together for together, alone in pairs], n=4)
    return {
        "ratio": round(ratio, 3),
        "ratio_p25": round(first, 3),
        "ratio_p75": round(third, 3),
        "mixed_per_second": round(batch / statistics.median(together for together, _ in pairs), 2),
        "task_by_task_per_second": round(batch / statistics.median(alone for _, alone in pairs), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="the folder of a finished run")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    grown = dmole.load(arguments.run)
    assert grown.folder is not None
    config = json.loads((grown.folder.parent / "config.json").read_bytes())["config"]
    stream = open_stream(config["stream"], Console(stderr=True))
    requests = [(task.name, sample) for task in stream.tasks for sample in task.test]
    rows = {
        str(batch): compare(grown, requests, batch=batch, rounds=arguments.rounds + 1) for batch in (4, 9, 18, 36, 72)
    }
    for batch, row in rows.items():
        print(f"batch of {batch}: {row}")
    if arguments.output is not None:
        record = {"rows": rows, "tasks": len(stream.tasks), "rounds": arguments.rounds, "machine": vars(this_machine())}
        arguments.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
