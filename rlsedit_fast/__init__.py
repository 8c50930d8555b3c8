"""Sequential knowledge editing of language models by recursive least squares (RLSEdit).

`Editor` edits a transformers model in place. `RLSState` is the solver alone and operates on tensors.
"""

from rlsedit_fast._version import __version__
from rlsedit_fast.data import Edit, EditFile, edits_from_lists, load_edits, read_edits, resolve
from rlsedit_fast.editing import (
    ContextConfig,
    EditConfig,
    Editor,
    EditRecord,
    LossConfig,
    PriorConfig,
    Status,
    ValueSearchConfig,
)
from rlsedit_fast.errors import (
    BackendError,
    GateError,
    InputError,
    ModelError,
    PriorError,
    ProcessError,
    RemovalError,
    RequestError,
    ResourceError,
    RLSEditError,
    ServerError,
    StoreError,
    UnstatedError,
    UpdateError,
)
from rlsedit_fast.evaluation.gates import Gates
from rlsedit_fast.rls import Prior, RLSState
from rlsedit_fast.statistics import KeyStatistics, SelfGenerated, TextFile

__all__ = [
    "BackendError",
    "ContextConfig",
    "Edit",
    "EditConfig",
    "EditFile",
    "EditRecord",
    "Editor",
    "GateError",
    "Gates",
    "InputError",
    "KeyStatistics",
    "LossConfig",
    "ModelError",
    "Prior",
    "PriorConfig",
    "PriorError",
    "ProcessError",
    "RLSEditError",
    "RLSState",
    "RemovalError",
    "RequestError",
    "ResourceError",
    "SelfGenerated",
    "ServerError",
    "Status",
    "StoreError",
    "TextFile",
    "UnstatedError",
    "UpdateError",
    "ValueSearchConfig",
    "__version__",
    "edits_from_lists",
    "load_edits",
    "read_edits",
    "resolve",
]
