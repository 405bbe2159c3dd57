# SPDX-License-Identifier: Apache-2.0
"""Finished runs of every method over the toy stream, trained long enough that answers differ."""

from pathlib import Path

import pytest

from dmole.config import load_config
from dmole.methods import method_names
from dmole.runs.runner import run


@pytest.fixture(scope="session")
def finished(toy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """{method: the folder of its run}."""
    output = tmp_path_factory.mktemp("finished") / "out"
    run(
        load_config(
            overrides=(
                f"stream={toy_folder}", "model=tiny", f"output={output}", f"methods=[{', '.join(method_names())}]",
                "training.num_train_epochs=8", "training.per_device_train_batch_size=4",
                "training.learning_rate=0.01", "lora.rank=4", "evaluation.per_device_eval_batch_size=8",
                "evaluation.max_new_tokens=6", "evaluation.stages=last", "dmole.proxy_min_samples=4",
                "dmole.router.epochs=30", "training.report_to=[none]",
            )
        )
    )  # fmt: skip
    return {method: output / "runs" / f"{method}-seed0-default" for method in method_names()}
