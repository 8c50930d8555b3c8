"""Patches of the weights of a `vllm.LLM`, with a stand-in for vLLM; tests/deploy runs the real one."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from rlsedit_fast.errors import ServerError
from rlsedit_fast.export import WeightChange, write_patch
from rlsedit_fast.serving import patch_llm

BASE = torch.arange(12.0).reshape(3, 4)
EDITED = torch.where(BASE % 5 == 2, -BASE, BASE)


@pytest.fixture
def patch(tmp_path):
    change = WeightChange("down_proj", BASE, EDITED, EDITED, transposed=False)
    write_patch([change], tmp_path / "patch.safetensors", base_fingerprint="0" * 64)
    return tmp_path / "patch.safetensors"


@pytest.fixture
def llm(monkeypatch):
    """A `vllm.LLM` on a CPU with a checkpoint of two weights."""
    checkpoint = {"up_proj.weight": torch.ones(2), "down_proj.weight": BASE.bfloat16()}
    loader = SimpleNamespace(get_all_weights=lambda _config, _model: checkpoint.items())
    worker = SimpleNamespace(
        vllm_config=SimpleNamespace(load_config=None, model_config=None),
        get_model=lambda: None,
        reload_weights=lambda weights_iterator: worker.loaded.update(weights_iterator),
        loaded={},
    )
    for name, fields in {
        "vllm": {},
        "vllm.platforms": {"current_platform": SimpleNamespace(is_cpu=lambda: True)},
        "vllm.model_executor": {},
        "vllm.model_executor.model_loader": {"get_model_loader": lambda _config: loader},
    }.items():
        module = ModuleType(name)
        vars(module).update(fields)
        monkeypatch.setitem(sys.modules, name, module)
    resets = []
    return SimpleNamespace(
        collective_rpc=lambda function, args: function(worker, *args),
        reset_prefix_cache=lambda: resets.append(1) or True,
        checkpoint=checkpoint,
        worker=worker,
        resets=resets,
    )


def test_on_a_cpu_the_checkpoint_is_loaded_with_the_changed_entries(llm, patch):
    patch_llm(llm, patch)
    assert torch.equal(llm.worker.loaded["down_proj.weight"], EDITED.bfloat16())
    assert torch.equal(llm.worker.loaded["up_proj.weight"], torch.ones(2))
    assert torch.equal(llm.checkpoint["down_proj.weight"], BASE.bfloat16())
    assert llm.resets == [1]


def test_patch_of_another_model_is_an_error(llm, patch):
    llm.checkpoint["down_proj.weight"] = torch.zeros(4, 3)
    with pytest.raises(ServerError, match=r"down_proj.weight has shape \[4, 3\] in the checkpoint and \[3, 4\]"):
        patch_llm(llm, patch)
    del llm.checkpoint["down_proj.weight"]
    with pytest.raises(ServerError, match=r"the checkpoint has no down_proj\.weight"):
        patch_llm(llm, patch)


def test_vllm_in_another_process_is_an_error_with_what_to_do(llm, patch):
    def refuse(function, args):
        raise TypeError("function is not serializable. Set VLLM_ALLOW_INSECURE_SERIALIZATION=1 to allow it")

    llm.collective_rpc = refuse
    with pytest.raises(ServerError, match="accepts no functions; nothing was changed") as error:
        patch_llm(llm, patch)
    assert "VLLM_ENABLE_V1_MULTIPROCESSING=0" in error.value.hint
