"""Export of edits separately from the base model: an exact delta file or a LoRA adapter."""

from rlsedit_fast.export.adapter import AdapterReport, ModuleFactors, write_adapter
from rlsedit_fast.export.changes import WeightChange, changes_between
from rlsedit_fast.export.checkpoint import write_checkpoint
from rlsedit_fast.export.delta import DeltaReport, ModuleDelta, apply_delta, write_delta

__all__ = [
    "AdapterReport",
    "DeltaReport",
    "ModuleDelta",
    "ModuleFactors",
    "WeightChange",
    "apply_delta",
    "changes_between",
    "write_adapter",
    "write_checkpoint",
    "write_delta",
]
