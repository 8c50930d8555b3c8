"""How transformers divides a model over devices with tensor parallelism, from its plan."""

from __future__ import annotations

import math
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


_HEADS = {"num_attention_heads": r"(q|q_b|kv_b)_proj|query_key_value", "num_key_value_heads": r"[kv]_proj"}
"""Numbers of heads by the projections that compute them."""


def divided_heads(model: Any) -> dict[str, int]:
    """Returns the numbers of heads, by their name in the config, that the number of processes must divide.

    Attention reads whole heads, so that a process cannot hold a part of one. Plans that gather the outputs of the
    projections have no such limit.
    """
    config = model.config.get_text_config()
    divided = [name.rpartition(".")[2] for name, style in parallel_plan(model).items() if style == "colwise"]
    found = {}
    for kind, pattern in _HEADS.items():
        heads = getattr(config, kind, None)
        if heads and any(re.fullmatch(pattern, name) for name in divided):
            found[kind] = int(heads)
    return found


def process_counts(model: Any) -> list[int]:
    """Returns the numbers of processes that divide the heads of a model, up to its number of attention heads."""
    heads = divided_heads(model).values()
    most = math.gcd(*heads) if heads else int(getattr(model.config.get_text_config(), "num_attention_heads", None) or 1)
    return [count for count in range(1, most + 1) if not heads or most % count == 0]


def refused_count(model: Any, count: int) -> str:
    """Returns why a model is not divided over `count` processes, with the numbers that work; empty if it is."""
    wrong = [f"{heads} {kind[4:].replace('_', ' ')}" for kind, heads in divided_heads(model).items() if heads % count]
    return (
        f"do not divide the {' and '.join(wrong)} of the model; use {_listed(process_counts(model))}" if wrong else ""
    )


def _listed(counts: list[int]) -> str:
    return f"{', '.join(map(str, counts[:-1]))} or {counts[-1]}" if len(counts) > 1 else str(counts[0])


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
