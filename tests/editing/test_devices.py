"""A model whose layers lie on several devices is edited as if it lay on one, each layer's state beside its layer.

The devices are claimed: every tensor lies in the CPU's memory, and `Claims` keeps book of where each is said to be.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import version

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import rlsedit_fast as rf
from rlsedit_fast.errors import ModelError
from rlsedit_fast.evaluation.scoring import score
from rlsedit_fast.models.fingerprint import fingerprint
from rlsedit_fast.models.generation import sample
from rlsedit_fast.statistics.sources import GivenTexts

claimed = pytest.mark.skipif(
    version("transformers").startswith("4."), reason="transformers 4 makes masks under vmap, where no storage is told"
)
HOST = torch.device("cpu")
A, B = torch.device("cpu:1"), torch.device("cpu:2")  # to PyTorch neither each other nor `cpu`, and all one memory
INDEXING = ("index", "index_put", "index_put_impl")
FILLING = ("fill", "masked_fill")


def tensors_in(value):
    """The tensors among arguments or results, however nested."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list, dict)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(inner)


class MixedDevices(Exception):
    """An operation was given tensors of two devices."""


class Claims(TorchFunctionMode):
    """Within it a tensor is on the device that it claims, and none is computed with together with another device's.

    The rule is PyTorch's for CUDA: an operation has one device, but the host's tensors may index those of any, its
    scalars go with any pointwise operation, and `copy_` goes across. What PyTorch makes for itself within an operation
    may be anywhere until it meets a tensor that is not. Not seen is who reads memory by its address; the package's
    native kernels do, after `rlsedit_fast.ops` has compared the devices of what they are given.
    """

    def __init__(self):
        super().__init__()
        self._book = {}  # by storage's address, which the weak reference keeps from being used again

    def __enter__(self):
        self._kernels = Kernels(self)
        self._kernels.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._kernels.__exit__(*error)
        self._book = {address: entry for address, entry in self._book.items() if not entry[0].expired()}

    def put(self, tensor, device):
        """Says where a tensor is, and all that share its memory; None is anywhere."""
        storage = tensor.untyped_storage()
        self._book[storage._cdata] = StorageWeakRef(storage), device
        return tensor

    def of(self, tensor):
        """Where a tensor is; None if it may be anywhere."""
        return self._book.get(tensor.untyped_storage()._cdata, (None, HOST))[1]

    def move(self, tensor, device):
        """The tensor there: itself if it is there already."""
        return tensor if self.of(tensor) == device else Move.apply(tensor, self, device)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func == torch.Tensor.device.__get__:
            return self.of(args[0]) or HOST
        if func == torch.Tensor.to:
            return self._to(*args, **kwargs)
        if func == torch.Tensor.cpu:
            return self.move(args[0], HOST)
        if func == torch.Tensor.numpy and self.of(args[0]) not in (HOST, None):
            raise MixedDevices(f"numpy() of a tensor on {self.of(args[0])}")
        out = func(*args, **kwargs)
        tensors = [*tensors_in(args), *tensors_in(kwargs)]
        name = getattr(func, "__name__", "")
        if isinstance(out, torch.Tensor) and (not tensors or kwargs.get("device") or name.startswith("new_")):
            self.put(out, torch.device(kwargs.get("device") or (self.of(tensors[0]) if tensors else HOST)))
        return out

    def _to(self, tensor, *args, copy=False, **kwargs):
        if args and isinstance(args[0], torch.Tensor):
            args = (self.of(args[0]), args[0].dtype, *args[1:])
        device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        layout = {} if memory_format is None else {"memory_format": memory_format}
        cast = tensor.to(dtype or tensor.dtype, copy=copy, **layout)
        return self.move(cast, device or self.of(cast))


class Move(torch.autograd.Function):
    """A copy on another device, whose gradient goes back to where the tensor came from."""

    @staticmethod
    def forward(ctx, tensor, claims, device):
        ctx.claims, ctx.source = claims, claims.of(tensor)
        return claims.put(tensor.clone(), device)

    @staticmethod
    def backward(ctx, gradient):
        return ctx.claims.put(gradient.clone(), ctx.source), None, None


class Kernels(TorchDispatchMode):
    """Sees every kernel that runs, those of the backward pass too, and holds it to the claims."""

    def __init__(self, claims):
        super().__init__()
        self._claims = claims

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [*tensors_in(args), *tensors_in(kwargs)]
        device, asked = self._device(func, args, given), kwargs.get("device")
        if asked is not None and asked.index is not None:  # PyTorch's own code says `cpu` of what is claimed too
            device = asked
        out = func(*args, **kwargs)
        memory = {t.untyped_storage()._cdata for t in given if self._claims.of(t) is not None}
        for made in tensors_in(out):
            if made.untyped_storage()._cdata not in memory:
                self._claims.put(made, device)
        return out

    def _device(self, func, args, given):
        """Where an operation runs; None if that may be anywhere."""
        name = func.overloadpacket._qualified_op_name.removeprefix("aten::").strip("_")
        if name == "copy":
            return self._claims.of(args[0])
        indices = {id(index) for index in args[1]} if name in INDEXING else ()
        with_scalars = torch.Tag.pointwise in func.tags or name in INDEXING + FILLING
        placed = [t for t in given if self._claims.of(t) is not None]
        bound = [t for t in placed if id(t) not in indices and (t.ndim or not with_scalars)]
        devices = {self._claims.of(t) for t in bound} | {self._claims.of(t) for t in placed} - {HOST}
        if len(devices) > 1:
            raise MixedDevices(f"{name} of {[f'{list(t.shape)} on {self._claims.of(t)}' for t in given]}")
        return next(iter(devices), HOST if placed else None)


CLAIMS = Claims()  # one for all tests: what the package caches by device outlives a test

EDITS = [
    rf.Edit("{} lives in", "Toze Lado Rekuno", "Port Alder"),
    rf.Edit("The native language of {} is", "Fado Veta Voluvu", "Kubeish"),
    rf.Edit("{} works as a", "Lado Toze", "mason", weight=2.0),
    rf.Edit("{} plays the", "Veta Fado Rekuno", "organ"),
]
NAMES = [edit.subject for edit in EDITS]
ANCHORS = [f"{a} lives in Port Garnet . {b} speaks Nafiish ." for a in NAMES for b in NAMES[::-1]]


def device_map(name, lower, upper, **changes):
    """Embeddings and blocks 0 and 1 on `lower`, the others on `upper`, and the head where its weight is."""
    if name == "gpt2":
        start, blocks, end = ["transformer.wte", "transformer.wpe", "lm_head"], "transformer.h", ["transformer.ln_f"]
    else:
        start, blocks, end = ["model.embed_tokens", "model.rotary_emb"], "model.layers", ["model.norm"]
        (end if name == "llama" else start).append("lm_head")  # Gemma's is tied to the embeddings
    modules = dict.fromkeys(start, lower) | dict.fromkeys(end, upper)
    return modules | {f"{blocks}.{i}": changes.get(f"block{i}", lower if i < 2 else upper) for i in range(4)}


def by_claim(model, devices):
    """Spreads a model, with hooks that move what goes into a module to its device."""

    def moved(value, device):
        if isinstance(value, (tuple, list)):
            return type(value)(moved(inner, device) for inner in value)
        return value.to(device) if isinstance(value, torch.Tensor) else value

    def moving(device):
        return lambda _m, args, kwargs: (moved(args, device), {k: moved(v, device) for k, v in kwargs.items()})

    for name, device in devices.items():
        module = model.get_submodule(name)
        for tensor in (*module.parameters(), *module.buffers()):
            CLAIMS.put(tensor, device)
        module.register_forward_pre_hook(moving(device), with_kwargs=True)


def by_accelerate(model, devices):
    """Spreads a model as transformers does it for `device_map`."""
    accelerate = pytest.importorskip("accelerate")
    first = next(iter(devices.values()))
    accelerate.dispatch_model(model, {k: str(v) for k, v in devices.items()}, main_device=str(first), force_hooks=True)


def work(model, tokenizer, *, edits=EDITS, anchors=ANCHORS, **changes):
    """All that an editor does to a model; the editor."""
    settings = {
        "layers": (1, 2),
        "batch_size": 2,
        "contexts": {"prefixes": ("", "People speak .")},
        "search": {"steps": 4, "clamp": 4.0},
        "fact_token": "last",
        "prior": {"adherence": 0.9},
    }
    editor = rf.Editor(model, tokenizer, config=rf.EditConfig(**settings).replace(**changes))
    editor.anchor(anchors)
    editor.protect(["Lado Toze speaks Nafiish ."])
    editor.assess(edits, [0.5])
    editor.calibrate(edits)
    editor.edit(edits[:2])
    editor.protect(["Voluvu Lado lives in Port Garnet ."])
    editor.edit(edits[2:])
    editor.replace(1, target="Lake Briar")
    editor.undo(2)
    return editor


def difference(model, other):
    """Names of the weights in which two models differ."""
    theirs = other.state_dict()
    return [name for name, value in model.state_dict().items() if not torch.equal(value.cpu(), theirs[name].cpu())]


def test_claims_hold_operations_to_one_device():
    with CLAIMS:
        x, other, host = torch.randn(3, 4, device=A), torch.randn(3, 4).to(B), torch.randn(3, 4)
        assert (x.device, other.device, host.device) == (A, B, HOST)
        for made in (x.T.double(), x[[0, 2]], x[torch.tensor([1])], x * host.sum(), x.new_tensor([1]), x + other.to(x)):
            assert made.device == A
        assert other.copy_(x).device == B
        for mixes in (
            lambda: x + other,
            lambda: host + x,
            lambda: x @ host.T,
            lambda: torch.stack([x.sum(), host.sum()]),
            lambda: x[torch.tensor([0], device=B)],
            lambda: x.gather(0, torch.tensor([[0]])),
            lambda: x + other.sum(),
            lambda: x.numpy(),
        ):
            with pytest.raises(MixedDevices):
                mixes()
        x.requires_grad_()
        (gradient,) = torch.autograd.grad((x.to(B) * other).sum().to(A) + x[[0]].square().sum(), x)
        assert gradient.device == A


@pytest.mark.parametrize(
    ("name", "key_rows", "spread"),
    [
        ("llama", "contexts", by_claim),
        ("llama", "mean", by_accelerate),
        ("gpt2", "contexts", by_accelerate),
        ("gpt2", "mean", by_claim),
    ],
)
@claimed
def test_edits_over_two_devices_are_those_on_one(make_model, tokenizer, name, key_rows, spread):
    plain, model = make_model(name), make_model(name)
    alone = work(plain, tokenizer, contexts={"rows": key_rows})
    assert len(difference(plain, model)) == 2
    with CLAIMS:
        spread(model, device_map(name, A, B))
        editor = work(model, tokenizer, contexts={"rows": key_rows})
        assert editor.deviation() == alone.deviation()
    assert not difference(model, plain)
    for record, same in zip(editor.history(), alone.history(), strict=True):
        assert replace(record, time=same.time) == same
    active = [record.id for record in alone.history() if record.state == "active"]
    alone.undo(active)
    with CLAIMS:
        editor.undo(active)
    assert not difference(model, plain)


@pytest.mark.parametrize(
    "changes",
    [{"prior": {"mu": 0.0}}, {"prior": {"lam": 0.1}}, {"search": {"optimizer": "adam"}, "same_subject": "separate"}],
    ids=str,
)
@claimed
def test_no_setting_mixes_devices(make_model, tokenizer, changes):
    plain, model = make_model("llama", torch.bfloat16), make_model("llama", torch.bfloat16)
    work(plain, tokenizer, **changes)
    with CLAIMS:
        by_claim(model, device_map("llama", A, B))
        work(model, tokenizer, **changes)
    assert not difference(model, plain)


@claimed
def test_search_behind_a_normalisation_resumes_across_the_border(make_model, tokenizer):
    """The block below lies on another device, and rows are taken out of its output when a request leaves."""
    plain, model = make_model("gemma2"), make_model("gemma2")
    prompt = EDITS[0].prompt.replace("{}", EDITS[0].subject)
    known = tokenizer.decode(score(plain, tokenizer, [(prompt, EDITS[0].target)])[0].predicted[0])
    edits = [replace(EDITS[0], target=known), *EDITS[1:]]
    settings = {"edits": edits, "layers": (2,), "contexts": {"prefixes": ("",)}, "search": {"stop_nll": 20.0}}
    alone = work(plain, tokenizer, **settings)
    assert [record.search_steps for record in alone.history()[:2]] == [0, 4], "one leaves the batch before the other"
    with CLAIMS:
        by_claim(model, device_map("gemma2", A, B))
        work(model, tokenizer, **settings)
    assert not difference(model, plain)


@claimed
def test_every_layers_state_lies_beside_its_layer(make_model, tokenizer):
    plain, model = make_model("llama"), make_model("llama")
    collected = rf.Editor(plain, tokenizer, config=rf.EditConfig(layers=(1, 2))).statistics(GivenTexts(ANCHORS))
    with CLAIMS:
        by_claim(model, device_map("llama", A, B))
        editor = work(model, tokenizer, anchors=collected)
        active = [record.id for record in editor.history() if record.state == "active"]
        rows = editor._session.ledger.rows(active) + editor._session.layers._protected
        for layer, (state, device) in enumerate(zip(editor._session.layers.states, (A, B), strict=True)):
            kept = [value for value in vars(state).values() if isinstance(value, torch.Tensor)]
            kept += [*state._master.tensors, state._sketch.probe, state._sketch.image]
            assert {tensor.device for tensor in kept} == {device}
            seldom = [state.prior.anchor_moment, *(side[layer] for row in rows for side in (row.keys, row.values))]
            assert {tensor.device for tensor in seldom} == {HOST}, "what is read seldom does not crowd the model"
        assert [layer.device for layer in editor.context.memory()] == [str(A), str(B)]
        assert editor.fingerprint() == fingerprint(plain)


@claimed
def test_answers_are_read_wherever_the_head_lies(make_model, tokenizer):
    asked = [(edit.prompt.replace("{}", edit.subject), edit.target) for edit in EDITS]

    def read(model):
        return score(model, tokenizer, asked), sample(model, tokenizer, texts=2, length=5, seed=0), fingerprint(model)

    plain, model = make_model("llama"), make_model("llama")
    with CLAIMS:
        by_claim(model, device_map("llama", A, B))
        assert read(model) == read(plain)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@claimed
def test_checkpoint_of_a_spread_model_is_an_ordinary_one(make_model, tokenizer, tmp_path, name):
    from transformers import AutoModelForCausalLM

    model = make_model(name)
    with CLAIMS:
        by_claim(model, device_map(name, A, B))
        work(model, tokenizer).save_pretrained(tmp_path)
    assert not difference(AutoModelForCausalLM.from_pretrained(tmp_path), model)


@pytest.mark.parametrize("key_rows", ["contexts", "mean"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_accelerates_hooks_change_nothing_and_stay(make_model, tokenizer, name, key_rows):
    plain, model = make_model(name), make_model(name)
    work(plain, tokenizer, contexts={"rows": key_rows})
    by_accelerate(model, device_map(name, HOST, HOST))

    def hooks():
        return {n: (m._hf_hook, m.__dict__["forward"]) for n, m in model.named_modules() if hasattr(m, "_hf_hook")}

    before = hooks()
    assert before.keys() >= device_map(name, HOST, HOST).keys()
    work(model, tokenizer, contexts={"rows": key_rows})
    assert not difference(model, plain)
    assert hooks() == before


def test_offloaded_weight_is_refused_before_anything_is_done(make_model, tokenizer, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = make_model("llama")
    devices = {k: str(v) for k, v in device_map("llama", HOST, HOST, block2="disk").items()}
    accelerate.dispatch_model(model, devices, main_device="cpu", offload_dir=tmp_path)
    with pytest.raises(ModelError, match=r"layers\.2\.mlp\.down_proj is on the meta device.*device_map"):
        rf.Editor(model, tokenizer, config=rf.EditConfig(layers=(1, 2)))


def test_a_model_whose_other_weights_are_offloaded_is_edited_and_anchored(make_model, tokenizer, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model, plain = make_model("llama"), make_model("llama")
    devices = {k: str(v) for k, v in device_map("llama", HOST, HOST, block3="disk").items()}
    devices["model.embed_tokens"] = "disk"
    accelerate.dispatch_model(model, devices, main_device="cpu", offload_dir=tmp_path)
    assert model.get_input_embeddings().weight.is_meta
    for one in (model, plain):
        editor = rf.Editor(one, tokenizer, config=rf.EditConfig(layers=(1, 2), contexts={"prefixes": ("",)}))
        editor.anchor(["Lado speaks Kubeish .", "Veta plays the organ ."])
        editor.edit([rf.Edit("{} lives in", "Toze Lado Rekuno", "Port Alder")])
    for layer in (1, 2):
        edited = model.model.layers[layer].mlp.down_proj.weight
        assert torch.equal(edited, plain.model.layers[layer].mlp.down_proj.weight)
