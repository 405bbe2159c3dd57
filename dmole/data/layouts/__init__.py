# SPDX-License-Identifier: Apache-2.0
"""Published layouts by name, one file each: what `dmole tasks import` reads.

`paper` is D-MoLE's nine data sets, each in a folder of its task's name; `coin` and `ucit` are whole benchmarks.
"""

from collections.abc import Mapping
from types import MappingProxyType

from dmole.data.layouts import (
    coin,
    flickr30k,
    iconqa,
    kvqa,
    llava,
    ocr_vqa,
    pmc_vqa,
    sk_vg,
    textcaps,
    ucit,
    vizwiz_caption,
    vizwiz_vqa,
)
from dmole.data.layouts.base import Dropped, Layout

__all__ = ["LAYOUTS", "Dropped", "Layout"]

# D-MoLE's data sets in its order.
PAPER: Mapping[str, Layout] = MappingProxyType(
    {
        "vizwiz_caption": vizwiz_caption.LAYOUT,
        "sk_vg": sk_vg.LAYOUT,
        "textcaps": textcaps.LAYOUT,
        "iconqa": iconqa.LAYOUT,
        "ocr_vqa": ocr_vqa.LAYOUT,
        "flickr30k": flickr30k.LAYOUT,
        "vizwiz_vqa": vizwiz_vqa.LAYOUT,
        "kvqa": kvqa.LAYOUT,
        "pmc_vqa": pmc_vqa.LAYOUT,
    }
)

# By layout: by task, the folder below the source and the layout of the task.
LAYOUTS: Mapping[str, Mapping[str, tuple[str, Layout]]] = MappingProxyType(
    {
        "llava": {"llava": (".", llava.LAYOUT)},
        **{name: {name: (".", layout)} for name, layout in PAPER.items()},
        "paper": {name: (name, layout) for name, layout in PAPER.items()},
        "coin": {name: (name, layout) for name, layout in coin.LAYOUTS.items()},
        "ucit": {name: (ucit.FOLDERS[name], layout) for name, layout in ucit.LAYOUTS.items()},
    }
)
