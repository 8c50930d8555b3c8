"""Edits are applied completely or not at all, and can be undone."""

import math
from dataclasses import replace

import pytest
import torch

import rlsedit_fast as rf
from rlsedit_fast import ops
from rlsedit_fast.editing import context
from rlsedit_fast.editing.search import value_search
from rlsedit_fast.errors import InputError, ModelError, RequestError, RLSEditError, UpdateError
from rlsedit_fast.evaluation.cases import world_cases
from rlsedit_fast.evaluation.scoring import score
from rlsedit_fast.world import World, load_demo_model

NAMES = ["Toze Lado Rekuno", "Fado Veta Voluvu", "Lado Toze", "Veta Fado Rekuno", "Voluvu Lado", "Toze Fado Veta"]
EDITS = [
    rf.Edit("{} lives in", NAMES[0], "Port Alder"),
    rf.Edit("The native language of {} is", NAMES[1], "Kubeish"),
    rf.Edit("{} works as a", NAMES[2], "mason"),
    rf.Edit("{} plays the", NAMES[3], "organ", weight=2.0),
    rf.Edit("{} lives in", NAMES[4], "Old Corran"),
    rf.Edit("Friends love to hear {} play the", NAMES[5], "clarinet"),
]
ANCHORS = [f"{a} lives in Port Garnet . {b} speaks Nafiish ." for a in NAMES for b in NAMES[::-1]]


def config(**changes):
    base = {
        "layers": (1, 2),
        "batch_size": 2,
        "contexts": {"prefixes": ("", "People speak .")},
        "search": {"clamp": 4.0},
        "fact_token": "last",
        "prior": {"adherence": 0.9},
    }
    return rf.EditConfig(**base).replace(**changes)


def make_editor(model, tokenizer, **changes):
    editor = rf.Editor(model, tokenizer, config=config(**changes))
    editor.anchor(ANCHORS)
    return editor


def weights(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_same(before, model):
    now = model.state_dict()
    assert all(torch.equal(value, now[name]) for name, value in before.items())


def target_nll(model, tokenizer, edits=EDITS):
    return [s.nll for s in score(model, tokenizer, [(e.prompt.replace("{}", e.subject), e.target) for e in edits])]


@pytest.mark.parametrize("key_rows", ["contexts", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_edits_change_the_model_and_undo_restores_the_weights(make_model, tokenizer, name, dtype, key_rows):
    model = make_model(name, dtype)
    before, start = target_nll(model, tokenizer), weights(model)
    editor = make_editor(model, tokenizer, contexts={"rows": key_rows})
    records = editor.edit(EDITS)
    assert all(after < was for after, was in zip(target_nll(model, tokenizer), before, strict=True))
    assert [r.batch for r in records] == [1, 1, 2, 2, 3, 3]
    changed = [key for key, value in start.items() if not torch.equal(value, model.state_dict()[key])]
    assert len(changed) == 2, "only the two edited projections change"
    assert editor.history() == records
    editor.undo([records[4].id, records[0].id])
    editor.undo([r.id for r in records if r.id not in (1, 5)])
    assert {r.state for r in editor.history()} == {"undone"}
    assert_same(start, model)


@pytest.mark.parametrize("key_rows", ["contexts", "mean"])
def test_undo_gives_the_state_without_the_undone_edits(make_model, tokenizer, key_rows):
    """A float64 solution for the keys and values of the remaining edits gives the same weights."""
    from rlsedit_fast.rls.reference import solve_all

    model = make_model("llama")
    editor = make_editor(model, tokenizer, contexts={"rows": key_rows})
    records = editor.edit(EDITS)
    editor.undo([records[1].id, records[4].id])
    kept = editor._session.ledger.rows([r.id for r in editor.history() if r.state == "active"])
    for layer, state in enumerate(editor._session.layers.states):
        keys = torch.cat([rows.keys[layer] for rows in kept])
        values = torch.cat([rows.values[layer] for rows in kept])
        rows = 2 if key_rows == "contexts" else 1
        importance = torch.tensor([r.weight / rows for r in editor.history() if r.state == "active"])
        weight, _, _ = solve_all(state.original, state.prior, keys, values, importance.repeat_interleave(rows))
        error = (state.weight.double() - weight).norm() / weight.norm()
        assert float(error) < 1e-4
        projection = editor.context.projections[layer]
        assert torch.equal(projection.weight, state.weight)


def test_the_first_batch_realizes_the_adherence(make_model, tokenizer):
    model = make_model("llama")
    editor = make_editor(model, tokenizer, prior={"adherence": 0.8}, batch_size=6)
    records = editor.edit([rf.Edit(e.prompt, e.subject, e.target) for e in EDITS])
    mean = sum(r.realized for r in records) / len(records)
    assert abs(mean - 0.8) < 0.1


def test_a_higher_adherence_realizes_more_with_a_weaker_prior(make_model, tokenizer):
    priors, realized = [], []
    for adherence in (0.5, 0.99):
        editor = make_editor(make_model("llama"), tokenizer, prior={"adherence": adherence}, batch_size=6)
        realized.append(sum(r.realized for r in editor.edit(EDITS)))
        priors.append(editor.priors[0])
    assert realized[1] > realized[0] + 1
    assert priors[1].mu < priors[0].mu
    assert priors[1].lam < priors[0].lam


def test_explicit_lam_and_mu_override_calibration(make_model, tokenizer):
    for given in ({"lam": 0.3, "mu": 7.0}, {"lam": 0.3}, {"mu": 7.0}):
        editor = make_editor(make_model("llama"), tokenizer, prior=given)
        for prior in editor.calibrate(EDITS):
            for name, value in given.items():
                assert getattr(prior, name) == value
            assert prior.lam > 0
            assert prior.mu > 0


def test_a_given_mu_needs_no_pilot(make_model, tokenizer, monkeypatch):
    editor = make_editor(make_model("llama"), tokenizer, prior={"mu": 7.0})
    monkeypatch.setattr("rlsedit_fast.editing.session.Pilot", None)
    assert [prior.mu for prior in editor.calibrate(EDITS)] == [7.0] * len(editor.layers)


def test_mu_is_calibrated_for_a_given_lam(make_model, tokenizer):
    editor = make_editor(make_model("llama"), tokenizer, prior={"lam": 0.01, "adherence": 0.8}, batch_size=6)
    records = editor.edit([rf.Edit(e.prompt, e.subject, e.target) for e in EDITS])
    assert abs(sum(r.realized for r in records) / len(records) - 0.8) < 0.1


def test_without_anchors_only_lam_regularizes_and_a_warning_is_logged(make_model, tokenizer, caplog):
    editor = rf.Editor(make_model("llama"), tokenizer, config=config())
    priors = editor.calibrate(EDITS)
    assert "no anchors" in caplog.text
    assert all(p.mu == 0 and p.lam > 0 for p in priors)


def test_deviation_stays_within_its_bound(make_model, tokenizer):
    editor = make_editor(make_model("gpt2"), tokenizer)
    assert editor.deviation() == []
    editor.edit(EDITS)
    for layer in editor.deviation():
        assert 0 < layer.weight <= layer.weight_bound
        assert math.isfinite(layer.anchor_bound)


def test_replace_writes_the_new_target_and_keeps_the_history(make_model, tokenizer):
    model = make_model("llama")
    editor = make_editor(model, tokenizer)
    editor.edit(EDITS)
    new = rf.Edit(EDITS[0].prompt, EDITS[0].subject, "Lake Briar")
    before = target_nll(model, tokenizer, [new])[0]
    record = editor.replace(1, target="Lake Briar")
    assert target_nll(model, tokenizer, [new])[0] < before
    assert [r.state for r in editor.history()] == ["replaced", *["active"] * 6]
    assert record == editor.history()[-1]
    with pytest.raises(InputError, match=r"ids 1 \(replaced\): not active"):
        editor.undo(1)


@pytest.mark.parametrize("key_rows", ["contexts", "mean"])
def test_a_failure_in_the_last_layer_changes_neither_model_nor_states(make_model, tokenizer, monkeypatch, key_rows):
    model = make_model("llama")
    editor = make_editor(model, tokenizer, contexts={"rows": key_rows})
    editor.edit(EDITS[:2])
    start = weights(model)
    states = [(s.weight.clone(), s.precision_inverse(), s.objective, s.edits) for s in editor._session.layers.states]

    def fails(*_args):
        raise UpdateError("made to fail")

    monkeypatch.setattr(editor._session.layers.states[-1], "update_projected", fails)
    with pytest.raises(UpdateError, match="made to fail"):
        editor.edit(EDITS[2:4])
    monkeypatch.undo()
    assert_same(start, model)
    for state, (weight, inverse, objective, edits) in zip(editor._session.layers.states, states, strict=True):
        assert torch.equal(state.weight, weight)
        assert torch.equal(state.precision_inverse(), inverse)
        assert (state.objective, state.edits) == (objective, edits)
    assert len(editor.history()) == 2
    editor.edit(EDITS[2:4])
    assert len(editor.history()) == 4


def test_a_failed_replace_keeps_the_old_edit(make_model, tokenizer, monkeypatch):
    model = make_model("llama")
    editor = make_editor(model, tokenizer)
    editor.edit(EDITS)
    start = weights(model)

    def fails(*_args, **_kwargs):
        raise UpdateError("made to fail")

    monkeypatch.setattr(value_search, "search_within_memory", fails)
    with pytest.raises(UpdateError):
        editor.replace(3, target="pilot")
    assert_same(start, model)
    assert [r.state for r in editor.history()] == ["active"] * 6


def test_the_error_of_a_later_batch_states_how_many_edits_are_applied(make_model, tokenizer, monkeypatch):
    model = make_model("llama")
    editor = make_editor(model, tokenizer)
    real, calls = value_search.search_within_memory, []

    def fails_third(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise UpdateError("made to fail")
        return real(*args, **kwargs)

    monkeypatch.setattr(value_search, "search_within_memory", fails_third)
    with pytest.raises(UpdateError, match="first 4 of 6"):
        editor.edit(EDITS)
    assert len(editor.history()) == 4


def test_a_failed_first_batch_leaves_the_editor_unused(make_model, tokenizer, monkeypatch):
    model = make_model("llama")
    editor = make_editor(model, tokenizer)

    for error in (UpdateError, KeyboardInterrupt):

        def fails(*_args, error=error, **_kwargs):
            raise error("made to fail")

        monkeypatch.setattr(value_search, "search_within_memory", fails)
        with pytest.raises(error):
            editor.edit(EDITS)
        monkeypatch.undo()
        assert editor.priors == []
    editor.anchor(ANCHORS[:6])
    assert len(editor.edit(EDITS)) == 6


BAD = [
    ([], "no edits"),
    ([rf.Edit("{} lives in", "", "Port Alder")], "the subject is empty; name the words that"),
    ([rf.Edit("{} lives in", "Lado", " ")], "target ' ' is empty"),
    ([rf.Edit("He lives in", "Lado", "Port Alder")], "contains neither {} nor the subject"),
    ([rf.Edit("{} and {}", "Lado", "Port Alder")], "contains {} twice; keep it where the model is edited"),
    ([rf.Edit("{} lives in", "Lado", "Port Alder", weight=0.0)], "weight: expected a number from .*, got 0.0"),
    ([rf.Edit("{} lives in", "Lado", "Port Alder", weight=float("nan"))], "weight: expected a number from .*, got nan"),
    ([rf.Edit("{} " + "speaks " * 100, "Lado", "Port Alder")], "the model supports 64"),
    ([rf.Edit("{} lives in", 3, "Port Alder")], "subject=3"),
    (["Lado lives in Port Alder"], "expected an Edit"),
]


@pytest.mark.parametrize(("edits", "message"), BAD)
def test_invalid_edits_raise_and_change_nothing(make_model, tokenizer, edits, message):
    model = make_model("llama")
    editor = make_editor(model, tokenizer)
    editor.edit(EDITS[:2])
    start, history = weights(model), editor.history()
    with pytest.raises(RequestError, match=message):
        editor.edit([*EDITS[2:4], *edits] if edits else edits)
    if edits:
        with pytest.raises(RequestError, match=f"the edit is invalid; nothing was modified: .*{message}"):
            editor.edit(edits)
    assert_same(start, model)
    assert editor.history() == history


def test_the_error_names_all_invalid_edits(make_model, tokenizer):
    editor = make_editor(make_model("llama"), tokenizer)
    with pytest.raises(RequestError, match=r"(?s)2 of 4 .*edit 2: .*edit 4: "):
        editor.edit([EDITS[0], rf.Edit("x", "y", "z"), EDITS[1], rf.Edit("{} is", "Lado", "")])


@pytest.mark.parametrize("layer", [1, 3])
def test_nan_in_the_model_raises_and_changes_nothing(make_model, tokenizer, layer):
    """In an edited layer the constructor detects it; in another layer the value search does."""
    model = make_model("llama")
    with torch.no_grad():
        model.model.layers[layer].mlp.down_proj.weight[0, 0] = float("nan")
    if layer == 1:
        with pytest.raises(InputError, match="NaN/Inf"):
            rf.Editor(model, tokenizer, config=config())
        return
    editor = make_editor(model, tokenizer)
    start = weights(model)
    with pytest.raises(RLSEditError, match="NaN/Inf"):
        editor.edit(EDITS)
    now = model.state_dict()
    assert all(torch.equal(value.nan_to_num(), now[key].nan_to_num()) for key, value in start.items())
    assert editor.history() == []


def test_invalid_settings_raise(make_model, tokenizer):
    for changes, message in [
        ({"layers": ()}, "layers"),
        ({"layers": (1, 1)}, "each given once"),
        ({"prior": {"adherence": 1.0}}, "adherence"),
        ({"contexts": {"rows": "each"}}, "rows='each'"),
        ({"fact_token": "middle"}, "fact_token"),
        ({"batch_size": 0}, "batch_size"),
        ({"search": {"clamp": 0.0}}, "clamp"),
        ({"unconverged": "drop"}, "unconverged='drop'"),
        ({"search": {"at_once": 0}}, "at_once"),
        ({"contexts": {"samples": -1}}, "samples"),
        ({"contexts": {"sample_tokens": 0}}, "sample_tokens"),
        ({"prior": {"lam": -1.0}}, "lam"),
        ({"prior": {"mu": math.inf}}, "mu"),
        ({"prior": {"ridge": -0.1}}, "ridge"),
        ({"search": {"kl_prompts": ("who is",)}}, "kl_prompts"),
        ({"contexts": {"prefixes": ()}}, "prefixes"),
        ({"contexts": {"prefixes": ("So .",)}}, "expected '' first"),
    ]:
        with pytest.raises(InputError, match=message):
            config(**changes)
    with pytest.raises(ModelError, match="0 to 3"):
        rf.Editor(make_model("llama"), tokenizer, config=config(layers=(4,)))
    with pytest.raises(InputError, match=r"mu=2\.0"):
        rf.Editor(make_model("llama"), tokenizer, config=config(prior={"mu": 2.0})).edit(EDITS)


def test_anchors_and_priors_are_fixed_after_the_first_edit(make_model, tokenizer):
    editor = make_editor(make_model("llama"), tokenizer)
    editor.edit(EDITS[:1])
    with pytest.raises(InputError, match=r"anchor\(\)"):
        editor.anchor(ANCHORS)
    with pytest.raises(InputError, match=r"calibrate\(\)"):
        editor.calibrate(EDITS)
    with pytest.raises(InputError, match="anchor texts"):
        rf.Editor(make_model("llama"), tokenizer, config=config()).anchor([])


def test_default_layers_depend_on_the_depth():
    assert [rf.EditConfig().layers_for(depth) for depth in (1, 4, 12, 30)] == [
        (0,),
        (0, 1),
        (1, 2, 3),
        (1, 2, 3, 4, 5, 6, 7),
    ]


def test_a_saved_checkpoint_loads_with_transformers(model, tokenizer, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    editor = make_editor(model, tokenizer)
    editor.edit(EDITS[:2])
    editor.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    encoded = AutoTokenizer.from_pretrained(tmp_path)("Toze Lado Rekuno lives in", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(again(encoded["input_ids"]).logits, model(encoded["input_ids"]).logits)


def test_an_editor_from_pretrained_edits_a_checkpoint(make_model, tokenizer, tmp_path):
    make_model("llama").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    editor = rf.Editor.from_pretrained(tmp_path, config=config(), dtype=torch.bfloat16)
    assert editor.model.dtype == torch.bfloat16
    editor.anchor(ANCHORS)
    assert editor.edit(EDITS[:1])[0].state == "active"


def test_the_master_weight_has_the_bits_that_bf16_loses(make_model, tokenizer):
    """The model's bf16 weight is the float32 master weight rounded once, not a sum of rounded steps."""
    model = make_model("llama", torch.bfloat16)
    editor = make_editor(model, tokenizer, batch_size=1)
    editor.edit(EDITS)
    for projection, state in zip(editor.context.projections, editor._session.layers.states, strict=True):
        assert state.weight.dtype == torch.float32
        assert torch.equal(projection.weight, ops.split(state.weight)[0])  # rounds like the master weight
        assert not torch.equal(projection.weight.float(), state.weight)


def test_training_mode_and_requires_grad_do_not_change(make_model, tokenizer):
    model = make_model("llama").train()
    make_editor(model, tokenizer).edit(EDITS[:1])
    assert model.training
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.gpu
@pytest.mark.parametrize("key_rows", ["contexts", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_on_a_gpu_is_edited_and_restored(make_model, tokenizer, dtype, key_rows):
    model = make_model("llama", dtype).cuda()
    start, before = weights(model), target_nll(model, tokenizer)
    editor = make_editor(model, tokenizer, contexts={"rows": key_rows})
    records = editor.edit(EDITS)
    assert all(after < was for after, was in zip(target_nll(model, tokenizer), before, strict=True))
    assert all(layer.weight <= layer.weight_bound for layer in editor.deviation())
    editor.undo([record.id for record in records])
    assert_same(start, model)


def protected_change(make_model, tokenizer, prompts, weight=1.0, after=False):
    """Returns the change of the outputs of the first edited layer on the protected prompts, and the editor."""
    model = make_model("llama")
    editor = make_editor(model, tokenizer)
    if prompts and not after:
        assert editor.protect(prompts, weight=weight) > len(prompts)
    editor.calibrate(EDITS)
    if prompts and after:
        editor.protect(prompts, weight=weight)
    editor.edit(EDITS)
    (layer, _) = editor._session.layers.states
    keys = editor.context.text_keys(PROTECTED)[0]
    return float((layer.outputs(keys) - keys @ layer.original.T).norm()), editor


PROTECTED = ["Rekuno Veta plays the organ .", "Voluvu Toze lives in Old Corran ."]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_protect_changes_no_weight(make_model, tokenizer, dtype):
    model = make_model("llama", dtype)
    editor = make_editor(model, tokenizer)
    start = weights(model)
    editor.protect(PROTECTED * 20)
    editor.calibrate(EDITS)
    assert_same(start, model)
    editor.edit(EDITS)
    edited = weights(model)
    editor.protect(PROTECTED)
    assert_same(edited, model)


@pytest.mark.parametrize("after", [False, True])
def test_protected_prompts_keep_their_outputs(make_model, tokenizer, after):
    unprotected, _ = protected_change(make_model, tokenizer, [])
    protected, editor = protected_change(make_model, tokenizer, PROTECTED, weight=100.0, after=after)
    assert protected < 0.3 * unprotected
    start = [state.original for state in editor._session.layers.states]
    editor.undo([record.id for record in editor.history()])
    for state, weight in zip(editor._session.layers.states, start, strict=True):
        assert (state.weight - weight).norm() <= 1e-5 * weight.norm()
        assert state.edits > 10, "undo keeps the protected rows"


def test_invalid_prompts_to_protect_raise(make_model, tokenizer):
    editor = make_editor(make_model("llama"), tokenizer)
    for prompts, weight, message in (
        ([], 1.0, "no texts were given"),
        (["Lado", " "], 1.0, "text 2 of 2 is blank"),
        (["a " * 99], 1.0, "text 1 of 1, .* tokens, and the model supports 64"),
    ):
        with pytest.raises(InputError, match=message):
            editor.protect(prompts, weight=weight)
    with pytest.raises(InputError, match=r"weight: expected a number from .*, got 0;"):
        editor.protect(PROTECTED, weight=0)


@pytest.mark.parametrize(
    "modify",
    [
        lambda model: model.bfloat16(),
        lambda model: model.load_state_dict(model.state_dict()),
        lambda model: model.model.layers[1].mlp.down_proj.weight.mul_(2),
        lambda model: setattr(model.model.layers[1].mlp, "down_proj", torch.nn.Linear(96, 64, bias=False)),
    ],
    ids=["cast", "loaded", "scaled", "replaced"],
)
def test_weights_modified_by_other_code_raise(make_model, tokenizer, modify):
    """Otherwise the editor would write into an unused tensor, or add to unknown changes."""
    model = make_model("llama")
    editor = make_editor(model, tokenizer)
    editor.edit(EDITS[:2])
    with torch.no_grad():
        modify(model)
    before = weights(model)
    for action in (lambda: editor.edit(EDITS[2:4]), lambda: editor.undo(1), lambda: editor.protect(PROTECTED)):
        with pytest.raises(ModelError, match="create a new editor"):
            action()
    assert_same(before, model)
    assert len(editor.history()) == 2


@pytest.mark.parametrize("layer", [0, 1])
def test_a_weight_outside_the_range_of_fp16_rolls_the_batch_back(make_model, tokenizer, layer):
    model = make_model("llama", torch.float16)
    editor = make_editor(model, tokenizer)
    editor.edit(EDITS[:2])
    start = weights(model)
    state = editor._session.layers.states[layer]
    real = state.update_projected

    def overflowing(panel, innovation):
        return real(panel, innovation * 1e7)

    state.update_projected = overflowing
    with pytest.raises(UpdateError, match=r"range of torch\.float16"):
        editor.edit(EDITS[2:4])
    assert_same(start, model)


def test_the_master_weight_of_a_bf16_model_takes_two_extra_bytes_per_element(make_model, tokenizer):
    editor = make_editor(make_model("llama", torch.bfloat16), tokenizer)
    editor.edit(EDITS[:2])
    for projection, state in zip(editor.context.projections, editor._session.layers.states, strict=True):
        weight, extra = state._master.tensors
        assert weight.data_ptr() == projection.weight.data_ptr()
        assert extra.nbytes == 2 * projection.weight.numel()


def test_sampled_contexts_depend_on_the_model_and_the_seed_and_are_kept_in_the_settings(make_model, tokenizer):
    def contexts(name="llama", **changes):
        editor = rf.Editor(
            make_model(name), tokenizer, config=config(contexts={"samples": 4, "sample_tokens": 6, **changes})
        )
        rows = editor.context.prepare(EDITS[:1])[0].contexts
        prefixes = editor.config.contexts.prefixes
        starts = [tokenizer(prefix)["input_ids"] for prefix in prefixes]
        begins = [row.ids[: len(start)] == start for row, start in zip(rows, starts, strict=True)]
        assert all(begins)
        return prefixes

    state = torch.get_rng_state()
    first = contexts()
    assert torch.equal(torch.get_rng_state(), state)
    assert first[:2] == ("", "People speak .")
    assert len(first) == 6
    assert all(1 <= len(prefix.split()) <= 6 for prefix in first[2:])
    assert contexts() == first
    assert contexts(seed=1) != first
    assert contexts("gpt2") != first


def test_duplicate_and_blank_sampled_contexts_are_dropped_with_a_warning(make_model, tokenizer, caplog, monkeypatch):
    from rlsedit_fast.models.generation import Sample

    drawn = [Sample([1, 30, 31], []), Sample([1, 30, 31], []), Sample([1], [])]
    monkeypatch.setattr(context, "sample", lambda *_args, **_options: drawn)
    editor = rf.Editor(make_model("llama"), tokenizer, config=config(contexts={"samples": 3}))
    assert len(editor.config.contexts.prefixes) == 3
    assert "1 of 3 sampled context prefixes are used" in caplog.text


def test_the_number_of_edits_searched_together_does_not_change_the_result(make_model, tokenizer, monkeypatch):

    real, sizes, found = value_search.search_values, [], []

    def counted(site, requests, *rest):
        sizes.append(len(requests))
        return real(site, requests, *rest)

    monkeypatch.setattr(value_search, "search_values", counted)
    for at_once in (None, 2):
        model = make_model("llama")
        make_editor(model, tokenizer, batch_size=6, search={"at_once": at_once}).edit(EDITS)
        found.append(weights(model))
    assert sizes == [6, 2, 2, 2]
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-3, atol=1e-4)


def test_a_tokenizer_of_another_model_raises(make_model, tokenizer):
    from rlsedit_fast.models.projections import find_decoder

    model = make_model("llama")
    model.resize_token_embeddings(100)
    assert len(find_decoder(model).projections) == 4
    with pytest.raises(
        InputError, match=f"the tokenizer has {tokenizer.vocab_size} tokens and the model 100 embeddings"
    ):
        rf.Editor(model, tokenizer, config=config())


def test_pending_rows_are_folded_after_each_batch(monkeypatch, caplog):
    """The cost of a batch does not grow. If folding fails, the rows stay pending and a warning is logged."""
    model, tokenizer = load_demo_model()
    config = rf.EditConfig(layers=(0,), contexts={"prefixes": ("",)}, prior={"lam": 0.1}, batch_size=5, delay=8)
    editor = rf.Editor(model, tokenizer, config=config)
    edits = [case.edit for case in world_cases(World.generate(), 40, 0)]
    pending: list[int] = []
    editor.edit(edits[:30], on_batch=lambda _records: pending.append(len(editor._session.layers.states[0]._pending)))
    assert max(pending) <= 8
    assert pending.count(0) >= 2

    def fails(*_args):
        raise RuntimeError("no more memory")

    monkeypatch.setattr(editor._session.layers.states[0], "_downdate", fails)
    assert len(editor.edit(edits[30:])) == 10
    assert "the rows stay pending: no more memory" in caplog.text
    assert len(editor._session.layers.states[0]._pending) == 10


def test_a_float64_model_is_protected_and_edited_in_float64(make_model, tokenizer):
    editor = rf.Editor(make_model("llama", torch.float64), tokenizer, config=config())
    editor.protect(["Veta plays the organ ."])
    editor.edit([rf.Edit("{} lives in", "Toze Lado", "Port Alder")])
    editor.protect(["Lado speaks Kubeish ."])
    rows = editor._session.layers.protected
    assert {tensor.dtype for row in rows for tensor in (*row.keys, *row.values)} == {torch.float64}
    editor.consolidate()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_grad_mode_of_the_caller_does_not_matter(make_model, tokenizer, mode):
    edits = [rf.Edit("{} lives in", "Toze Lado", "Port Alder")]
    settings = config(prior={"lam": 1.0})
    plain, within = (rf.Editor(make_model("llama"), tokenizer, config=settings) for _ in range(2))
    plain.edit(edits)
    with mode():
        within.edit(edits)
    for one, other in zip(plain.model.parameters(), within.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_pilot_counts_edits_of_one_prompt_once(make_model, tokenizer):
    """The second of two edits of one prompt replaces the first, in the pilot as in the model."""
    edit = rf.Edit("{} lives in", "Toze Lado", "Port Alder")
    priors = []
    later = replace(edit, target="New Briar")
    for edits in ([later], [edit, later]):
        editor = rf.Editor(make_model("llama"), tokenizer, config=config())
        priors.append([prior.lam for prior in editor.calibrate(edits)])
    assert priors[0] == priors[1]


@pytest.mark.parametrize("failing", ["build_part", "snapshot"])
def test_out_of_memory_in_a_rebuild_raises_resource_error(make_model, tokenizer, monkeypatch, failing):
    from rlsedit_fast.rls import RLSState, state

    editor = rf.Editor(make_model("llama"), tokenizer, config=config())
    editor.edit([rf.Edit("{} lives in", "Toze Lado", "Port Alder")])
    before = [one.weight.clone() for one in editor._session.layers.states]

    def fails(*_arguments, **_options):
        raise torch.OutOfMemoryError("no more")

    monkeypatch.setattr(state if failing == "build_part" else RLSState, failing, fails)
    with pytest.raises(
        rf.errors.ResourceError, match="out of memory while rebuilding the layers; nothing was modified"
    ):
        editor.consolidate()
    assert all(map(torch.equal, before, [one.weight for one in editor._session.layers.states]))
