"""Models whose weights are divided over processes: the parts that this process holds, and what prevents editing them.

transformers divides a model with tensor parallelism into `DTensor` parameters. They are unwrapped here; everything else
works on plain tensors.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

from rlsedit_fast.errors import ModelError
from rlsedit_fast.models.tensor_parallel import refused_count
from rlsedit_fast.processes import ALONE, Group, Processes
from rlsedit_fast.rls.columns import WHOLE, Columns

_HOW = (
    "load it with tensor parallelism (`torchrun ... rlsedit edit --tp N`; Python: from_pretrained(..., "
    "distributed_config=DistributedConfig(tp_size=N)) under torchrun), or in one process with device_map='auto'"
)

_OTHERS = {
    "FSDPModule": "is wrapped by FSDP2 (fully_shard), which divides weights by rows and gathers them only in use",
    "FullyShardedDataParallel": "is wrapped by FullyShardedDataParallel, which flattens the weights",
    "PipelineIdentityLayer": "is divided into stages by pipeline parallelism, so that a process does not have all "
    "layers",
    "PipelineStage": "is a stage of a pipeline, so that a process does not have all layers",
    "DeepSpeedEngine": "is wrapped by DeepSpeed",
}
"""Names of classes by which a model is recognized, with the reason why it cannot be edited."""


def is_divided(tensor: object) -> bool:
    """Returns whether a tensor is a `DTensor`."""
    module = sys.modules.get("torch.distributed.tensor")  # its import takes time, and there is none without it
    return module is not None and isinstance(tensor, module.DTensor)


def held(tensor: Any) -> Tensor:
    """Returns the part of a tensor that this process holds, as a view; the tensor itself if it is not divided."""
    found: Tensor = tensor.to_local() if is_divided(tensor) else tensor
    return found


def whole(tensor: Any) -> Tensor:
    """Returns a tensor with the parts of all processes, which all call this; the tensor itself if it is not divided."""
    found: Tensor = tensor.full_tensor() if is_divided(tensor) else tensor
    return found


def processes_of(model: nn.Module, *, replicas: bool = False) -> Processes:
    """Returns the processes that hold a model together, or all processes, each of which holds the whole model.

    Raises:
        ModelError: the model is divided in a way that cannot be edited, see `check_division`, or over a number of
            processes that does not divide its attention heads; or it is divided, and `replicas` is True.
        InputError: `replicas` is True, and no process group is initialized.
    """
    check_division(model)
    parameters: list[Any] = list(model.parameters())
    meshes = (one.device_mesh for one in parameters if is_divided(one))
    mesh = next((mesh for mesh in meshes if mesh.size() > 1), None)
    if replicas and mesh is not None:
        raise ModelError(
            "data_parallel=True: the model is divided over the processes; expected the whole model in each",
            hint="use either --tp or --dp (Python: load the model without tensor parallelism, or omit data_parallel)",
        )
    if replicas:
        return Group(replicas=True)
    if mesh is not None and (why := refused_count(model, mesh.size())):
        raise ModelError(
            f"the model was divided over {mesh.size()} processes, which {why}",
            hint="start another number of processes, or give each a copy of the model (--dp N; Python: data_parallel)",
        )
    return ALONE if mesh is None else Group(mesh.get_group())


def check_division(model: nn.Module) -> None:
    """Checks that a model is in one process, or divided over several by tensor parallelism.

    Raises:
        ModelError: it is not, with the way that works.
    """
    if type(model).__name__ == "DistributedDataParallel":
        raise ModelError("the model is wrapped by DistributedDataParallel; pass the model inside, model.module")
    for module in model.modules():
        kinds = {kind.__name__ for kind in type(module).__mro__}
        if found := next((name for name in _OTHERS if name in kinds), None):
            raise ModelError(f"{type(model).__name__} {_OTHERS[found]}; such a model is not edited", hint=_HOW)
    parameters: list[tuple[str, Any]] = list(model.named_parameters())
    for name, parameter in parameters:
        if is_divided(parameter) and parameter.device_mesh.ndim > 1:
            raise ModelError(
                f"{name} is divided over a device mesh of {parameter.device_mesh.ndim} dimensions; expected tensor "
                "parallelism alone",
                hint=_HOW,
            )


def columns_of(name: str, module: Any) -> Columns:
    """Returns the columns of the weight of a linear module that this process holds.

    Args:
        name: dotted name of the module.
        module: `nn.Linear` or `Conv1D`.

    Raises:
        ModelError: the weight is divided in another way than by columns.
    """
    weight = module.weight
    if not is_divided(weight):
        if isinstance(module, nn.Linear) and tuple(weight.shape) != (module.out_features, module.in_features):
            raise ModelError(
                f"{name} has outputs of width {module.out_features} and inputs of width {module.in_features}, and a "
                f"plain weight of shape {list(weight.shape)}: other code divided it, or this version of transformers "
                "does not mark divided weights; update transformers for tensor parallelism (5.24 was tested)"
            )
        return WHOLE
    if weight.device_mesh.size() == 1 or all(placement.is_replicate() for placement in weight.placements):
        return WHOLE
    (placement,) = weight.placements
    if type(placement).__name__ != "Shard" or placement.dim % weight.ndim != 1 or not isinstance(module, nn.Linear):
        raise ModelError(
            f"{name} is divided as {placement}; an edited projection must be divided by columns (`rowwise` in the plan "
            "of transformers)",
            hint=_HOW,
        )
    from rlsedit_fast.rls.sharded import ShardedColumns

    return ShardedColumns(held(weight.detach()), weight.device_mesh.get_group())
