# SPDX-License-Identifier: Apache-2.0
"""The page docs/settings.md, from the settings' own comments: python scripts/settings_page.py > docs/settings.md"""

from __future__ import annotations

import json

from dmole.config import RunConfig
from dmole.settings_text import Setting, settings


def markdown_page() -> str:
    """docs/settings.md: a table for each section, with the defaults."""
    lines = [
        "# Settings",
        "",
        "What `dmole run` can be told, with the defaults: in a YAML file (`--config`), or one by one "
        "(`--set lora.rank=4`). `dmole config` prints the same list with the values of a recipe or a file. "
        "This page is made from the code by `scripts/settings_page.py`.",
        "",
        *_table_head("Common"),
    ]
    every = settings(RunConfig())
    lines += [_table_row(setting) for setting in every if not setting.section and setting.depth == 0]
    for section in (setting for setting in every if setting.section):
        lines += ["", *_table_head(f"`{section.path}`", section.comment)]
        lines += [
            _table_row(setting)
            for setting in every
            if not setting.section and setting.path.rpartition(".")[0] == section.path
        ]
    return "\n".join(lines) + "\n"


def _table_head(title: str, about: str = "") -> list[str]:
    return [
        f"## {title}",
        "",
        *([about, ""] if about else []),
        "| setting | default | values | meaning |",
        "|---|---|---|---|",
    ]


def _table_row(setting: Setting) -> str:
    value = json.dumps(setting.value, ensure_ascii=False)
    cells = (f"`{setting.path}`", f"`{value}`", setting.kind, setting.comment)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    print(markdown_page(), end="")
