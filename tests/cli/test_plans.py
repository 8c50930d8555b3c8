"""`rlsedit show` plans the memory of large models from their configs."""

from __future__ import annotations

import json

import pytest

from rlsedit_fast.cli import main

CONFIGS = {
    "Qwen3-30B-A3B": (
        "Qwen3MoeConfig",
        {"hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4}
        | {"head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}
        | {"intermediate_size": 6144, "vocab_size": 151936},
        (128, 8, 0, [2048, 768]),
    ),
    "gpt-oss-20b": (
        "GptOssConfig",
        {"hidden_size": 2880, "num_hidden_layers": 24, "num_attention_heads": 64, "num_key_value_heads": 8}
        | {"head_dim": 64, "num_local_experts": 32, "num_experts_per_tok": 4, "intermediate_size": 2880},
        (32, 4, 0, [2880, 2880]),
    ),
    "DeepSeek-V3": ("DeepseekV3Config", {}, (256, 8, 2048, [7168, 2048])),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_memory_of_a_large_mixture_is_planned_from_its_config(name, tmp_path, capsys):
    import transformers

    kind, settings, (experts, active, shared, shape) = CONFIGS[name]
    getattr(transformers, kind)(**settings, dtype="bfloat16").save_pretrained(tmp_path)
    assert main(["show", "--model", str(tmp_path), "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    (layer,) = out["layers"]
    assert (layer["experts"], layer["active"], layer["shared"], layer["shape"]) == (experts, active, shared, shape)
    d_v, width = shape
    blocks = experts + bool(shared)
    # Per block: W0 in bfloat16, the lower half of the exact weight, C0 in float32; a copy of the weights while writing.
    assert layer["state"] == blocks * (4 * d_v * width + 4 * width * width)
    assert layer["anchors"] == blocks * 4 * width * width
    assert layer["writing"] == blocks * 4 * d_v * width
    features = active * width + shared
    assert layer["applied"] == 3 * (4 * (2 * features + active) + 16 * d_v)
    assert main(["show", "--model", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert f"{experts} experts, {active} per token" in text
    assert "1,000 edits: " in text


def test_a_config_alone_shows_no_edits(tmp_path, capsys):
    import transformers

    transformers.LlamaConfig(num_hidden_layers=4).save_pretrained(tmp_path)
    assert main(["show", "--model", str(tmp_path)]) == 0
    assert "this is a plan" in capsys.readouterr().out
    one = ["--prompt", "{} is", "--subject", "A", "--target", "B"]
    assert main(["show", "--model", str(tmp_path), *one]) == 2
    assert "has no weights" in capsys.readouterr().err
