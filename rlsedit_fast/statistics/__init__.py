"""Key statistics (mom2) of the edited layers: sources of text, collection, files and a cache."""

from rlsedit_fast.statistics.collection import collect
from rlsedit_fast.statistics.key_statistics import KeyStatistics
from rlsedit_fast.statistics.sources import GivenTexts, SelfGenerated, Source, TextFile

__all__ = ["GivenTexts", "KeyStatistics", "SelfGenerated", "Source", "TextFile", "collect"]
