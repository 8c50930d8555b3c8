"""How transformers divides a model over devices with tensor parallelism, from its plan."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from rlsedit_fast.errors import ModelError


def loading_options(processes: int) -> dict[str, Any]:
    """Returns options of `from_pretrained` that divide a model over processes; empty for one."""
    if processes == 1:
        return {}
    try:
        from transformers.distributed import DistributedConfig

        return {"distributed_config": DistributedConfig(tp_size=processes)}
    except (ImportError, TypeError):  # earlier versions
        return {"tp_plan": "auto"}


def parallel_plan(model: Any) -> Mapping[str, str]:
    """Returns the styles by module or parameter, with `*` for an index, such as `rowwise`; empty without a plan."""
    base = getattr(model.config.get_text_config(), "base_model_tp_plan", None) or {}
    prefix = getattr(model, "base_model_prefix", "")
    return {f"{prefix}.{name}": style for name, style in base.items()} | dict(getattr(model, "_tp_plan", None) or {})


def style_of(plan: Mapping[str, str], parameter: str) -> str | None:
    """Returns the style of a parameter, given its name; None if every device holds all of it."""
    name = re.sub(r"\.\d+(?=\.)", ".*", parameter)
    module, _, kind = name.rpartition(".")
    style = plan.get(name) or plan.get(module)
    divided = style is not None and "wise" in style and not ("row" in style and kind == "bias")
    return style if divided else None


def bytes_per_device(model: Any, devices: int) -> int:
    """Returns the bytes of the weights on each device; parameters without a style are on every device.

    Raises:
        ModelError: transformers has no plan for the model.
    """
    plan = parallel_plan(model)
    if devices > 1 and not plan:
        raise ModelError(
            f"{type(model).__name__} has no plan for tensor parallelism in transformers, so it cannot be divided over "
            f"{devices} devices"
        )
    total = 0
    for name, parameter in model.named_parameters():
        parts = devices if style_of(plan, name) else 1
        total += -(-parameter.numel() // parts) * parameter.element_size()
    return total
