# SPDX-License-Identifier: Apache-2.0
"""Rows of the matrix as files: those of one run, and row 0, which the runs of an output folder share.

    runs/<run>/stages/<row>.json     an `Evaluation`; its sha256 is in the checkpoint
    zero_shot/<key>.json             {"sha256", "evaluation"}; the key names all that decides the numbers

Row 0 is measured on the pretrained model itself, never on one that a method has prepared, so it does not depend on
which run came first.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import json
from collections.abc import Callable
from pathlib import Path

from accelerate import PartialState

import dmole
from dmole.arithmetic import arithmetic
from dmole.config import RunConfig, fingerprint
from dmole.files import JSON, file_digest, write_atomically
from dmole.methods.base import Pretrained
from dmole.methods.settings import MethodSettings
from dmole.metrics import METRICS
from dmole.models.vision_language import VisionLanguageModel
from dmole.profile import Profile
from dmole.runs.checkpoint import CheckpointError
from dmole.runs.environment import package_versions
from dmole.runs.evaluation import Evaluation, Prediction, evaluate, generation_queue
from dmole.runs.plan import RunPlan, fresh_copy
from dmole.training.acceleration import make_accelerator

SHARED_ROWS = "zero_shot"


def row_bytes(result: Evaluation) -> bytes:
    """The evaluation as JSON."""
    return json.dumps(dataclasses.asdict(result), ensure_ascii=False).encode()


def write_row(path: Path, result: Evaluation, *, writes: bool) -> str:
    """Write the evaluation, for `read_row`, in the process that `writes` files; returns the sha256 of its bytes."""
    data = row_bytes(result)
    if writes:
        write_atomically(path, data)
    return _digest(data)


def read_row(path: Path, digest: str) -> Evaluation:
    """An evaluation from its file; CheckpointError by name if its sha256 is not `digest`."""
    start_over = f"Delete {path.parent.parent} to start the run over."
    if not path.is_file():
        raise CheckpointError(f"{path} is missing. {start_over}")
    data = path.read_bytes()
    if _digest(data) != digest:
        raise CheckpointError(f"{path} was truncated or edited: its sha256 is not the checkpoint's. {start_over}")
    return _evaluation(json.loads(data))


def shared_row_file(output: Path, plan: RunPlan) -> Path:
    """The file of the row 0 that a run reads. Everything that decides a bit of it is in the name.

    Data, base model, image processor and tokenizer, settings of evaluation and threads; then the machine
    (`dmole.arithmetic`), the libraries, the source of this package and of the metrics, which may be another package's.
    """
    names = ("stream", "metrics", "base_weights", "inputs", "threads", "declaration", "dtype", "quantization")
    decides = {name: plan.identity[name] for name in names}
    decides["precision"] = {name: plan.identity["training"][name] for name in ("bf16", "fp16")}
    # Which stages are tested later does not change row 0.
    settings = plan.identity["evaluation"]
    decides["evaluation"] = {name: settings[name] for name in settings if name not in ("stages", "zero_shot")}
    metrics = {task.metric: inspect.getfile(type(METRICS[task.metric])) for task in plan.stream.tasks}
    made_with = {"arithmetic": arithmetic(), "packages": package_versions(), "source": _source_digest()}
    made_with["metrics"] = {name: file_digest(Path(file)) for name, file in metrics.items()}
    return output / SHARED_ROWS / f"{fingerprint({**decides, **made_with})}.json"


def zero_shot_row(
    plan: RunPlan, config: RunConfig, base: VisionLanguageModel, *, after_batch: Callable[[int], None]
) -> Evaluation:
    """Row 0, from its file in the output folder; measured first if there is none.

    Args:
        base: The pretrained model, with nothing attached. It is not changed.
        after_batch: Called with the number of samples after each batch, and with all of them if the file is there.

    Raises CheckpointError for a damaged file.
    """
    file = shared_row_file(Path(config.output), plan)
    everyone = PartialState()
    everyone.wait_for_everyone()
    if file.exists():
        result = read_sealed(file)
        after_batch(sum(len(task.test) for task in plan.stream.tasks))
        return result
    method = Pretrained(fresh_copy(base), MethodSettings(), seed=0)
    tasks = sorted(plan.stream.tasks, key=lambda task: task.name)
    queue = generation_queue(base, tasks, config.evaluation.per_device_eval_batch_size)
    # A profile of its own: later runs read this row from its file, so it is in no run's time.
    accelerator = make_accelerator(config.training)
    result = evaluate(method, tasks, queue, config.evaluation, accelerator, profile=Profile(), after_batch=after_batch)
    everyone.wait_for_everyone()
    if everyone.is_main_process:
        write_sealed(file, result)
    everyone.wait_for_everyone()
    return result


def write_sealed(file: Path, result: Evaluation) -> None:
    """An evaluation with its own digest, for `read_sealed`."""
    body = row_bytes(result)
    document = {"sha256": _digest(body), "evaluation": json.loads(body)}
    write_atomically(file, json.dumps(document, ensure_ascii=False).encode())


def read_sealed(file: Path) -> Evaluation:
    """What `write_sealed` wrote; CheckpointError for a damaged file."""
    try:
        stored = json.loads(file.read_bytes())
        result = _evaluation(stored["evaluation"])
        intact = stored["sha256"] == _digest(row_bytes(result))
    except (ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        raise CheckpointError(f"{file} was truncated or edited. Delete it to test again.")
    return result


def _evaluation(plain: JSON) -> Evaluation:
    predictions = tuple(
        Prediction(**{**said, "route": None if said["route"] is None else tuple(said["route"])})
        for said in plain["predictions"]
    )
    return Evaluation(
        points=plain["points"], well_formed=plain["well_formed"], cut=plain["cut"], predictions=predictions
    )


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@functools.cache
def _source_digest() -> str:
    """The sha256 over the source of this package."""
    root = Path(dmole.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()
