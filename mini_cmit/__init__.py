# SPDX-License-Identifier: Apache-2.0
"""The mini benchmark of continual multimodal instruction tuning, and the small model that it is made for.

Importing this package makes transformers' `AutoProcessor` and `AutoImageProcessor` load the folders of both models.
"""

import dmole  # noqa: F401  (before transformers: it leaves out notices, also in processes that a build spawns)
from mini_cmit.model.processing import register

register()
