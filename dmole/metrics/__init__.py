# SPDX-License-Identifier: Apache-2.0
"""Task metrics by name, and the aggregates of continual learning (`dmole.metrics.continual`)."""

from collections.abc import Mapping
from types import MappingProxyType

from dmole.metrics.anls import Anls
from dmole.metrics.base import Metric, SampleMetric, Scorable
from dmole.metrics.cider import Cider, CiderPercent
from dmole.metrics.exact_match import ExactMatch
from dmole.metrics.iou import IoU
from dmole.metrics.option_letter import OptionLetter
from dmole.metrics.rouge_l import RougeL
from dmole.metrics.token_f1 import TokenF1
from dmole.metrics.vqa import VqaAccuracy

KINDS = (Anls, Cider, CiderPercent, ExactMatch, IoU, OptionLetter, RougeL, TokenF1, VqaAccuracy)
METRICS: Mapping[str, Metric] = MappingProxyType({kind.name: kind() for kind in KINDS})

__all__ = ["METRICS", "Metric", "SampleMetric", "Scorable"]
