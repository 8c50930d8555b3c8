"""Export of edits separately from the base model: an exact delta file, a LoRA adapter or a sparse patch."""

from rlsedit_fast.export.adapter import AdapterReport, ModuleFactors, write_adapter
from rlsedit_fast.export.changes import WeightChange, changes_between
from rlsedit_fast.export.checkpoint import write_checkpoint
from rlsedit_fast.export.delta import DeltaReport, ModuleDelta, apply_delta, write_delta
from rlsedit_fast.export.engines import VLLM_RANKS, Engine
from rlsedit_fast.export.patch import WeightPatch, patches_of, read_patch, write_patch

__all__ = [
    "VLLM_RANKS",
    "AdapterReport",
    "DeltaReport",
    "Engine",
    "ModuleDelta",
    "ModuleFactors",
    "WeightChange",
    "WeightPatch",
    "apply_delta",
    "changes_between",
    "patches_of",
    "read_patch",
    "write_adapter",
    "write_checkpoint",
    "write_delta",
    "write_patch",
]
