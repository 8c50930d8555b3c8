"""Base class of an edited layer: its exact weight, original weight, prior and name, and the checks of batches."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rlsedit_fast.errors import InputError
from rlsedit_fast.rls import checks
from rlsedit_fast.rls.columns import WHOLE, Columns
from rlsedit_fast.rls.master import Master
from rlsedit_fast.rls.prior import Prior
from rlsedit_fast.rls.results import Panel


class Layer:
    """A layer with an exact copy of its weight. Subclasses set the attributes declared here and write the weight."""

    _master: Master
    _original: Tensor
    _dtype: torch.dtype
    _prior: Prior
    _columns: Columns = WHOLE
    _name: str
    _edits: int
    _version: int

    @property
    def weight(self) -> Tensor:
        """The current `W [d_v, d_k]` in the layer's dtype, read-only.

        It is the live tensor, which keeps its storage for the life of the layer, except for a bfloat16 weight that is
        edited in place: then it is a new tensor joined from the two halves.
        """
        return self._master.read()

    @property
    def original(self) -> Tensor:
        """The original `W0 [d_v, d_k]`, in the narrower of its own dtype and the layer's dtype, read-only."""
        return self._original

    @property
    def device(self) -> torch.device:
        """The device of the weight."""
        return self._original.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of keys, values and the exact weight."""
        return self._dtype

    @property
    def key_width(self) -> int:
        """The width of a row of keys: `d_k`, or the number of columns that this process holds."""
        return self._original.shape[1]

    @property
    def value_width(self) -> int:
        """The width of a value, `d_v`."""
        return self._original.shape[0]

    def originals(self) -> list[Tensor]:
        """Returns the original weight, as the single block of a list."""
        return [self._original]

    def weights(self) -> list[tuple[Tensor, Tensor] | None]:
        """Returns the original and the current weight, as the single block of a list."""
        return [(self._original, self.weight)]

    @property
    def prior(self) -> Prior:
        """The prior of the layer."""
        return self._prior

    @property
    def name(self) -> str:
        """The name of the layer in error messages."""
        return self._name

    @property
    def columns(self) -> Columns:
        """The columns of the weight that this process holds."""
        return self._columns

    @property
    def edits(self) -> int:
        """The number of edit rows applied."""
        return self._edits

    @property
    def version(self) -> int:
        """A number that changes with every step; equal versions mean equal states."""
        return self._version

    @torch.no_grad()
    def outputs(self, keys: Tensor) -> Tensor:
        """Returns `K W^T [n, d_v]` of the current weight.

        Args:
            keys: `K [n, d_k]` in the dtype and on the device of the layer.
        """
        return self._columns.total(self._master.times(self._columns.part(keys)), "values")

    @torch.no_grad()
    def deviation(self) -> float:
        """Returns `||W - W0||_F`."""
        return self._columns.norm(self.weight - self._original)

    def _batch(self, keys: Tensor, weights: Tensor | None, *, least: int = 1, **others: Tensor) -> dict[str, Tensor]:
        """Checks shapes, dtypes and devices of a batch and casts it to the dtype of the state.

        Returns:
            `keys`, the other `[n, d_v]` arguments, and `weights` if they are given. Their numbers are not checked.
        """
        return self._columns.agree(
            lambda: self._cast(keys, weights, least, others), lambda given: (len(keys), "weights" in given)
        )

    def _cast(
        self, keys: Tensor, weights: Tensor | None, least: int, others: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        d_v, d_k = self._original.shape
        keys = self._columns.part(keys)
        checks.matrix("keys", keys, columns=d_k)
        count = keys.shape[0]
        if count < least:
            raise InputError("keys has no rows; pass at least one edit.")
        tensors = {"keys": keys, **others}
        for argument, value in others.items():
            checks.matrix(argument, value, rows=count, columns=d_v)
        if weights is not None:
            checks.vector("weights", weights, size=count)
            tensors["weights"] = weights
        for argument, value in tensors.items():
            checks.same_device(argument, value, self._original.device)
        return {argument: value.detach().to(self._dtype).contiguous() for argument, value in tensors.items()}

    def _check(self, given: Mapping[str, Tensor]) -> None:
        """Checks the numbers of a batch."""
        if given["keys"].shape[0]:
            self._columns.check(self._columns.numbers(given), given)

    def _check_count(self, count: int) -> None:
        if count > self._edits:
            raise InputError(f"keys has {count} rows, but {self._name} has {self._edits} edits; pass applied edits.")

    def _innovation_of(self, panel: Panel, innovation: Tensor) -> Tensor:
        return self._columns.alike(self._columns.agree(lambda: self._cast_innovation(panel, innovation)))

    def _cast_innovation(self, panel: Panel, innovation: Tensor) -> Tensor:
        if panel.version != self._version:
            raise InputError(
                f"the panel is not from the current state of {self._name} (version {panel.version}, current version "
                f"{self._version}); call project again."
            )
        checks.matrix("innovation", innovation, rows=panel.keys.shape[0], columns=self._original.shape[0])
        checks.same_device("innovation", innovation, self._original.device)
        return innovation.detach().to(self._dtype).contiguous()


def checked_arguments(
    weight: Tensor, prior: Prior, delay: int, dtype: torch.dtype | None, name: str, columns: Columns
) -> torch.dtype:
    """Checks the arguments of `RLSState` and returns the dtype of its computations."""
    checks.matrix("weight", weight)
    if 0 in weight.shape:
        raise InputError(f"weight has shape {list(weight.shape)}; sizes must be at least 1.")
    if dtype not in (None, torch.float32, torch.float64):
        raise InputError(f"dtype is {dtype}; expected float32 or float64.")
    if not isinstance(delay, int) or delay < 0:
        raise InputError(f"delay is {delay!r}; expected an integer that is at least 0.")
    dtype = dtype or dtype_of(weight)
    checks.finite(weight=weight.detach().to(dtype))
    if not isinstance(prior, Prior):
        raise InputError(f"prior is a {type(prior).__name__}; expected a Prior, such as Prior(lam=1.0).")
    prior.check_shape(weight.shape[0], columns.width(weight.shape[1]), name)
    return dtype


def dtype_of(weight: Tensor) -> torch.dtype:
    """Returns the default dtype of a state: float64 for a float64 weight, else float32."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32
