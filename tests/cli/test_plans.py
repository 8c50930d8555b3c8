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


LLAMA = {"num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256}
DENSE = {
    "70B": ({"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80} | LLAMA, 2.06),
    "405B": (
        {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126}
        | {**LLAMA, "num_attention_heads": 128},
        7.09,
    ),
}


def save_llama(folder, **settings):
    import transformers

    transformers.LlamaConfig(**settings, dtype="bfloat16").save_pretrained(folder)
    return ["show", "--model", str(folder), "--layers", "4-8"]


@pytest.mark.parametrize("name", DENSE)
def test_a_plan_for_eight_devices_shows_what_each_holds_and_sends(name, tmp_path, capsys):
    settings, covariance = DENSE[name]
    d_v, d_k, depth = (settings[each] for each in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    show = save_llama(tmp_path, **settings)
    assert main([*show, "--devices", "8x80GB", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)["plan"]
    layers = plan["layers"]
    assert sum(layer["covariance"] for layer in layers) / 1e9 == pytest.approx(covariance, abs=0.005)
    assert layers[0]["original"] == layers[0]["master"] == 2 * d_v * d_k // 8
    # two norms of each layer and the last one are on every device
    every = 2 * d_v * (2 * depth + 1)
    head = d_v // settings["num_attention_heads"]
    attention = 2 * d_v * d_v + 2 * d_v * head * settings["num_key_value_heads"]
    divided = 2 * (depth * (attention + 3 * d_v * d_k) + 2 * d_v * settings["vocab_size"])
    assert plan["weights"] == every + divided // 8
    assert plan["peak"] == plan["weights"] + plan["state"] + plan["transient"]
    assert plan["transient"] > 12 * d_k**2
    assert plan["fits"] == (plan["peak"] <= 80e9)
    edits, rows, sent = plan["batch"]["edits"], plan["batch"]["rows"], plan["batch"]["sent"]
    assert sent["keys"] == 7 * (5 * rows + 2 * edits) * d_k // 8 * 4
    assert sent["read"] == 7 * (5 * rows + edits) * d_k // 8 * 2
    assert sum(sent.values()) < 6 * rows * 4 * (2 * d_k + 3 * d_v + 4 * rows + 1024 + 100)
    assert main([*show, "--devices", "8x80GB"]) == 0
    text = capsys.readouterr().out
    assert f"C {covariance:.3g} GB" in text
    assert ("fits; at least" if plan["fits"] else "does not fit; no number") in text
    assert plan["most"] == 8
    assert plan["fits"] or "divided over at most 8" in text


def test_the_smallest_number_of_devices_fits_and_half_of_it_does_not(tmp_path, capsys):
    show = save_llama(tmp_path, **DENSE["70B"][0])

    def plan(devices):
        assert main([*show, "--devices", devices, "--json"]) == 0
        return json.loads(capsys.readouterr().out)["plan"]

    smallest = plan("1x80GB")["smallest_count"]
    assert smallest > 1
    assert plan(f"{smallest}x80GB")["fits"]
    assert not plan(f"{smallest // 2}x80GB")["fits"]
    assert plan("8x1GB")["smallest_count"] is None


def test_devices_that_cannot_divide_the_model_are_refused(tmp_path, capsys):
    import transformers

    def refuse(expected, *options, show=None):
        assert main([*(show or llama), *options]) == 2
        assert expected in capsys.readouterr().err

    llama = save_llama(tmp_path / "llama", num_hidden_layers=10, num_attention_heads=32)
    refuse("3 devices do not divide the 32 attention heads", "--devices", "3x80GB")
    shared = save_llama(tmp_path / "shared", num_hidden_layers=10, num_attention_heads=32, num_key_value_heads=4)
    refuse("8 devices do not divide the 4 key value heads", "--devices", "8x80GB", show=shared)
    refuse("use 1, 2 or 4", "--devices", "6x80GB", show=shared)
    assert main([*shared, "--devices", "4x80GB"]) == 0
    capsys.readouterr()
    refuse("requires the rule rls", "--devices", "2x80GB", "--rule", "memit")
    refuse("edits cannot be shown", "--devices", "2x80GB", "--prompt", "{} is", "--subject", "A", "--target", "B")
    transformers.GPT2Config(n_layer=4).save_pretrained(tmp_path / "gpt2")
    gpt2 = ["show", "--model", str(tmp_path / "gpt2"), "--layers", "1"]
    refuse("GPT2LMHeadModel", "--devices", "2x80GB", show=gpt2)
    assert main([*gpt2, "--devices", "1x16GiB"]) == 0
    assert "1 device of 17.2 GB" in capsys.readouterr().out
    for wrong in ("8", "0x80GB", "8x80", "8x-1GB", "8x0GB", "x80GB"):
        with pytest.raises(SystemExit):
            main([*llama, f"--devices={wrong}"])
        assert "such as 8x80GB" in capsys.readouterr().err
