"""Forward passes that do no more than is asked: read keys and hidden states and stop, or resume above a layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rlsedit_fast.errors import ModelError
from rlsedit_fast.models.projections import Decoder, Projection


class _Enough(Exception):
    """Raised by a hook once everything wanted has been seen; the rest of the model is not run."""


def hidden_of(output: Any) -> Tensor:
    """The hidden state of a block's output, a tensor or a tuple by architecture and transformers version."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def with_hidden(output: Any, hidden: Tensor) -> Any:
    """A block's output with its hidden state replaced, in the form it came in."""
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no parameter gradients, both put back afterwards."""
    was_training = model.training
    wanted = [p for p in model.parameters() if p.requires_grad]
    model.eval()
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
        model.train(was_training)


def read_keys(
    decoder: Decoder, projections: Sequence[Projection], ids: Tensor, mask: Tensor, *, block: int | None = None
) -> tuple[dict[int, Tensor], Tensor | None]:
    """Inputs of `projections` on a batch, in one pass that stops as soon as it has what it wants.

    Args:
        decoder: the model.
        projections: at least one, unless `block` is given.
        ids: token ids `[rows, t]`.
        mask: attention mask `[rows, t]`.
        block: a block whose output is wanted too; not below the deepest projection.

    Returns:
        `({layer: keys [rows, t, d_k]}, hidden [rows, t, d] or None)` in the model's dtype.

    Raises:
        ModelError: a projection is not among what the model runs.
    """
    keys: dict[int, Tensor] = {}
    hidden: list[Tensor] = []
    deepest = max((p.layer for p in projections), default=-1)
    if block is not None and block < deepest:
        raise AssertionError(f"block {block} lies below the deepest projection {deepest}")
    handles = []

    def keep_key(projection: Projection) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            keys[projection.layer] = inputs[0].detach().reshape(*ids.shape, -1)  # OPT's blocks flatten rows and tokens
            if block is None and projection.layer == deepest:
                raise _Enough

        return hook

    def keep_hidden(_module: nn.Module, _inputs: Any, output: Any) -> None:
        hidden.append(hidden_of(output).detach())
        raise _Enough

    try:
        for projection in projections:
            handles.append(projection.module.register_forward_pre_hook(keep_key(projection)))
        if block is not None:
            handles.append(decoder.blocks[block].register_forward_hook(keep_hidden))
        with torch.no_grad():
            decoder.model(input_ids=ids, attention_mask=mask, use_cache=False)
    except _Enough:
        pass
    finally:
        for handle in handles:
            handle.remove()
    unseen = [projection.name for projection in projections if projection.layer not in keys]
    if unseen:
        raise ModelError(f"{unseen} took no part in the model's forward; was it replaced? Make a new editor")
    return keys, hidden[0] if hidden else None


@contextmanager
def resume_above(decoder: Decoder, block: int) -> Iterator[dict[str, Any]]:
    """Within it the model's own forward starts above `block`: blocks up to there cost nothing.

    Masks, positions and head stay the model's own.

    Args:
        decoder: the model.
        block: index of the last block that is not run.

    Yields:
        A dictionary whose entry `output` is what that block returns; set it before each forward.
    """
    skipped = decoder.blocks[: block + 1]
    originals = [module.__dict__.get("forward") for module in skipped]
    state: dict[str, Any] = {}

    def resumed(*_args: Any, **_kwargs: Any) -> Any:
        return state["output"]

    try:
        for module in skipped:
            module.__dict__["forward"] = resumed
        yield state
    finally:
        for module, original in zip(skipped, originals, strict=True):
            if original is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = original
