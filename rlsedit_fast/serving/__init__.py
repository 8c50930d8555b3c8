"""Loads edits into running inference servers: adapters and reloaded weights in vLLM and SGLang."""

from rlsedit_fast.serving.answers import StatedReport, count_stated
from rlsedit_fast.serving.http import Completion, Server
from rlsedit_fast.serving.offline import patch_llm, reload_llm
from rlsedit_fast.serving.sglang import SGLang
from rlsedit_fast.serving.vllm import VLLM

__all__ = ["VLLM", "Completion", "SGLang", "Server", "StatedReport", "count_stated", "patch_llm", "reload_llm"]
