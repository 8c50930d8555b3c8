"""Key statistics of the demo model, collected once per process."""

from __future__ import annotations

from functools import cache

import rlsedit_fast as rf
from rlsedit_fast.evaluation.demo import anchor_texts
from rlsedit_fast.statistics.sources import GivenTexts
from rlsedit_fast.world import World, load_demo_model

LAYERS = (0, 1, 2)


@cache
def demo_statistics(count: int) -> rf.KeyStatistics:
    """Returns the key statistics of the first `count` texts in the first layers of the demo model."""
    editor = rf.Editor(*load_demo_model(), config=rf.EditConfig(layers=LAYERS, contexts={"prefixes": ("",)}))
    return editor.statistics(GivenTexts(anchor_texts(World.generate(), 0)[:count]), held_out=0)
