# SPDX-License-Identifier: Apache-2.0
"""Which scenes the mini model is pretrained on, and how many images of each: one table."""

from __future__ import annotations

import random

from mini_cmit.pretraining.charts import chart_scene, comparison_scene
from mini_cmit.pretraining.corpus import SceneFamily
from mini_cmit.pretraining.icons import icon_grid_scene, icon_scene
from mini_cmit.pretraining.lands import land_scene
from mini_cmit.pretraining.maps import map_scene
from mini_cmit.pretraining.molecules import molecule_scene
from mini_cmit.pretraining.posters import poster_scene
from mini_cmit.pretraining.scene import Scene
from mini_cmit.pretraining.shapes import odd_one_scene, shapes_scene
from mini_cmit.pretraining.words import words
from mini_cmit.pretraining.writing import number_scene, word_scene


def _word_scene(rng: random.Random) -> Scene:
    return word_scene(rng, words())


# family -> (scene, images)
CURRICULUM: dict[str, tuple[SceneFamily, int]] = {
    "shapes": (shapes_scene, 9000),
    "odd_one": (odd_one_scene, 2000),
    "words": (_word_scene, 8000),
    "numbers": (number_scene, 7000),
    "icons": (icon_scene, 6000),
    "icon_grids": (icon_grid_scene, 6000),
    "charts": (chart_scene, 5000),
    "comparisons": (comparison_scene, 4000),
    "maps": (map_scene, 5000),
    "posters": (poster_scene, 5000),
    "lands": (land_scene, 3000),
    "molecules": (molecule_scene, 4000),
}
