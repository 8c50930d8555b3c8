"""Partial forward passes: read keys and hidden states and stop, or resume above a layer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rlsedit_fast.errors import ModelError
from rlsedit_fast.models.compiled import uncompiled
from rlsedit_fast.models.linear import Projection
from rlsedit_fast.models.projections import Decoder


class StopForward(Exception):
    """Raised by a hook to stop a forward pass once everything has been read."""


def hidden_of(output: Any) -> Tensor:
    """Returns the hidden state of a block's output.

    Args:
        output: output of a decoder block, a tensor or a tuple whose first item is the hidden state.

    Returns:
        The hidden state, in most models `[rows, t, d]`.

    Example:
        >>> import torch
        >>> from rlsedit_fast.models import hidden_of
        >>> hidden_of((torch.zeros(1, 2, 3), None)).shape
        torch.Size([1, 2, 3])
    """
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def with_hidden(output: Any, hidden: Tensor) -> Any:
    """Returns a block's output with its hidden state replaced.

    Args:
        output: output of a decoder block, a tensor or a tuple whose first item is the hidden state.
        hidden: the new hidden state.

    Returns:
        A tensor or a tuple, like `output`.

    Example:
        >>> import torch
        >>> from rlsedit_fast.models import with_hidden
        >>> with_hidden((torch.zeros(1), "cache"), torch.ones(1))
        (tensor([1.]), 'cache')
    """
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def taken_rows(output: Any, rows: Tensor, length: int) -> Any:
    """Returns a block's output with some of its rows and its first tokens.

    Args:
        output: output of a decoder block with the hidden state `[all rows, t, d]`.
        rows: indices of the rows, `[m]`, int64.
        length: number of tokens to keep.
    """
    hidden = hidden_of(output)
    return with_hidden(output, hidden[rows.to(hidden.device), :length])


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Sets evaluation mode and disables gradients of the parameters in the context; restores both afterwards.

    Gradients with respect to other tensors are enabled, also if the caller is in inference mode. Modules that are
    compiled in place run without compilation, because compiled code ignores new hooks.

    Args:
        model: any module.

    Example:
        >>> import torch
        >>> from rlsedit_fast.models import quiet
        >>> model = torch.nn.Linear(2, 2)
        >>> with quiet(model):
        ...     model.training, model.weight.requires_grad
        (False, False)
        >>> model.training, model.weight.requires_grad
        (True, True)
    """
    was_training = model.training
    wanted = [p for p in model.parameters() if p.requires_grad]
    model.eval()
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        with torch.inference_mode(False), torch.enable_grad(), uncompiled(model):
            yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
        model.train(was_training)


def cache_argument(model: nn.Module) -> str:
    """Returns the name of the KV cache argument of the model: `cache` since transformers 5.24."""
    named = inspect.signature(model.forward).parameters
    return "cache" if "cache" in named else "past_key_values"


def cache_of(output: Any) -> Any:
    """Returns the KV cache of a forward output, or None for a model that does not return one."""
    return next((output[name] for name in ("cache", "past_key_values") if name in output), None)


def read_keys(
    decoder: Decoder,
    projections: Sequence[Projection],
    inputs: Mapping[str, Any],
    *,
    at: Tensor | None = None,
    output_of: nn.Module | None = None,
) -> tuple[dict[int, Tensor], Tensor | None]:
    """Reads the keys of `projections` on a batch, in one forward pass that stops as early as possible.

    Args:
        decoder: the model.
        projections: at least one, unless `output_of` is given.
        inputs: arguments of the model's forward, with `input_ids [rows, t]`.
        at: index of one token per row, `[rows]`, or None for all tokens.
        output_of: module that runs after the projections and whose output `[rows, t, d]` is read as well.

    Returns:
        `({layer: keys}, output or None)`: `[rows, t, d]`, or `[rows, d]` with `at`. In the dtype of the model, except
        for keys of a mixture of experts, which are products with the weights of the router in float32 (or float64).

    Raises:
        ModelError: the forward pass does not run a projection.
    """
    keys: dict[int, Tensor] = {}
    outputs: list[Tensor] = []
    shape = inputs["input_ids"].shape
    deepest = max((p.layer for p in projections), default=-1)
    handles: list[Any] = []

    def wanted(states: Tensor) -> Tensor:
        whole = states.detach().reshape(*shape, -1)  # OPT's blocks flatten rows and tokens
        if at is None:
            return whole
        return whole[torch.arange(shape[0], device=whole.device), at.to(whole.device)]

    def keep_key(projection: Projection) -> Callable[[Tensor], None]:
        def keep(found: Tensor) -> None:
            keys[projection.layer] = found
            if output_of is None and projection.layer == deepest:
                raise StopForward

        return keep

    def keep_output(_module: nn.Module, _inputs: Any, output: Any) -> None:
        outputs.append(wanted(hidden_of(output)))
        raise StopForward

    try:
        for projection in projections:
            handles += projection.watch(wanted, keep_key(projection))
        if output_of is not None:
            handles.append(output_of.register_forward_hook(keep_output))
        with torch.no_grad():
            decoder.model(**inputs)
    except StopForward:
        pass
    finally:
        for handle in handles:
            handle.remove()
    unseen = [projection.name for projection in projections if projection.layer not in keys]
    if unseen:
        raise ModelError(f"the forward pass did not run {unseen}, which may have been replaced; create a new editor")
    return keys, outputs[0] if outputs else None


@contextmanager
def resume_above(decoder: Decoder, block: int) -> Iterator[dict[str, Any]]:
    """Makes the model's forward start above `block` in the context; masks, positions and head are unchanged.

    Args:
        decoder: the model.
        block: index of the last block that is skipped.

    Yields:
        A dictionary; set its entry `output` to the output of that block before each forward.
    """
    state: dict[str, Any] = {}
    with _replace_forward(decoder.blocks[: block + 1], lambda *_args, **_kwargs: state["output"]):
        yield state


@contextmanager
def end_at(decoder: Decoder, block: int) -> Iterator[None]:
    """Makes the blocks above `block` return its output unchanged in the context; they are not run or cached.

    Args:
        decoder: the model.
        block: index of the last block that is run.
    """
    state: dict[str, Any] = {}

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        state["output"] = output

    handle = decoder.blocks[block].register_forward_hook(keep)
    try:
        with _replace_forward(decoder.blocks[block + 1 :], lambda *_args, **_kwargs: state["output"]):
            yield
    finally:
        handle.remove()


@contextmanager
def _replace_forward(modules: Sequence[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    """Replaces the forward of each module inside the block."""
    originals = [module.__dict__.get("forward") for module in modules]
    try:
        for module in modules:
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, original in zip(modules, originals, strict=True):
            if original is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = original
