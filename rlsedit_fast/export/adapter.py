"""A LoRA adapter that PEFT loads: each weight's change as a product of two narrow matrices."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rlsedit_fast.errors import InputError
from rlsedit_fast.export.changes import WeightChange
from rlsedit_fast.files import written_whole

_GRAM_FLOOR = 8 * torch.finfo(torch.float64).eps ** 0.5
"""Singular values below this share of the matrix's norm are lost in its Gram matrix, whose own are their squares."""


@dataclass(frozen=True)
class ModuleFactors:
    """How well one module's change is told by its factors.

    Attributes:
        name: dotted name in the model.
        needed: rank at which it would be told to rounding; 0 where no more than that changed, and the adapter lacks
            the module.
        used: rank that was written.
        error: `||delta - B A||_F / ||delta||_F`, of the factors as they were written.
    """

    name: str
    needed: int
    used: int
    error: float


@dataclass(frozen=True)
class AdapterReport:
    """What an adapter holds.

    Attributes:
        directory: where it is.
        rank: the `r` of its configuration: the greatest of the modules'. Those of a lesser rank are filled with zeros.
        modules: in the order of the changes.
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
) -> AdapterReport:
    """Writes `adapter_config.json` and `adapter_model.safetensors`, for `PeftModel.from_pretrained`.

    Factored is `current - original`: from float32 masters its rank is at most the number of edits. Without them, the
    difference of bfloat16 or float16 weights is mostly their rounding, of full rank.

    All modules have the same rank and a scaling of 1, so that readers need not know `rank_pattern`.

    Args:
        changes: at least one.
        directory: made if it is not there; an adapter in it is replaced.
        rank: at most; None for as much as tells every change to rounding.
        base_model: name or path of the unedited model, for the configuration.
        updates: how often the masters were written, that is batches; their rounding grows with its square root, and
            what it amounts to is not counted as rank.

    Returns:
        Per module the rank needed, the rank used, and what is missing.

    Raises:
        InputError: a rank or a count below 1, the same module twice, nothing that changed, or a directory that cannot
            be written.
    """
    from safetensors.torch import save_file

    for label, number in (("rank", rank), ("updates", updates)):
        if number is not None and number < 1:
            raise InputError(f"{label}={number}: expected at least 1")
    names = [change.name for change in changes]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"several changes of {', '.join(twice)}; give one for each module")
    modules: list[ModuleFactors] = []
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for change in changes:
        told, down, up = _factored(change, rank, updates)
        modules.append(told)
        if told.used:
            factors[change.name] = down, up
    width = max((told.used for told in modules), default=0)
    if not width:
        raise InputError(
            f"{len(changes)} changes, none of which goes beyond rounding: an adapter would hold nothing; edit the "
            "model first"
        )
    tensors: dict[str, Tensor] = {}
    for name, (down, up) in factors.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = _filled(down, width, 0)
        tensors[f"base_model.model.{name}.lora_B.weight"] = _filled(up, width, 1)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model or None,
        "inference_mode": True,
        "r": width,
        "lora_alpha": width,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(change.transposed for change in changes if change.name in factors),
        "target_modules": list(factors),
    }
    folder = Path(directory)
    with written_whole(folder / "adapter_model.safetensors", folder / "adapter_config.json") as (weights, settings):
        save_file(tensors, weights, metadata={"format": "pt"})
        settings.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return AdapterReport(str(directory), width, tuple(modules))


def _factored(change: WeightChange, rank: int | None, updates: int) -> tuple[ModuleFactors, Tensor, Tensor]:
    """What is told, `A [r, d_k]` and `B [d_v, r]`, float32: the best of rank r, `||A_i|| = ||B_i||`."""
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
    """Norm of what one rounding of the weight to float32 adds to its change, `||E||_2`.

    Its entries are independent and at most eps |w|; the norm of such a matrix is about its greatest row norm and its
    greatest column norm together (Bandeira and van Handel, 2016). Rounding to nearest has a fifth of that as its
    deviation, which leaves room for the arithmetic that came before it.
    """
    size = torch.maximum(change.original.float().abs(), change.current.float().abs()).double()
    return float(torch.finfo(torch.float32).eps * (size.norm(dim=0).max() + size.norm(dim=1).max()))


def _left_vectors(flat: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """Left singular vectors of `flat [m, n]`, `m <= n`, as columns, and singular values, descending.

    By the eigenvectors of the Gram matrix, several times faster, where that knows values of the size of `tolerance`.
    """
    if tolerance > _GRAM_FLOOR * float(flat.norm()):
        squares, vectors = torch.linalg.eigh(flat @ flat.T)
        return vectors.flip(1), squares.flip(0).clamp_min(0).sqrt()
    vectors, singular, _ = torch.linalg.svd(flat, full_matrices=False)
    return vectors, singular


def _filled(factor: Tensor, width: int, dim: int) -> Tensor:
    """With zeros up to `width` in the dimension of the rank, on the CPU."""
    shape = list(factor.shape)
    shape[dim] = width - shape[dim]
    return torch.cat([factor, factor.new_zeros(shape)], dim).cpu().contiguous()
