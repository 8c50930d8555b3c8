"""Mixtures of experts are edited, saved, reloaded and restored."""

from __future__ import annotations

import warnings

import pytest
import torch

import rlsedit_fast as rf
from rlsedit_fast.evaluation.scoring import score
from rlsedit_fast.models.passes import read_keys
from rlsedit_fast.rls import BlockState
from rlsedit_fast.world import RELATIONS, World

ANCHORS = [person.name + " speaks and plays the harp" for person in World.generate().people[60:160]]


def facts(count):
    edits = []
    for i, person in enumerate(World.generate().people[:count]):
        relation = RELATIONS[i % len(RELATIONS)]
        target = next(value for value in relation.values[i % 7 :] if value != person.facts[relation.name])
        edits.append(rf.Edit(relation.phrasings[0], person.name, target))
    return edits


EDITS = facts(20)


def make_config(**changes):
    return rf.EditConfig(
        layers=(2,),
        batch_size=5,
        contexts={"prefixes": ("",)},
        search={"clamp": 4.0, "steps": 12, "stop_nll": 1.0},
        fact_token="last",
        prior={"adherence": 0.9},
    ).replace(**changes)


def make_editor(model, tokenizer, store=None, **changes):
    editor = rf.Editor(model, tokenizer, config=make_config(**changes), store=store)
    if not editor.priors:
        editor.anchor(ANCHORS)
    return editor


def nlls(model, tokenizer, edits):
    return [s.nll for s in score(model, tokenizer, [(e.prompt.format(e.subject), e.target) for e in edits])]


def reached_experts(editor):
    """Returns the experts that the edited tokens reach."""
    (projection,) = editor.context.projections
    requests = editor.context.prepare(EDITS)
    found = set()
    for request in requests:
        for row in request.contexts:
            ids = torch.tensor([row.ids])
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
            keys, _ = read_keys(editor.context.decoder, [projection], inputs, at=torch.tensor([row.lookup]))
            found |= set(projection.layout.routing(keys[2]).flatten().tolist())
    return found


def check_edits(model, tokenizer, edits, tmp_path):
    """Applies 20 edits in 4 batches, saves and reloads the model, and takes the edits back."""
    start = {name: value.clone() for name, value in model.state_dict().items()}
    before = nlls(model, tokenizer, edits)
    editor = make_editor(model, tokenizer)
    (projection,) = editor.context.projections
    experts = reached_experts(editor)
    records = editor.edit(edits)
    after = nlls(model, tokenizer, edits)
    assert all(new < old for new, old in zip(after, before, strict=True))
    assert sum(record.realized for record in records) > 0.8 * len(records)

    for name, value in model.state_dict().items():
        if name == projection.stacked_name:
            changed = {e for e in range(projection.sizes.experts) if not torch.equal(value[e], start[name][e])}
            assert changed
            assert changed <= experts, "experts outside the keys' top-k changed"
        elif name not in projection.parameters:
            assert torch.equal(value, start[name]), f"{name} is not one of the edited weights"
        else:
            assert not torch.equal(value, start[name]), "the shared expert carries a part of the change"

    editor.save_pretrained(tmp_path / "model")
    again = type(model).from_pretrained(tmp_path / "model", dtype=model.dtype).eval()
    reloaded = again.state_dict()
    assert all(torch.equal(value, reloaded[name]) for name, value in model.state_dict().items())
    deviation = editor.deviation()[0]
    assert 0 < deviation.weight <= deviation.weight_bound
    for at in (2, 0, 3, 1):
        editor.undo([record.id for record in records[5 * at : 5 * at + 5]])
    assert all(torch.equal(value, start[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("name", "dtype"), [("qwen3_moe", torch.bfloat16), ("deepseek_v3", torch.float32)])
def test_edits_work_are_saved_and_undone(make_model, tokenizer, name, dtype, tmp_path):
    check_edits(make_model(name, dtype), tokenizer, EDITS, tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_edits_of_every_mixture_work_are_saved_and_undone(make_model, tokenizer, mixture, dtype, tmp_path):
    check_edits(make_model(mixture, dtype), tokenizer, EDITS, tmp_path)


def test_the_edited_layer_is_one_mixture_by_default(make_model, tokenizer):
    assert rf.Editor(make_model("qwen3_moe"), tokenizer).layers == (1,)
    editor = rf.Editor(make_model("qwen3_moe"), tokenizer, config=rf.EditConfig(layers=(1, 2)))
    assert editor.layers == (1, 2)


def test_several_mixtures_share_a_change(make_model, tokenizer):
    model = make_model("qwen3_moe")
    editor = make_editor(model, tokenizer, layers=(1, 2))
    start = {name: value.clone() for name, value in model.state_dict().items()}
    records = editor.edit(EDITS[:10])
    assert sum(record.realized for record in records) > 8
    assert all(layer.weight > 0 for layer in editor.status().layers)
    editor.consolidate()
    editor.undo([record.id for record in records])
    assert all(torch.equal(value, start[name]) for name, value in model.state_dict().items())


def test_gates_compare_a_mixture_with_its_unedited_weights(make_model, tokenizer):
    model = make_model("qwen3_moe")
    editor = make_editor(model, tokenizer)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    editor.edit(EDITS[:3])
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    with editor.unedited():
        assert all(torch.equal(value, start[name]) for name, value in model.state_dict().items())
    edited = [edit.filled_prompt for edit in EDITS[:3]]
    report = rf.Gates(unchanged=edited).check(editor)
    assert report.violated
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())


def test_a_store_restores_the_edits_bit_for_bit(make_model, tokenizer, tmp_path):
    model = make_model("qwen2_moe", torch.bfloat16)
    with make_editor(model, tokenizer, tmp_path / "store") as editor:
        editor.protect(["A sentence to protect"])
        editor.edit(EDITS[:10])
        editor.undo([3])
        editor.replace(5, "harp")
        objective, bound = editor.status().layers[0].objective, editor.deviation()[0]
        kept = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(rf.errors.InputError, match="cannot contain"):
            editor.save_adapter(tmp_path / "adapter", engine="vllm")
    other = make_model("qwen2_moe", torch.bfloat16)
    with rf.Editor(other, tokenizer, store=tmp_path / "store") as editor:
        assert all(torch.equal(value, kept[name]) for name, value in other.state_dict().items())
        assert editor.status().layers[0].objective == objective
        assert editor.deviation()[0] == bound
        editor.consolidate()
        editor.edit(EDITS[10:12])
        kept = {name: value.clone() for name, value in other.state_dict().items()}
    third = make_model("qwen2_moe", torch.bfloat16)
    with rf.Editor(third, tokenizer, store=tmp_path / "store") as editor:
        assert all(torch.equal(value, kept[name]) for name, value in third.state_dict().items())
        editor.undo(editor.select(last=100))
    assert isinstance(editor._session.layers.states[0], BlockState)


def test_edits_with_separate_covariances_are_stored_and_undone(make_model, tokenizer, tmp_path):
    model = make_model("qwen2_moe")
    start = {name: value.clone() for name, value in model.state_dict().items()}
    before = nlls(model, tokenizer, EDITS[:10])
    with make_editor(model, tokenizer, tmp_path / "store", experts="separate") as editor:
        assert editor.context.memory()[0].applied == 0
        editor.edit(EDITS[:10])
        after = nlls(model, tokenizer, EDITS[:10])
        assert all(new < old for new, old in zip(after, before, strict=True))
        deviation = editor.deviation()[0]
        assert 0 < deviation.weight <= deviation.weight_bound
        editor.undo([3])
        kept = {name: value.clone() for name, value in model.state_dict().items()}
    other = make_model("qwen2_moe")
    with rf.Editor(other, tokenizer, store=tmp_path / "store") as editor:
        assert all(torch.equal(value, kept[name]) for name, value in other.state_dict().items())
        editor.undo(editor.select(last=100))
        assert all(torch.equal(value, start[name]) for name, value in other.state_dict().items())


def test_a_delta_restores_the_edited_experts(make_model, tokenizer, tmp_path):
    from rlsedit_fast.export import apply_delta, changes_between

    for name in ("gpt_oss", "qwen2_moe"):
        base, edited = make_model(name, torch.bfloat16), make_model(name, torch.bfloat16)
        editor = make_editor(edited, tokenizer)
        editor.edit(EDITS[:2])
        report = editor.save_delta(tmp_path / f"{name}.safetensors")
        changed = changes_between(base, edited)
        assert [module.name for module in report.modules if module.changed] == [change.name for change in changed]
        assert any(change.stack for change in changed)
        apply_delta(base, tmp_path / f"{name}.safetensors")
        assert changes_between(base, edited) == []


@pytest.mark.parametrize("name", ["qwen2_moe", "gpt_oss", "llama4", "mixtral"])
def test_peft_loads_an_adapter_of_experts(name, make_model, tokenizer, tmp_path):
    peft = pytest.importorskip("peft")
    base, edited = make_model(name), make_model(name)
    editor = make_editor(edited, tokenizer)
    editor.edit(EDITS[:3])
    report = editor.save_adapter(tmp_path / "adapter")
    assert max(module.error for module in report.modules) < 1e-5
    ids = torch.arange(3, 39).view(3, 12)
    with torch.no_grad(), warnings.catch_warnings():
        for kind in (UserWarning, RuntimeWarning):  # of peft about missing or unexpected keys, among others
            warnings.simplefilter("error", kind)
        before = base(input_ids=ids).logits
        loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
        wanted = edited(input_ids=ids).logits
        assert (wanted - before).abs().max() > 1e-2
        torch.testing.assert_close(loaded(input_ids=ids).logits, wanted, rtol=1e-4, atol=1e-4)
        merged = loaded.merge_and_unload()
    for key, tensor in edited.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[key], tensor, rtol=1e-4, atol=1e-5)


def test_the_change_of_the_routing_is_measured(make_model, tokenizer):
    model = make_model("qwen3_moe", torch.bfloat16)
    editor = make_editor(model, tokenizer)
    assert editor.routing_change(ANCHORS[:5]) == {2: 0.0, 3: 0.0}
    records = editor.edit(EDITS[:5])
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    change = editor.routing_change(ANCHORS[:5])
    assert change[2] == 0.0, "the inputs of the first edited layer do not change"
    assert 0 < change[3] < 1
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    editor.undo([record.id for record in records])
    assert editor.routing_change(ANCHORS[:5]) == {2: 0.0, 3: 0.0}
    assert rf.Editor(make_model("llama"), tokenizer, config=make_config()).routing_change(["A text"]) == {}
    with pytest.raises(rf.errors.InputError, match="no texts"):
        editor.routing_change([])


def test_statistics_are_saved_and_checked(make_model, tokenizer, tmp_path):
    from rlsedit_fast.statistics import GivenTexts, KeyStatistics

    model = make_model("qwen2_moe")
    editor = rf.Editor(model, tokenizer, config=make_config())
    found = editor.statistics(GivenTexts(ANCHORS), held_out=0)
    moment = found.moments[2]
    assert int(moment.reached.sum()) == 2 * found.tokens
    found.save(tmp_path / "statistics.safetensors")
    loaded = KeyStatistics.load(tmp_path / "statistics.safetensors").moments[2]
    for name, tensor in moment.tensors().items():
        assert torch.equal(tensor, loaded.tensors()[name])
    assert (loaded.tokens, loaded.energy) == (moment.tokens, moment.energy)
    editor.anchor(tmp_path / "statistics.safetensors")
    # The outputs on the anchors, from the keys of all tokens.
    (keys,) = editor.context.text_keys(ANCHORS)
    layer = BlockState(editor.context.projections[0].blocks, editor.calibrate(EDITS[:3])[0])
    assert moment.energy == pytest.approx(float(layer.outputs(keys).square().sum() / len(keys)), rel=1e-4)
    torch.testing.assert_close(moment.shared, keys[:, 96:136].T @ keys[:, 96:136] / len(keys), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"stored_rows": "fp16"}, "stored_rows='full'"),
        ({"contexts": {"rows": "mean"}}, "contexts.rows='contexts'"),
        ({"rule": "memit", "same_subject": "separate"}, "set experts to one of 'split', 'shared', 'top'"),
        ({"rule": "memit", "same_subject": "separate", "experts": "shared"}, "no shared expert"),
    ],
)
def test_settings_that_mixtures_do_not_support_are_refused(make_model, tokenizer, changes, match):
    with pytest.raises(rf.errors.InputError, match=match):
        rf.Editor(make_model("qwen3_moe"), tokenizer, config=make_config(**changes))


def test_settings_for_experts_require_a_mixture_and_a_baseline(make_model, tokenizer):
    with pytest.raises(rf.errors.InputError, match="requires another rule"):
        make_config(experts="split")
    with pytest.raises(rf.errors.InputError, match="no mixture of experts is edited"):
        rf.Editor(make_model("llama"), tokenizer, config=make_config(rule="memit", experts="split"))


@pytest.mark.parametrize(
    "changes",
    [
        {"rule": "memit", "experts": "split"},
        {"rule": "memit", "experts": "shared"},
        {"rule": "alphaedit", "rule_options": {"null_share": 0.7}, "experts": "split"},
        {"rule": "memit", "experts": "top"},
    ],
)
def test_baselines_edit_experts(make_model, tokenizer, changes):
    model = make_model("qwen2_moe")
    start = {name: value.clone() for name, value in model.state_dict().items()}
    before = nlls(model, tokenizer, EDITS[:6])
    editor = make_editor(model, tokenizer, same_subject="separate", **changes)
    assert editor.config.effective_rows == "contexts"
    (plan,) = editor.context.memory()
    records = editor.edit(EDITS[:6])
    after = nlls(model, tokenizer, EDITS[:6])
    assert sum(after) < sum(before)
    assert all(record.state == "active" for record in records)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, start[name])}
    shared, routed = (f"model.layers.2.mlp.{name}" for name in ("shared_expert.down_proj.weight", "experts.down_proj"))
    assert changed == {"split": {shared, routed}, "shared": {shared}, "top": {routed}}[changes["experts"]]
    assert plan.state > 0
    with pytest.raises(rf.errors.InputError, match="cannot remove"):
        editor.undo([records[0].id])


def test_statistics_of_an_ordinary_layer_are_refused(make_model, tokenizer):
    from rlsedit_fast.statistics import KeyStatistics

    editor = rf.Editor(make_model("qwen3_moe"), tokenizer, config=make_config())
    with pytest.raises(rf.errors.InputError, match="not those of a mixture"):
        editor.anchor(KeyStatistics({2: torch.eye(96)}, 100, editor.fingerprint(), "other"))


def test_memory_counts_what_the_state_holds(make_model, tokenizer):
    editor = make_editor(make_model("qwen2_moe"), tokenizer)
    (plan,) = editor.context.memory()
    editor.edit(EDITS)
    state = editor._session.layers.states[0]
    squares = sum(block.nbytes for block in state._covariances._blocks.values())
    originals = sum(block.nbytes for block in state._weights._originals.values())
    assert squares + originals <= plan.state
    rows = state._rows
    held = sum(t.nbytes for t in (rows.keys, rows.projected, rows.start, rows.whitened))
    assert held == 20 * plan.applied
    assert 2 * rows.lower.numel() * 8 == 20 * 20 * plan.pairs
