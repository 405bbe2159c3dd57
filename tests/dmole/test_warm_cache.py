# SPDX-License-Identifier: Apache-2.0
"""No number of a run depends on what the caches hold: the mini model on mini tasks, with a cache made otherwise."""

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console

from dmole.config import RunConfig, load_config
from dmole.data.images import open_image
from dmole.runs.checkpoint import CheckpointError
from dmole.runs.runner import run
from dmole_kernels import MultiLoRALinear
from mini_cmit.model.shipped import load_mini_model
from mini_cmit.tasks.build import task_rows
from mini_cmit.tasks.building import BuildContext, write_task

COMPARED = ("matrix.csv", "predictions.jsonl.gz", "references.jsonl.gz", "losses.csv")
TASKS = ("icon_captions", "number_reading", "chart_questions")
Configure = Callable[..., RunConfig]


def quiet() -> Console:
    return Console(file=io.StringIO())


def written(output: Path) -> dict[str, bytes]:
    """Every file of results and the shared row 0, under its name."""
    files = {f"{folder.name}/{name}": folder / name for folder in (output / "runs").iterdir() for name in COMPARED}
    files |= {path.name: path for path in (output / "zero_shot").iterdir()}
    return {name: path.read_bytes() for name, path in files.items()}


def held(cache: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in cache.rglob("*.feature")}


@pytest.fixture(scope="module")
def mini_stream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tasks of the mini benchmark, at its size of image."""
    root = tmp_path_factory.mktemp("stream")
    context = BuildContext(root=root, seed=0, image_side=160, train=20, validation=1, test=4)
    lines = []
    for task in TASKS:
        rows = task_rows(task, context)
        write_task(context, rows)
        lines.append(f"  - {{name: {task}, metric: {rows.metric}, directory: {task}}}")
    (root / "stream.yaml").write_text("name: three\ntasks:\n" + "\n".join(lines) + "\n")
    return root


@pytest.fixture
def configure(mini_stream: Path, tmp_path: Path) -> Configure:
    def make(output: str, *overrides: str) -> RunConfig:
        return load_config(
            overrides=(
                f"stream={mini_stream}",
                "model=mini",
                f"output={tmp_path / output}",
                "methods=[seq_ft, dmole]",
                "training={num_train_epochs: 1, per_device_train_batch_size: 10, bf16: true}",
                "evaluation={per_device_eval_batch_size: 12, max_new_tokens: 14}",
                "lora={rank: 4, dropout: 0.1}",
                "dmole={proxy_min_samples: 4, router: {epochs: 3, margin: 50.0}}",
                *overrides,
            )
        )

    return make


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    def use(name: str) -> Path:
        monkeypatch.setenv("DMOLE_CACHE", str(tmp_path / name))
        return tmp_path / name

    return use


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.slow
def test_a_cache_that_another_run_made_changes_no_byte(
    configure: Configure, cache: Callable[[str], Path], threads: Callable[[int], None]
) -> None:
    threads(1)
    empty = cache("empty")
    expected = written(run(configure("first"), console=quiet()))
    # Made by a run with another order of the tasks and other batch sizes, so with other batch mates for every image;
    # then by calls on 20 images with two threads.
    warm = cache("warm")
    other = (
        "orders=[reversed]",
        "methods=[seq_ft]",
        "training.per_device_train_batch_size=3",
        "evaluation.per_device_eval_batch_size=5",
    )
    run(configure("other", *other, "train_samples=6", "evaluation.max_new_tokens=15"), console=quiet())
    assert 0 < len(held(warm)) < len(held(empty))
    threads(2)
    model = load_mini_model()
    images = sorted(Path(configure("first").stream).rglob("t*-*.png"), reverse=True)
    for start in range(0, len(images), 20):
        opened = [open_image(image) for image in images[start : start + 20]]
        model.processor.image_processor(opened, return_tensors="pt")
    before = held(warm)
    # Threads around the run are not the run's.
    assert written(run(configure("second"), console=quiet())) == expected
    after = held(warm)
    assert after == before, "the second run read every feature from the cache"
    assert {name for name in held(empty)} == set(after)


def test_row_zero_is_measured_on_the_pretrained_model_whichever_run_is_first(
    toy_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import dmole.runs.rows

    measured: list[bool] = []
    evaluate = dmole.runs.rows.evaluate

    def spied(method, *arguments, **options):  # type: ignore[no-untyped-def]
        measured.append(any(isinstance(module, MultiLoRALinear) for module in method.vlm.model.modules()))
        return evaluate(method, *arguments, **options)

    monkeypatch.setattr(dmole.runs.rows, "evaluate", spied)
    rows = []
    for first in ("dmole", "seq_ft", "zero_shot"):
        output = run(toy_config(f"methods=[{first}]").replace(output=str(tmp_path / first)), console=quiet())
        (shared,) = (output / "zero_shot").iterdir()
        rows.append((shared.name, shared.read_bytes()))
    assert measured == [False] * 3 and len(set(rows)) == 1


def test_row_zero_of_other_threads_or_another_machine_is_another_file(
    toy_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = toy_config("methods=[zero_shot]")
    shared = run(config, console=quiet()) / "zero_shot"
    run(toy_config("methods=[zero_shot]", "threads=2", "seeds=[1]"), console=quiet())
    assert len(list(shared.iterdir())) == 2
    monkeypatch.setattr("dmole.runs.rows.arithmetic", lambda: "another CPU")
    run(config.replace(seeds=(2,)), console=quiet())
    assert len(list(shared.iterdir())) == 3


def test_a_row_zero_that_was_edited_and_is_still_json_is_refused(toy_config: Callable[..., RunConfig]) -> None:
    config = toy_config("methods=[zero_shot]")
    (shared,) = (run(config, console=quiet()) / "zero_shot").iterdir()
    stored = json.loads(shared.read_bytes())
    task = next(iter(stored["evaluation"]["points"]))
    stored["evaluation"]["points"][task] += 1.0
    shared.write_text(json.dumps(stored))
    with pytest.raises(CheckpointError, match=rf"{shared.name} was truncated or edited. Delete it to test again."):
        run(config.replace(seeds=(1,)), console=quiet())


def test_a_run_says_when_it_leaves_cores_unused(
    toy_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dmole.runs.runner.usable_cores", lambda: 8)
    screen = io.StringIO()
    run(toy_config("methods=[zero_shot]"), console=Console(file=screen, width=200))
    assert "threads=1 on 8 cores; more may be faster, and the numbers depend on it" in screen.getvalue()
