"""A model on several devices is edited as on one, and each layer's state is on the device of its layer.

The devices are simulated: every tensor is in the memory of the CPU, and `Claims` records a device for each.
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

simulated = pytest.mark.skipif(
    version("transformers").startswith("4."), reason="transformers 4 makes masks under vmap, which hides storages"
)
HOST = torch.device("cpu")
A, B = (
    torch.device("cpu:1"),
    torch.device("cpu:2"),
)  # for PyTorch different from each other and from `cpu`, with the same memory
INDEXING = ("index", "index_put", "index_put_impl")
FILLING = ("fill", "masked_fill")


def tensors_in(value):
    """Yields the tensors in nested arguments or results."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list, dict)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(inner)


class MixedDevices(Exception):
    """An operation received tensors of two devices."""


class Claims(TorchFunctionMode):
    """Gives tensors simulated devices, and raises when an operation mixes devices.

    The rules are those of PyTorch for CUDA: an operation has one device, but tensors of the host may index tensors of
    any device, scalars of the host may take part in any pointwise operation, and `copy_` copies between devices.
    Tensors that PyTorch creates within an operation have no device until they meet a tensor that has one. Reading
    memory by its address is not detected; the native kernels do so, after `rlsedit_fast.ops` has compared the devices.
    """

    def __init__(self):
        super().__init__()
        self._devices = {}  # by the address of the storage; the weak reference prevents its reuse

    def __enter__(self):
        self._kernels = Kernels(self)
        self._kernels.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._kernels.__exit__(*error)
        self._devices = {address: entry for address, entry in self._devices.items() if not entry[0].expired()}

    def put(self, tensor, device):
        """Records the device of a tensor and of all that share its memory; None stands for any device."""
        storage = tensor.untyped_storage()
        self._devices[storage._cdata] = StorageWeakRef(storage), device
        return tensor

    def of(self, tensor):
        """Returns the device of a tensor; None if it has none."""
        return self._devices.get(tensor.untyped_storage()._cdata, (None, HOST))[1]

    def move(self, tensor, device):
        """Returns the tensor on the device, without a copy if it is already there."""
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
    """A copy on another device; its gradient is on the device of the source."""

    @staticmethod
    def forward(ctx, tensor, claims, device):
        ctx.claims, ctx.source = claims, claims.of(tensor)
        return claims.put(tensor.clone(), device)

    @staticmethod
    def backward(ctx, gradient):
        return ctx.claims.put(gradient.clone(), ctx.source), None, None


class Kernels(TorchDispatchMode):
    """Checks the devices of every kernel that runs, including those of the backward pass."""

    def __init__(self, claims):
        super().__init__()
        self._claims = claims

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [*tensors_in(args), *tensors_in(kwargs)]
        device, requested = self._device(func, args, given), kwargs.get("device")
        if requested is not None and requested.index is not None:  # PyTorch uses `cpu` for simulated devices too
            device = requested
        out = func(*args, **kwargs)
        memory = {t.untyped_storage()._cdata for t in given if self._claims.of(t) is not None}
        for made in tensors_in(out):
            if made.untyped_storage()._cdata not in memory:
                self._claims.put(made, device)
        return out

    def _device(self, func, args, given):
        """Returns the device of an operation; None if it has none."""
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


CLAIMS = Claims()  # one for all tests: caches of the package per device outlive a test

EDITS = [
    rf.Edit("{} lives in", "Toze Lado Rekuno", "Port Alder"),
    rf.Edit("The native language of {} is", "Fado Veta Voluvu", "Kubeish"),
    rf.Edit("{} works as a", "Lado Toze", "mason", weight=2.0),
    rf.Edit("{} plays the", "Veta Fado Rekuno", "organ"),
]
NAMES = [edit.subject for edit in EDITS]
ANCHORS = [f"{a} lives in Port Garnet . {b} speaks Nafiish ." for a in NAMES for b in NAMES[::-1]]


def device_map(name, lower, upper, **changes):
    """Embeddings and blocks 0 and 1 on `lower`, the others on `upper`, and the head on the device of its weight."""
    if name == "gpt2":
        start, blocks, end = ["transformer.wte", "transformer.wpe", "lm_head"], "transformer.h", ["transformer.ln_f"]
    else:
        start, blocks, end = ["model.embed_tokens", "model.rotary_emb"], "model.layers", ["model.norm"]
        (end if name == "llama" else start).append("lm_head")  # in Gemma it is tied to the embeddings
    modules = dict.fromkeys(start, lower) | dict.fromkeys(end, upper)
    return modules | {f"{blocks}.{i}": changes.get(f"block{i}", lower if i < 2 else upper) for i in range(4)}


def by_simulation(model, devices):
    """Distributes a model, with hooks that move the inputs of a module to its device."""

    def to_device(value, device):
        if isinstance(value, (tuple, list)):
            return type(value)(to_device(inner, device) for inner in value)
        return value.to(device) if isinstance(value, torch.Tensor) else value

    def hook(device):
        return lambda _m, args, kwargs: (to_device(args, device), {k: to_device(v, device) for k, v in kwargs.items()})

    for name, device in devices.items():
        module = model.get_submodule(name)
        for tensor in (*module.parameters(), *module.buffers()):
            CLAIMS.put(tensor, device)
        module.register_forward_pre_hook(hook(device), with_kwargs=True)


def by_accelerate(model, devices):
    """Distributes a model like `device_map` of transformers."""
    accelerate = pytest.importorskip("accelerate")
    first = next(iter(devices.values()))
    accelerate.dispatch_model(model, {k: str(v) for k, v in devices.items()}, main_device=str(first), force_hooks=True)


def work(model, tokenizer, *, edits=EDITS, anchors=ANCHORS, **changes):
    """Runs all operations of an editor that change a model; returns the editor."""
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
    """Returns the names of the weights in which two models differ."""
    theirs = other.state_dict()
    return [name for name, value in model.state_dict().items() if not torch.equal(value.cpu(), theirs[name].cpu())]


def test_simulated_devices_cannot_be_mixed():
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
    ("name", "key_rows", "distribute"),
    [
        ("llama", "contexts", by_simulation),
        pytest.param("llama", "mean", by_accelerate, marks=pytest.mark.soak),
        ("gpt2", "contexts", by_accelerate),
        pytest.param("gpt2", "mean", by_simulation, marks=pytest.mark.soak),
    ],
)
@simulated
def test_edits_on_two_devices_equal_those_on_one(make_model, tokenizer, name, key_rows, distribute):
    plain, model = make_model(name), make_model(name)
    alone = work(plain, tokenizer, contexts={"rows": key_rows})
    assert len(difference(plain, model)) == 2
    with CLAIMS:
        distribute(model, device_map(name, A, B))
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
    [
        pytest.param({"prior": {"mu": 0.0}}, marks=pytest.mark.soak),
        pytest.param({"prior": {"lam": 0.1}}, marks=pytest.mark.soak),
        {"search": {"optimizer": "adam"}, "same_subject": "separate"},
    ],
    ids=str,
)
@simulated
def test_other_settings_do_not_mix_devices(make_model, tokenizer, changes):
    plain, model = make_model("llama", torch.bfloat16), make_model("llama", torch.bfloat16)
    work(plain, tokenizer, **changes)
    with CLAIMS:
        by_simulation(model, device_map("llama", A, B))
        work(model, tokenizer, **changes)
    assert not difference(model, plain)


@simulated
def test_a_search_after_a_normalization_resumes_on_another_device(make_model, tokenizer):
    """The preceding block is on another device, and rows leave its output when a request has converged."""
    plain, model = make_model("gemma2"), make_model("gemma2")
    prompt = EDITS[0].prompt.replace("{}", EDITS[0].subject)
    known = tokenizer.decode(score(plain, tokenizer, [(prompt, EDITS[0].target)])[0].predicted[0])
    edits = [replace(EDITS[0], target=known), *EDITS[1:]]
    settings = {"edits": edits, "layers": (2,), "contexts": {"prefixes": ("",)}, "search": {"stop_nll": 20.0}}
    alone = work(plain, tokenizer, **settings)
    assert [record.search_steps for record in alone.history()[:2]] == [0, 4], (
        "precondition: one request leaves the batch first"
    )
    with CLAIMS:
        by_simulation(model, device_map("gemma2", A, B))
        work(model, tokenizer, **settings)
    assert not difference(model, plain)


@simulated
def test_the_state_of_a_layer_is_on_the_device_of_the_layer(make_model, tokenizer):
    plain, model = make_model("llama"), make_model("llama")
    collected = rf.Editor(plain, tokenizer, config=rf.EditConfig(layers=(1, 2))).statistics(GivenTexts(ANCHORS))
    with CLAIMS:
        by_simulation(model, device_map("llama", A, B))
        editor = work(model, tokenizer, anchors=collected)
        active = [record.id for record in editor.history() if record.state == "active"]
        rows = editor._session.ledger.rows(active) + editor._session.layers._protected
        for layer, (state, device) in enumerate(zip(editor._session.layers.states, (A, B), strict=True)):
            own = {name: value for name, value in vars(state).items() if isinstance(value, torch.Tensor)}
            covariance = own.pop("_prior_covariance", None)
            assert covariance is None or covariance.device == HOST
            kept = list(own.values())
            kept += [*state._master.tensors, state._sketch.probe, state._sketch.image]
            assert {tensor.device for tensor in kept} == {device}
            rarely_used = [state.prior.anchor_moment, *(side[layer] for row in rows for side in (row.keys, row.values))]
            assert {tensor.device for tensor in rarely_used} == {HOST}, "rarely used tensors stay on the CPU"
        assert [layer.device for layer in editor.context.memory()] == [str(A), str(B)]
        assert editor.fingerprint() == fingerprint(plain)


@simulated
def test_scores_and_samples_do_not_depend_on_the_device_of_the_head(make_model, tokenizer):
    prompts = [(edit.prompt.replace("{}", edit.subject), edit.target) for edit in EDITS]

    def read(model):
        return score(model, tokenizer, prompts), sample(model, tokenizer, texts=2, length=5, seed=0), fingerprint(model)

    plain, model = make_model("llama"), make_model("llama")
    with CLAIMS:
        by_simulation(model, device_map("llama", A, B))
        assert read(model) == read(plain)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@simulated
def test_a_checkpoint_of_a_distributed_model_loads_on_one_device(make_model, tokenizer, tmp_path, name):
    from transformers import AutoModelForCausalLM

    model = make_model(name)
    with CLAIMS:
        by_simulation(model, device_map(name, A, B))
        work(model, tokenizer).save_pretrained(tmp_path)
    assert not difference(AutoModelForCausalLM.from_pretrained(tmp_path), model)


@pytest.mark.parametrize("key_rows", ["contexts", "mean"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_hooks_of_accelerate_stay_and_do_not_change_the_result(make_model, tokenizer, name, key_rows):
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


def test_an_offloaded_edited_weight_raises_on_creation(make_model, tokenizer, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = make_model("llama")
    devices = {k: str(v) for k, v in device_map("llama", HOST, HOST, block2="disk").items()}
    accelerate.dispatch_model(model, devices, main_device="cpu", offload_dir=tmp_path)
    with pytest.raises(ModelError, match=r"layers\.2\.mlp\.down_proj is on the meta device.*device_map"):
        rf.Editor(model, tokenizer, config=rf.EditConfig(layers=(1, 2)))


def test_a_model_with_other_offloaded_weights_can_be_edited_and_anchored(make_model, tokenizer, tmp_path):
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
