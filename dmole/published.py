# SPDX-License-Identifier: Apache-2.0
"""The tasks that a recipe's numbers were published on, to compare a user's stream with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from dmole.data.sample import Stream


@dataclass(frozen=True)
class Published:
    """A task as it was published: its metric, and how many samples it had; None where no number is published."""

    metric: str
    train: int | None = None
    test: int | None = None


# By recipe, the tasks that its numbers were published on, in their order; `dmole run --dry-run` compares.
PUBLISHED: Mapping[str, Mapping[str, Published]] = MappingProxyType(
    {
        "paper": {
            "vizwiz_caption": Published("cider", 117_155, 7_750),
            "sk_vg": Published("iou", 23_404, 6_598),
            "textcaps": Published("cider", 109_765, 3_166),
            "iconqa": Published("option_letter", 18_946, 6_315),
            "ocr_vqa": Published("exact_match", 166_043, 100_037),
            "flickr30k": Published("cider", 145_000, 1_000),
            "vizwiz_vqa": Published("vqa", 20_523, 4_319),
            "kvqa": Published("exact_match", 146_408, 24_294),
            "pmc_vqa": Published("option_letter", 176_948, 2_000),
        },
        # Its own scripts score VizWiz and VQAv2 by one answer, and TextVQA by ten annotators.
        "coin": {
            "ScienceQA": Published("exact_match"),
            "TextVQA": Published("exact_match"),
            "ImageNet": Published("exact_match"),
            "GQA": Published("exact_match"),
            "VizWiz": Published("exact_match"),
            "Grounding": Published("iou"),
            "VQAv2": Published("exact_match"),
            "OCRVQA": Published("exact_match"),
        },
    }
)


def layout_findings(recipe: str | None, stream: Stream) -> list[str]:
    """How `stream` differs from what a recipe's numbers were published on; [] for other recipes."""
    published = PUBLISHED.get(recipe or "", {})
    lines = [f"recipe {recipe}: the task {name} is missing" for name in published if name not in stream.task_names]
    for task in stream.tasks if published else ():
        if task.name not in published:
            lines.append(f"recipe {recipe}: {task.name} is none of its tasks ({', '.join(published)})")
            continue
        asked = published[task.name]
        if task.metric != asked.metric:
            lines.append(f"recipe {recipe}: {task.name} has the metric {task.metric}; published with {asked.metric}")
        for split, count in (("train", asked.train), ("test", asked.test)):
            if count is not None and len(getattr(task, split)) != count:
                found = len(getattr(task, split))
                lines.append(f"recipe {recipe}: {task.name} has {found:,} {split} samples; published with {count:,}")
    if not lines and stream.task_names != tuple(published):
        lines.append(f"recipe {recipe}: the order is {', '.join(stream.task_names)}; published {', '.join(published)}")
    return lines if published else []
