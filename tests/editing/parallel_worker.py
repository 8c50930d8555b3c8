"""Edits models in several processes, or one: `parallel_worker.py FOLDER WORLD SCENARIO...`."""

from __future__ import annotations

import io
import json
import logging
import multiprocessing
import os
import random
import signal
import sys
import warnings
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch
import torch.distributed as dist
import transformers.integrations.tensor_parallel  # noqa: F401  # imported once, before the processes start
from transformers.distributed import DistributedConfig

sys.path.insert(0, str(Path(__file__).parents[2]))

import rlsedit_fast as rf
from rlsedit_fast import processes
from rlsedit_fast.cli.devices import Devices, plan_devices
from rlsedit_fast.statistics.sources import GivenTexts
from rlsedit_fast.world import World

NAMES = [person.name for person in World.generate(people=400).people]
FIELDS = ("id", "state", "search_steps", "search_rank", "rank", "answer", "success")
NUMBERS = ("search_nll", "nll", "realized", "used")
FAMILIES = ("llama", "qwen3", "phi3", "gemma3", "olmo2")
SETTINGS = {"search": {"steps": 4}, "contexts": {"prefixes": ["", "The"]}, "batch_size": 3, "delay": 16}


def options(world, replicas=False):
    if world == 1 or replicas:
        return {"data_parallel": True} if world > 1 else {}
    return {"distributed_config": DistributedConfig(tp_size=world)}


def open_editor(model, world, replicas=False, dtype="float32", **settings):
    """Returns an editor of the model in a folder; of several layers, or of one where they cannot share a change."""
    layers = [2] if Path(model).name in ("gemma3", "olmo2") else [1, 2]
    config = rf.EditConfig(layers=layers, **(SETTINGS | settings))
    return rf.Editor.from_pretrained(model, config=config, dtype=dtype, **options(world, replicas))


def edits(start, count, target="harp"):
    return [rf.Edit("{} plays the", name, target) for name in NAMES[start : start + count]]


def contents(editor):
    """Returns weights, C and records; those of several processes are put together."""
    states = editor._session.layers.states
    return {
        "weights": [change.current.clone() for change in editor.changes()],
        "covariance": [state.columns.gather(state.precision_inverse().T.contiguous(), "test").T for state in states],
        "priors": [torch.tensor([prior.lam, prior.mu]) for prior in editor.priors],
        "records": [[getattr(record, name) for name in FIELDS] for record in editor.history()],
        "numbers": [[getattr(record, name) or 0.0 for name in NUMBERS] for record in editor.history()],
        "objectives": [state.objective for state in states],
    }


def copies(folder, family, world, count=7):
    """The same in processes that hold copies of the model."""
    return stream(folder, family, world, count, replicas=True)


def stream(folder, family, world, count=6, replicas=False):
    """Calibrates, edits, protects, undoes, replaces, consolidates, and writes the model."""
    editor = open_editor(str(folder / family), world, replicas)
    editor.anchor([f"{name} plays the flute ." for name in NAMES[100:140]])
    editor.edit(edits(0, count))
    found = {"edited": contents(editor)}
    editor.protect([f"{name} speaks" for name in NAMES[50:53]])
    editor.undo(editor.select(list(range(1, count // 3 + 1))))
    editor.replace(count, "flute")
    found["changed"] = contents(editor)
    status, (deviation, *_) = editor.status(sample=4), editor.deviation()
    found["status"] = [
        [one.weight, one.weight_bound, one.anchors, one.held_out, one.misfit] for one in status.layers
    ] + [[status.sample.success, *status.sample.key_shift], [deviation.weight, deviation.edits, deviation.protected]]
    found["overlap"] = [one.used for one in editor.overlaps(edits(1, 3, "lute"))]
    found["fingerprint"] = editor.fingerprint()
    with editor.unedited():
        found["originals"] = [p.columns.gather(p.blocks[0], "test").clone() for p in editor.context.projections]
    editor.consolidate()
    found["consolidated"] = contents(editor)
    place = folder / f"{family}-{world}{'-copies' * replicas}"
    report = editor.save_pretrained(place / "checkpoint")
    found["report"] = (report.reason, report.tensors)
    editor.save_delta(place / "delta.safetensors")
    editor.save_adapter(place / "adapter", rank=4)
    return found


def long_stream(folder, family, world, count, dtype="float32", steps=2, size=10):
    """Adds `count` edits and undoes a third of them, with a protection and replacements, and writes the model."""
    layers = {} if family in FAMILIES else {"layers": [12, 14]}
    editor = open_editor(
        str(folder / family), world, dtype=dtype, **layers, search={"steps": steps}, batch_size=size, delay=64
    )
    editor.anchor([f"{name} plays the flute ." for name in NAMES[320:360]])
    draw, call = random.Random(count), max(3, count // 10)
    for start in range(0, count, call):
        editor.edit(edits(start, min(call, count - start)))
        if start == 2 * call:
            editor.protect([f"{name} speaks" for name in NAMES[360:363]])
        active = [record.id for record in editor.history() if record.state == "active"]
        editor.undo(sorted(draw.sample(active, call // 3)))
        if start % (3 * call) == 0:
            left = [record.id for record in editor.history() if record.state == "active"]
            editor.replace(draw.choice(left), "flute")
    found = {"changed": contents(editor), "fingerprint": editor.fingerprint()}
    with editor.unedited():
        found["originals"] = [p.columns.gather(p.blocks[0], "test").clone() for p in editor.context.projections]
    found["edited"] = [p.name for p in editor.context.projections]
    editor.save_pretrained(folder / f"{family}-{world}" / "checkpoint")
    return found


def forecast(folder, family, world):
    """Compares adherences, forecasts, and collects statistics."""
    editor = open_editor(str(folder / family), world)
    source = GivenTexts([f"{name} plays the flute ." for name in NAMES[100:140]])
    statistics = editor.statistics(source)
    editor.anchor(statistics)
    found = editor.forecast(edits(0, 30), adherences=[0.8], pilot=6)
    return {
        "moments": list(statistics.moments.values()),
        "points": [[point.drift, point.realized] for point in found.settings[0].points],
        "mu": found.settings[0].tradeoff.mu,
    }


def stored(folder, family, world):
    """Continues a store that one process wrote, and leaves one for a single process."""
    settings = {"prior": {"lam": 0.3}, "delay": 4}
    place = folder / "store"
    found = {}
    if world == 1 and not place.exists():
        with rf.Editor.from_pretrained(
            folder / family, config=config_of(settings), store=place, dtype="float32"
        ) as editor:
            editor.edit(edits(0, 6))
            return {"written": contents(editor)}
    with rf.Editor.from_pretrained(folder / family, store=place, dtype="float32", **options(world)) as editor:
        found["opened"] = contents(editor)
        if world > 1:
            editor.undo(2)
            editor.edit(edits(6, 3))
            editor._recorder.try_snapshot(editor._session.layers)
            editor.edit(edits(9, 3))
            found["left"] = contents(editor)
    return found


def config_of(settings):
    return rf.EditConfig(layers=[1, 2], **(SETTINGS | settings))


def failing(folder, family, world):
    """Returns what each process raises if one fails within a batch, and whether its state is the one before."""
    processes.PATIENCE = 1.0
    editor = open_editor(str(folder / family), world, prior={"lam": 0.3})
    editor.edit(edits(0, 3))
    found = {}

    def attempt(name, call):
        before = [projection.copies() for projection in editor.context.projections]
        objectives, history = [s.objective for s in editor._session.layers.states], len(editor.history())
        try:
            call()
        except BaseException as error:
            found[name] = [type(error).__name__, str(error)]
        else:
            found[name] = [None, ""]
        now = [projection.copies() for projection in editor.context.projections]
        same = all(torch.equal(a, b) for x, y in zip(before, now, strict=True) for a, b in zip(x, y, strict=True))
        same &= objectives == [s.objective for s in editor._session.layers.states]
        found[name].append(same and history == len(editor.history()))

    attempt("alike", lambda: editor.edit([rf.Edit("{} plays the", " ", "harp")]))
    finder = editor._session.finder
    search, finder.find = finder.find, defective
    attempt("defect", lambda: editor.edit(edits(3, 3)))
    finder.find = search
    last = editor.context.processes.rank == world - 1
    projection = editor.context.projections[0]
    kept = projection.tensors[0].clone()
    if last:
        projection.tensors[0][0, 0] += 1.0
    attempt("modified", lambda: editor.edit(edits(3, 3)))
    projection.tensors[0].copy_(kept)
    editor._session.layers.settle()
    editor.edit(edits(3, 3))  # the processes are still in step
    if last:
        finder = editor._session.finder

        def broken(*_given, **_more):
            raise KeyboardInterrupt("one process is interrupted")

        finder.find = broken
    attempt("interrupted", lambda: editor.edit(edits(6, 3)))
    attempt("after", lambda: editor.edit(edits(6, 3)))
    return found


def defective(*_given, **_more):
    raise RuntimeError("a defect of the model")


def refused(folder, family, world):
    """Returns the errors for models that are divided in other ways."""
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, found = AutoTokenizer.from_pretrained(folder / family), {}

    def attempt(name, make):
        try:
            rf.Editor(make(), tokenizer, config=rf.EditConfig(layers=[1]))
        except rf.errors.RLSEditError as error:
            found[name] = str(error)

    def sharded():
        return fully_shard(AutoModelForCausalLM.from_pretrained(folder / family))

    def staged():
        return AutoModelForCausalLM.from_pretrained(
            folder / family, distributed_config=DistributedConfig(pp_size=world)
        )

    def mixture():
        return AutoModelForCausalLM.from_pretrained(folder / "mixtral", **options(world))

    def uneven():
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(folder / family, num_key_value_heads=1)
        model = AutoModelForCausalLM.from_config(config)
        if dist.get_rank() == 0:
            model.save_pretrained(folder / "one-head")
        dist.barrier()
        return AutoModelForCausalLM.from_pretrained(folder / "one-head", **options(world))

    attempt("fsdp", sharded)
    attempt("heads", uneven)
    attempt("pipeline", staged)
    attempt("mixture", mixture)
    model = AutoModelForCausalLM.from_pretrained(folder / family, **options(world))
    config = rf.EditConfig(layers=[1], rule="memit", prior={"lam": 0.3}, search={"steps": 2})
    try:
        rf.Editor(model, tokenizer, config=config).edit(edits(0, 1))
    except rf.errors.RLSEditError as error:
        found["rule"] = str(error)
    return found


def traffic(folder, family, world):
    """Returns what batches of edits sent, the plan of them, and what all collectives sent."""
    from tests.messages import Messages

    editor = open_editor(str(folder / family), world, prior={"lam": 0.3}, delay=64)
    projections, given = editor.context.projections, Devices(world, 10**12)
    with Messages(world) as start:
        editor.edit(edits(0, 2))
    found, states = {"start": start.largest, "batches": []}, editor._session.layers.states
    for at in (2, 5):
        before = [Counter(projection.columns.sent) for projection in projections]
        pending = len(states[0].saved().pending)
        with Messages(world) as messages:
            editor.edit(edits(at, 3))
        sent = sum((p.columns.sent - old for p, old in zip(projections, before, strict=True)), Counter())
        rows = len(states[0].saved().pending) - pending
        plan = plan_devices(editor.model, projections, editor.config.replace(delay=pending), given, edits=3, rows=rows)
        batch = {"rows": rows, "pending": pending, "sent": dict(sent), "plan": plan["batch"]["sent"]}
        found["batches"].append(batch | {"all": dict(messages.sent), "largest": messages.largest})
    found["widths"] = [(projection.value_width, projection.key_width) for projection in projections]
    return found


def commands(folder, family, world):
    """Returns exit code, output and messages of commands, in several processes with --tp."""
    from rlsedit_fast.cli import main
    from rlsedit_fast.editing.layers import EditedLayers

    rank = dist.get_rank() if dist.is_initialized() else 0
    lines = [json.dumps({"prompt": "{} plays the", "subject": name, "target": "harp"}) for name in NAMES[:5]]
    facts = folder / f"facts-{rank}.jsonl"
    facts.write_text("\n".join(lines))
    settings = folder / "settings.json"
    settings.write_text(json.dumps(SETTINGS | {"prior": {"lam": 0.3}, "batch_size": 2}))
    model = ["--model", str(folder / family), "--layers", "1,2", "--config", str(settings), "--no-anchors"]
    places = {name: str(folder / f"{name}-{world}") for name in ("store", "out", "undone", "interrupted")}
    divided = [] if world == 1 else ["--tp", str(world)]
    found = {}

    def call(name, *given, tp=divided):
        if world > 1 and not dist.is_initialized():
            join(rank, world, folder, name)
        out, said = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(said):
            code = main([*given, *tp])
        found[name] = (code, out.getvalue(), said.getvalue())

    edit = ["edit", *model, "--edits", str(facts), "--no-stability"]
    written = ["--json", str(folder / f"edit-{world}.json")]
    call("edit", *edit, "--store", places["store"], "--out", places["out"], *written)
    call("undo", "undo", "--store", places["store"], "1", "3", "--out", places["undone"])
    if world == 1:
        return found
    call("exists", *edit, "--out", places["out"])
    call("wrong", *edit, "--out", places["out"], tp=["--tp", "3"])
    call("undivided", *edit, "--out", places["out"], tp=[])
    write, pressed = EditedLayers.write, []

    def interrupted(*given, **more):
        if rank == world - 1 and not pressed:
            pressed.append(True)
            os.kill(os.getpid(), signal.SIGINT)
        return write(*given, **more)

    EditedLayers.write = interrupted
    signal.signal(signal.SIGINT, signal.default_int_handler)
    call("interrupted", *edit, "--store", places["interrupted"])
    EditedLayers.write = write
    return found


SCENARIOS = {
    "copies": copies,
    "long": long_stream,
    "commands": commands,
    "stream": stream,
    "forecast": forecast,
    "stored": stored,
    "failing": failing,
    "refused": refused,
    "traffic": traffic,
}


def join(rank, world, folder, name):
    """Initializes the process group, anew for each name."""
    store = dist.FileStore(str(folder / f"rendezvous-{world}-{name.replace('/', '-')}"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)


def main(rank, world, folder, names):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if world > 1:
        os.environ["RANK"] = str(rank)
    for name in names:
        if world > 1 and not dist.is_initialized():
            join(rank, world, folder, name)
        scenario, family, *more = name.split("/")
        with redirect_stderr(io.StringIO()):
            found = SCENARIOS[scenario](folder, family, world, *(int(one) if one.isdigit() else one for one in more))
        torch.save(found, folder / f"{scenario}-{family}-{world}-{rank}.pt")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    place, count, *wanted = sys.argv[1:]
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": count}
    context = multiprocessing.get_context("fork")  # torch and transformers are imported once
    running = [context.Process(target=main, args=(r, int(count), Path(place), wanted)) for r in range(int(count))]
    for process in running:
        process.start()
    for process in running:
        process.join()
    sys.exit(any(process.exitcode for process in running))
