"""Export of weight changes as a LoRA adapter for PEFT."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rlsedit_fast.errors import InputError
from rlsedit_fast.export.changes import WeightChange, check_distinct, check_no_experts
from rlsedit_fast.export.engines import Engine, check_engine, padded_rank
from rlsedit_fast.files import written_whole

_GRAM_FLOOR = 8 * torch.finfo(torch.float64).eps ** 0.5
"""Relative singular value below which the Gram matrix, which squares the singular values, is too inaccurate."""


@dataclass(frozen=True)
class ModuleFactors:
    """Rank and accuracy of the LoRA factors of one module.

    Attributes:
        name: dotted name in the model.
        needed: rank that represents the change up to rounding; 0 if nothing changed beyond rounding, in which case the
            adapter does not contain the module.
        used: rank that was written.
        error: `||delta - B A||_F / ||delta||_F` of the written factors.

    Example:
        >>> from rlsedit_fast.export import ModuleFactors
        >>> ModuleFactors("model.layers.0.mlp.down_proj", needed=3, used=2, error=0.05).used
        2
    """

    name: str
    needed: int
    used: int
    error: float


@dataclass(frozen=True)
class AdapterReport:
    """Description of a written adapter.

    Attributes:
        directory: folder of the adapter.
        rank: `r` of its config, the maximum over the modules, or the next one that the server takes; factors of lower
            rank are padded with zeros.
        modules: rank and accuracy per module, in the order of the changes.

    Example:
        >>> from rlsedit_fast.export import AdapterReport
        >>> AdapterReport("adapter", rank=4, modules=()).rank
        4
    """

    directory: str
    rank: int
    modules: tuple[ModuleFactors, ...]


def write_adapter(
    changes: Sequence[WeightChange],
    directory: str | Path,
    *,
    rank: int | None = None,
    base_model: str = "",
    updates: int = 1,
    engine: Engine | None = None,
) -> AdapterReport:
    """Writes `adapter_config.json` and `adapter_model.safetensors`, for `PeftModel.from_pretrained`.

    The factorized matrix is `current - original`. With float32 master weights its rank is at most the number of edits.
    Without them, the difference of bfloat16 or float16 weights is dominated by rounding and has full rank.

    All modules have the same rank and scaling 1, so that `rank_pattern` is not needed. Experts are written as factors
    of their stacked weight (`target_parameters`), with zeros for experts that did not change.

    Args:
        changes: weight changes, at least one.
        directory: output folder, created if it does not exist; an existing adapter is replaced.
        rank: maximum rank; None for the rank that represents every change up to rounding.
        base_model: name or path of the unedited model, for the config.
        updates: number of batches that were added to the master weights; the rounding that is not counted as rank
            grows with its square root.
        engine: "vllm" pads the rank with zeros to the next value that vLLM takes as `--max-lora-rank`.

    Returns:
        Rank needed, rank used and error per module.

    Raises:
        InputError: `rank` or `updates` is below 1, a module occurs twice, no weight changed beyond rounding, the server
            takes no rank as large or no experts, or the folder cannot be written.

    Example:
        >>> import os
        >>> import tempfile
        >>> import torch
        >>> from rlsedit_fast.export import WeightChange, write_adapter
        >>> original = torch.zeros(2, 3)
        >>> edited = original + torch.outer(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 1.0, 1.0]))
        >>> change = WeightChange("layers.0.down_proj", original, edited, edited, transposed=False)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = write_adapter([change], folder)
        ...     sorted(os.listdir(folder))
        ['adapter_config.json', 'adapter_model.safetensors']
        >>> report.rank, report.modules[0].needed
        (1, 1)
    """
    from safetensors.torch import save_file

    for label, number in (("rank", rank), ("updates", updates)):
        if number is not None and (not isinstance(number, int) or number < 1):
            raise InputError(f"{label}={number!r}: expected an integer of at least 1")
    check_engine(engine)
    check_distinct(changes)
    if engine is not None:
        check_no_experts(changes, f"an adapter for {engine}")
    modules: list[ModuleFactors] = []
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for change in changes:
        module, down, up = _factored(change, rank, updates)
        modules.append(module)
        if module.used:
            factors[change.name] = down, up
    width = max((module.used for module in modules), default=0)
    if not width:
        raise InputError(
            f"none of the {len(changes)} changes is larger than rounding, so there is nothing to write; edit the model "
            "first"
        )
    width = padded_rank(width, engine)
    written = [change for change in changes if change.name in factors]
    linear = [change for change in written if change.stack is None]
    tensors: dict[str, Tensor] = {}
    for change in linear:
        down, up = factors[change.name]
        tensors |= _named(change.name, _padded(down, width, 0), _padded(up, width, 1))
    stacked: dict[str, list[WeightChange]] = {}
    for change in written:
        if change.stack is not None:
            stacked.setdefault(change.name.rpartition(".")[0], []).append(change)
    for name, experts in stacked.items():
        tensors |= _named(name.rpartition(".")[0], *_of_stack(experts, factors, width))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model or None,
        "inference_mode": True,
        "r": width,
        "lora_alpha": width,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(change.transposed for change in linear),
        "target_modules": [change.name for change in linear] or None,
        "target_parameters": list(stacked) or None,
    }
    folder = Path(directory)
    with written_whole(folder / "adapter_model.safetensors", folder / "adapter_config.json") as (weights, settings):
        save_file(tensors, weights, metadata={"format": "pt"})
        settings.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return AdapterReport(str(directory), width, tuple(modules))


def _factored(change: WeightChange, rank: int | None, updates: int) -> tuple[ModuleFactors, Tensor, Tensor]:
    """Returns the report and the best rank-r factors `A [r, d_k]`, `B [d_v, r]`, float32, with `||A_i|| = ||B_i||`."""
    delta = change.delta.double()
    flat = delta if delta.shape[0] <= delta.shape[1] else delta.T
    tolerance = _rounding(change) * updates**0.5
    basis, singular = _left_vectors(flat, tolerance)
    needed = int((singular > tolerance).sum())
    used = min(needed, rank or needed)
    roots = singular[:used].sqrt()
    left = (basis[:, :used] * roots).float()
    right = (basis[:, :used].T @ flat / roots[:, None]).float()
    norm = float(delta.norm())
    error = float((flat - left.double() @ right.double()).norm()) / norm if norm else 0.0
    down, up = (right, left) if flat is delta else (left.T, right.T)
    return ModuleFactors(change.name, needed, used, error), down, up


def _rounding(change: WeightChange) -> float:
    """Returns the spectral norm of the error that one rounding of the weight to float32 adds to its change.

    The entries of the error are independent and at most eps |w|. The norm of such a matrix is about the sum of its
    maximum row norm and maximum column norm (Bandeira and van Handel, 2016). The standard deviation of rounding to
    nearest is a fifth of that, which leaves a margin for preceding arithmetic.
    """
    size = torch.maximum(change.original.float().abs(), change.current.float().abs()).double()
    return float(torch.finfo(torch.float32).eps * (size.norm(dim=0).max() + size.norm(dim=1).max()))


def _left_vectors(flat: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """Returns left singular vectors of `flat [m, n]`, `m <= n`, as columns, and singular values in descending order.

    Uses the eigendecomposition of the Gram matrix, several times faster, if it resolves values of size `tolerance`.
    """
    if tolerance > _GRAM_FLOOR * float(flat.norm()):
        squares, vectors = torch.linalg.eigh(flat @ flat.T)
        return vectors.flip(1), squares.flip(0).clamp_min(0).sqrt()
    vectors, singular, _ = torch.linalg.svd(flat, full_matrices=False)
    return vectors, singular


def _named(module: str, down: Tensor, up: Tensor) -> dict[str, Tensor]:
    return {f"base_model.model.{module}.lora_A.weight": down, f"base_model.model.{module}.lora_B.weight": up}


def _of_stack(
    experts: Sequence[WeightChange], factors: dict[str, tuple[Tensor, Tensor]], width: int
) -> tuple[Tensor, Tensor]:
    """Returns the factors of a stacked weight in the layout of PEFT's `ParamWrapper`.

    With r = `width` and E experts, the rows from e r on of `A [E r, d_in]` belong to expert e, and so do the columns e,
    E + e, ... of `B [d_out, r E]`. PEFT takes the last dimension of the weight as d_in, unless its module declares
    `is_transposed`.
    """
    stack = experts[0].stack
    assert stack is not None
    inner, outer = list[Tensor](), list[Tensor]()
    for change in experts:
        down, up = (_padded(one, width, dim) for dim, one in enumerate(factors[change.name]))
        swapped = change.transposed and not stack.declared_transposed
        inner.append(up.T if swapped else down)
        outer.append(down.T if swapped else up)
    places = torch.tensor([int(change.name.rpartition(".")[2]) for change in experts])
    lora_a = inner[0].new_zeros(stack.experts, *inner[0].shape).index_copy(0, places, torch.stack(inner))
    lora_b = outer[0].new_zeros(*outer[0].shape, stack.experts).index_copy(2, places, torch.stack(outer, dim=2))
    return lora_a.flatten(0, 1), lora_b.flatten(1)


def _padded(factor: Tensor, width: int, dim: int) -> Tensor:
    """Pads the rank dimension with zeros up to `width`; returns a contiguous CPU tensor."""
    shape = list(factor.shape)
    shape[dim] = width - shape[dim]
    return torch.cat([factor, factor.new_zeros(shape)], dim).cpu().contiguous()
