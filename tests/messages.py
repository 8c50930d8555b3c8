"""Counts what collectives of `torch.distributed` send, below the functions that call them."""

from __future__ import annotations

from collections import Counter

from torch.utils._python_dispatch import TorchDispatchMode

_ONE = ("broadcast_", "reduce_", "send")  # a process sends its tensor once, as in `rls.plan`
_NONE = ("recv_", "barrier")


class Messages(TorchDispatchMode):
    """The messages of this process in a block.

    Those that a forward pass of a divided model sends, and objects, count, too. An operation that is not known raises.

    Args:
        count: number of processes.

    Attributes:
        sent: bytes that this process sends, by operation, as `rls.plan` counts them.
        largest: elements of the largest tensor that was sent, received, or put together.
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()
        self.largest, self._count = 0, count

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace in ("c10d", "_c10d_functional"):
            self._add(function.__name__.split(".")[0], args)
        return function(*args, **(kwargs or {}))

    def _add(self, name: str, args) -> None:
        if name in ("wait_tensor", "_wrap_tensor_autograd"):
            return
        if name == "allgather_":
            (outputs,), (part,) = args[0], args[1]
            size, sent = sum(each.numel() for each in outputs), (self._count - 1) * part.nbytes
        elif name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
            size, sent = args[0].numel() * self._count, (self._count - 1) * args[0].nbytes
        elif name in ("all_reduce", "all_reduce_", "allreduce_"):
            (part,) = args[0] if isinstance(args[0], (list, tuple)) else (args[0],)
            size, sent = part.numel(), 2 * part.nbytes
        elif name in (*_ONE, *_NONE):
            (part,) = args[0] if isinstance(args[0], (list, tuple)) else (args[0],)
            size, sent = part.numel(), part.nbytes * (name in _ONE)
        else:
            raise NotImplementedError(f"messages of {name} are not counted")
        self.sent[name] += sent
        self.largest = max(self.largest, size)
