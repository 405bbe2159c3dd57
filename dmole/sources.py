# SPDX-License-Identifier: Apache-2.0
"""What `stream:` and `model:` of a configuration name: a folder of the user's, or a name that a package registers.

A package registers names by entry points, this project's own benchmark like anybody's:

    dmole.models    name = "package.module:function"     () -> a transformers folder
    dmole.streams   name = "package.module:function"     (say) -> a folder with stream.yaml, checked by the package;
                                                         say(line) tells the user what takes long
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Literal

from rich.console import Console

from dmole.config import RunConfig
from dmole.config_error import ConfigError
from dmole.data.reading import SHOWN_PROBLEMS, read_stream
from dmole.data.sample import Stream
from dmole.models.loading import load
from dmole.models.vision_language import VisionLanguageModel

Group = Literal["dmole.models", "dmole.streams"]


def registered(group: Group) -> dict[str, EntryPoint]:
    """{name: entry point} of the installed packages."""
    return {point.name: point for point in sorted(entry_points(group=group), key=lambda point: point.name)}


def open_stream(name: str, console: Console, *, rows: Literal["memory", "disk"] = "memory") -> Stream:
    """A registered stream, or a folder with stream.yaml. `rows`: where its samples stay."""
    known = registered("dmole.streams")
    if name in known:
        folder = known[name].load()(lambda line: console.print(line, highlight=False))
        # Checked by the package that made it; decoding every image again would cost seconds for nothing.
        return read_stream(Path(folder), check_images=False, rows=rows)
    _check_folder("stream", "stream.yaml", name, known)
    stream = read_stream(Path(name), rows=rows)
    for note in stream.notes[:SHOWN_PROBLEMS]:
        console.print(f"note: {note}", highlight=False, markup=False)
    return stream


def open_model(config: RunConfig) -> VisionLanguageModel:
    """The model of `model:`: a registered one, a folder in transformers' format, or a hub id; ready to be trained on.

    Raises ConfigError for a name that is none of these, and for what `dmole.models.loading.load` and
    `VisionLanguageModel.ready` refuse.
    """
    known = registered("dmole.models")
    name = config.model
    if name in known:
        name = str(known[name].load()())
    else:
        if "/" not in name:
            _check_folder("model", "a model in transformers' format, a hub id such as 'owner/name'", name, known)
        # A folder may need image processors that the packages register with transformers when they are imported.
        for point in known.values():
            point.load()
    try:
        return load(
            name,
            dtype=config.dtype,
            device_map=config.device_map,
            quantization=config.quantization,
            declaration=config.declaration,
        ).ready()
    except OSError as error:
        raise ConfigError(
            f"model: {config.model!r} cannot be read ({' '.join(str(error).split())[:300]}); expected a folder of "
            f"save_pretrained or a hub id. Check the name and the connection."
        ) from error


def _check_folder(setting: str, content: str, name: str, known: dict[str, EntryPoint]) -> None:
    if not Path(name).is_dir():
        none = "a registered name, of which there is none: install dmole with pip, in a checkout with -e"
        names = f"one of {', '.join(known)}" if known else none
        raise ConfigError(
            f"{setting}: got {name!r}, which is no folder; expected a folder with {content}, or {names}. "
            f"Check the name and the folder that the command runs in."
        )
