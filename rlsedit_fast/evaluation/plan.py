"""Plans: all settings of a run, and whether a result file has exactly these settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rlsedit_fast.editing import EditConfig
from rlsedit_fast.evaluation.stability import TOKENS

FORMAT = 2
"""Version of the format of result files; files of other versions are ignored."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Settings of a run, in addition to its ground and cases.

    Attributes:
        label: name of the run in reports, such as the rule.
        stream: kind of stream: `plain`, `conflicting`, `related`, or another name.
        edits: number of edits.
        seed: random seed of cases and anchors.
        order: number of another order of the same cases; 0 for the first one.
        config: settings of the editor.
        protected: weight with which every token of the cases' held-out prompts is protected before the first edit,
            relative to an edit of weight 1; 0 for no protection. Evaluated prompts are not protected.
        checkpoints: fractions of the stream after which everything is evaluated, in addition to the end. If empty,
            edits are not evaluated directly after their batch either.
        judged: maximum number of cases that are evaluated at the end, evenly spaced; None for all. At checkpoints the
            maximum is `ALONG`.
        free: maximum number of cases that are evaluated by greedy generation at the end, evenly spaced. The standard
            error of a fraction is at most `0.5 / sqrt(free)`.
        probed: maximum number of tokens on which perplexity and KL are measured, with their standard errors.

    Example:
        >>> from rlsedit_fast.evaluation import CONFIG, Plan
        >>> plan = Plan(label="rls", stream="plain", edits=100, seed=1, config=CONFIG)
        >>> plan.checkpoints
        (0.1, 0.25, 0.5, 1.0)
    """

    label: str
    stream: str
    edits: int
    seed: int
    order: int = 0
    config: EditConfig
    protected: float = 0.0
    checkpoints: tuple[float, ...] = (0.1, 0.25, 0.5, 1.0)
    judged: int | None = None
    free: int = 300
    probed: int = TOKENS

    def as_json(self) -> dict[str, Any]:
        """Returns the settings as in result files."""
        plain = replace(self, config=None)  # type: ignore[arg-type]
        found: dict[str, Any] = json.loads(json.dumps(asdict(plain) | {"config": self.config.to_dict()}))
        return found


def finished(path: Path, ground: str, plan: Plan, identity: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
    """Reads the result file of a run.

    A setting that is missing in the file, because an earlier version wrote it, must have its default value.

    Args:
        path: the file.
        ground: name of the ground.
        plan: settings of the run.
        identity: `Ground.identity`.

    Returns:
        The contents of the file, or None if it does not exist, is damaged or has other settings.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if (found["format"], found["ground"], found.get("made_of", {})) != (FORMAT, ground, identity or {}):
            return None
        then, now = dict(found["plan"]), plan.as_json()
        if then.pop("forgetting", 1.0) != 1.0:  # a setting of earlier versions
            return None
        usual = Plan(label="", stream="", edits=0, seed=0, config=EditConfig()).as_json()
        same = _agree(then.pop("config"), now.pop("config"), usual["config"]) and _agree(then, now, usual)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return found if same else None


def _agree(then: Mapping[str, Any], now: Mapping[str, Any], usual: Mapping[str, Any]) -> bool:
    """Returns whether settings are equal, where missing ones have their default values."""
    for name, value in now.items():
        known = then.get(name, usual[name])
        if isinstance(value, dict) and isinstance(usual[name], dict) and isinstance(known, dict) and usual[name]:
            if not _agree(known, value, usual[name]):
                return False
        elif known != value:
            return False
    return set(then) <= set(now)
