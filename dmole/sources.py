# SPDX-License-Identifier: Apache-2.0
"""What `stream:` and `model:` of a configuration name: a folder of the user's, or a name that a package registers."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from dmole.config import RunConfig
from dmole.config_error import ConfigError
from dmole.data.reading import SHOWN_PROBLEMS, read_stream
from dmole.data.sample import Stream
from dmole.methods import method_class, method_names
from dmole.models.declaration import Declaration
from dmole.models.loading import load
from dmole.models.vision_language import VisionLanguageModel
from dmole.recipes import RECIPES
from dmole.registry import called, registered, wrong
from dmole.registry import load as load_entry_point


def check_named(config: RunConfig) -> None:
    """ConfigError for a configuration without a stream, a model or methods, and for a method that cannot be loaded."""
    for setting, given, option, other, names in (
        (
            "stream",
            config.stream,
            "dmole run STREAM",
            "a folder with stream.yaml",
            registered("dmole.streams"),
        ),
        ("model", config.model, "--model", "a folder or hub id of a model", registered("dmole.models")),
        ("methods", config.methods, "--method", "", method_names()),
    ):
        if not given:
            registered_names = f"one of {', '.join(names)}" if names else "a registered name"
            expected = f"{other}, or {registered_names}" if other else f"names of {', '.join(names)}"
            raise ConfigError(
                f"{setting}: got none; expected {expected}. Give it with {option}, or a recipe that sets it with "
                f"--recipe (registered: {', '.join(RECIPES) or 'none'})."
            )
    for method in config.methods:
        method_class(method)  # before any data is read


def open_stream(name: str, console: Console, *, rows: Literal["memory", "disk"] = "memory") -> Stream:
    """A registered stream, or a folder with stream.yaml. `rows`: where its samples stay."""
    known = registered("dmole.streams")
    if name in known:
        folder = _folder(known[name], lambda line: console.print(line, highlight=False))
        # Checked by the package that made it; decoding every image again would cost seconds for nothing.
        return read_stream(folder, check_images=False, rows=rows)
    _check_folder("stream", "stream.yaml", name, known)
    stream = read_stream(Path(name), rows=rows)
    for note in stream.notes[:SHOWN_PROBLEMS]:
        console.print(f"note: {note}", highlight=False, markup=False)
    return stream


def limited(stream: Stream, config: RunConfig) -> Stream:
    """As many samples of each split as the configuration keeps."""
    return stream.limit(train=config.train_samples, validation=config.validation_samples, test=config.test_samples)


def open_model(config: RunConfig) -> VisionLanguageModel:
    """The model of `model:`: a registered one, a folder in transformers' format, or a hub id; ready to be trained on.

    Raises ConfigError for a name that is none of these, and for what `dmole.models.loading.load` and
    `VisionLanguageModel.ready` refuse.
    """
    return open_base(
        config.model,
        dtype=config.dtype,
        device_map=config.device_map,
        quantization=config.quantization,
        declaration=config.declaration,
    )


def open_base(
    model: str, *, dtype: Any = None, device_map: Any = None, quantization: Any = None, declaration: Declaration
) -> VisionLanguageModel:
    """The same by single arguments, which are those of `dmole.models.loading.load`."""
    known = registered("dmole.models")
    name = model
    if name in known:
        name = str(_folder(known[name]))
    else:
        if "/" not in name:
            _check_folder("model", "a model in transformers' format, a hub id such as 'owner/name'", name, known)
        # A folder may need image processors that the packages register with transformers when they are imported.
        for point in known.values():
            load_entry_point(point)
    try:
        loaded = load(name, dtype=dtype, device_map=device_map, quantization=quantization, declaration=declaration)
        return loaded.ready()
    except OSError as error:
        raise ConfigError(
            f"model: {model!r} cannot be read ({' '.join(str(error).split())[:300]}); expected a folder of "
            f"save_pretrained or a hub id. Check the name and the connection."
        ) from error


def _folder(point: EntryPoint, *arguments: object) -> Path:
    """The folder that an entry point's function returns."""
    found = called(point, load_entry_point(point))(*arguments)
    if not isinstance(found, str | Path) or not Path(found).is_dir():
        raise wrong(point, f"which returns {found!r}", "the path of a folder")
    return Path(found)


def _check_folder(setting: str, content: str, name: str, known: Iterable[str]) -> None:
    if not Path(name).is_dir():
        none = "a registered name, of which there is none: install dmole with pip, in a checkout with -e"
        names = f"one of {', '.join(known)}" if known else none
        raise ConfigError(
            f"{setting}: got {name!r}, which is no folder; expected a folder with {content}, or {names}. "
            f"Check the name and the folder that the command runs in."
        )
