"""Runs the scenarios of `test_sharded` in three processes: `sharded_worker.py FOLDER`."""

from __future__ import annotations

import multiprocessing
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[2]))

from rlsedit_fast.rls import Prior, RLSState, ShardedColumns, used_share
from rlsedit_fast.rls.results import Saved
from tests.messages import Messages

D_K, D_V, BATCHES, ROWS = 37, 11, 20, 3
WIDTHS = {1: [37], 2: [20, 17], 3: [13, 20, 4]}
CASES = {
    "float64": (torch.float64, torch.float64, "moment"),
    "float32": (torch.float32, torch.float32, "moment"),
    "bfloat16": (torch.bfloat16, torch.float32, "keys"),
    "custom": (torch.float64, torch.float64, "custom"),
}


def draw(*shape, seed, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make_prior(kind):
    anchors = draw(60, D_K, seed=1)
    if kind == "keys":
        return Prior(lam=0.5, mu=0.3, anchor_keys=anchors.float())
    moment = anchors.T @ anchors
    if kind == "moment":
        return Prior(lam=0.5, mu=0.3, anchor_moment=moment)
    values = draw(60, D_V, seed=2)
    cross, energy = values.T @ anchors, float(values.square().sum())
    return Prior(lam=0.5, mu=0.3, anchor_moment=moment, anchor_cross=cross, anchor_energy=energy)


def batches(dtype):
    keys, values = draw(BATCHES * ROWS, D_K, seed=3, dtype=dtype), draw(BATCHES * ROWS, D_V, seed=4, dtype=dtype)
    weights = torch.rand(BATCHES * ROWS, generator=torch.Generator().manual_seed(5)).to(dtype) + 0.5
    return list(zip(keys.split(ROWS), values.split(ROWS), weights.split(ROWS), strict=True))


def whole(widths=None, group=None):
    """Returns the functions that cut columns and make a state: of all columns, or of those of this process."""
    if widths is None:
        return (lambda tensor: tensor.clone()), lambda weight, prior, **more: RLSState(weight, prior, **more)
    rank = dist.get_rank(group)
    held = slice(sum(widths[:rank]), sum(widths[: rank + 1]))

    def make(weight, prior, **more):
        return RLSState(weight, prior, columns=ShardedColumns(weight, group), **more)

    return (lambda tensor: tensor[..., held].contiguous()), make


def scenario(case, cut, make):
    """Returns what a stream of updates, removals, replacements and a refresh produces, by stage."""
    given, dtype, kind = CASES[case]
    found = {}
    weight = cut(draw(D_V, D_K, seed=0, dtype=given))
    state = make(weight, make_prior(kind), delay=8, dtype=dtype, in_place=True)
    edits = [(cut(keys), values, weights) for keys, values, weights in batches(dtype)]

    def keep(stage, step=None):
        found[stage] = {
            "weight": state.weight.clone(),
            "covariance": state.precision_inverse(),
            "model": weight.clone(),
            "numbers": torch.tensor(
                [state.objective, state.edits, state.deviation(), state.terms().anchors, state.terms().edits ** 2]
            ).double(),
        }
        if step is not None:
            found[stage] |= {"residual": step.residual, "innovation": step.innovation}
            found[stage] |= {} if step.energy is None else {"energy": step.energy}
            found[stage]["change"] = torch.tensor([step.objective, step.change]).double()

    keep("start")
    for edit in edits:
        step = state.update(*edit)
    keep("updated", step)
    for at in range(0, BATCHES, 3):
        step = state.remove(*edits[at])
    left = [edit for at, edit in enumerate(edits) if at % 3]
    keep("removed", step)
    keys, values, weights = left[0]
    keep("replaced", state.replace(keys, values, 2 * values, weights))
    left[0] = (keys, 2 * values, weights)
    keys, values, weights = left[1]
    keep("reweighed", state.reweigh(keys, values, weights, weights / 2))
    left[1] = (keys, values, weights / 2)
    snapshot = state.snapshot()
    state.update(*edits[0])
    state.flush()
    state.restore(snapshot)
    del snapshot
    keep("restored")
    keys, values, weights = edits[0]
    panel = state.project(keys, weights)
    found["panel"] = {
        "gram": panel.gram,
        "cross": panel.cross(edits[1][0]),
        "share": used_share(state, keys, weights),
        "variance": state.prior_variance(keys),
        "outputs": state.outputs(keys),
    }
    keep("projected", state.update_projected(panel, values))
    found["monitor"] = {"residual": torch.tensor([state.monitor().residual])}
    found["saved"] = {"saved": state.saved()}
    state.refresh(*(torch.cat(part) for part in zip(*left, strict=True)))
    keep("refreshed")
    state.update(*edits[3])
    keep("continued")
    return found


def exhausted(rows):
    raise torch.OutOfMemoryError("out of memory")


def refused(cut, make, last):
    """Returns the error of each refused call; `last`: whether this process is the last one, which has the mistake."""
    keys, values, weights = batches(torch.float64)[0]
    keys = cut(keys)
    state = make(cut(draw(D_V, D_K, seed=0)), make_prior("moment"), delay=8)
    state.update(keys, values, weights)
    bad = {"keys": keys.clone(), "values": values.clone(), "weights": weights.clone()}
    if last:
        bad["keys"][1, 0], bad["values"][0, 0], bad["weights"][2] = torch.nan, torch.inf, 0.0
    unknown = 30 * cut(draw(ROWS, D_K, seed=9))
    calls = {
        "keys": lambda: state.update(bad["keys"], values, weights),
        "values": lambda: state.update(keys, bad["values"], weights),
        "weights": lambda: state.update(keys, values, bad["weights"]),
        "count": lambda: state.update(*(each[: 2 if last else 3] for each in (keys, values, weights))),
        "shape": lambda: state.update(keys[:, : -1 if last else None], values),
        "replace": lambda: state.replace(keys, values, bad["values"], weights),
        "reweigh": lambda: state.reweigh(keys, values, weights, weights * (2 if last else 0.5)),
        "refresh": lambda: state.refresh(bad["keys"], values),
        "removal": lambda: state.remove(unknown, values),
        "overflow": lambda: state.update(1e200 * keys, 1e200 * values),
        "prior": lambda: make(cut(draw(D_V, D_K, seed=0)), Prior(lam=0.0, mu=1.0, anchor_keys=draw(3, D_K, seed=1))),
        "weight": lambda: make(cut(draw(D_V, D_K, seed=0)) / (0.0 if last else 1.0), make_prior("moment")),
        "delay": lambda: make(cut(draw(D_V, D_K, seed=0)), make_prior("moment"), delay=int(last)),
    }

    def contents():
        saved = state.saved()
        return [t.clone() for t in (saved.weight, saved.base, saved.pending, saved.image)], saved.objective, state.edits

    found, before = {}, contents()
    for name, call in calls.items():
        try:
            call()
        except Exception as error:
            found[name] = (type(error).__name__, str(error))
        else:
            found[name] = None
    state._base.neg_()
    try:
        state.update(10 * keys, values)
    except Exception as error:
        found["pivot"] = (type(error).__name__, str(error))
    state._base.neg_()
    state._pending.reserve = exhausted if last else type(state._pending).reserve.__get__(state._pending)
    try:
        state.update(keys, values)
    except Exception as error:
        found["memory"] = (type(error).__name__, str(error))
    del state._pending.reserve
    after = contents()
    same = all(torch.equal(*pair) for pair in zip(before[0], after[0], strict=True)) and before[1:] == after[1:]
    state.update(keys, values)  # the processes are still in step
    return found, same, state.objective


def pending_rows(cut, make, last):
    """Returns the pending rows after steps during which only the last process holds a snapshot, and after the last."""
    state = make(cut(draw(D_V, D_K, seed=0)), make_prior("moment"), delay=4)
    snapshot = state.snapshot() if last else None
    counts = []
    for at, (keys, values, weights) in enumerate(batches(torch.float64)[:4]):
        if at == 3:
            del snapshot
        state.update(cut(keys), values, weights)
        counts.append(len(state.saved().pending))
    return counts


def traffic(cut, make, size):
    """Returns what the start and batches of several sizes sent, with the rows and the pending rows before them.

    Each is counted twice: by the columns, and below the functions of `torch.distributed`.
    """
    with Messages(size) as start:
        state = make(cut(draw(D_V, D_K, seed=0)), make_prior("moment"), delay=8)
    found = {"start": (dict(state._columns.sent), start.sent.total(), start.largest), "batches": []}
    for rows, weighted in ((3, True), (2, False), (3, True), (4, True), (9, False)):
        pending, columns = len(state.saved().pending), state._columns
        columns.sent.clear()
        keys, values = cut(draw(rows, D_K, seed=rows)), draw(rows, D_V, seed=rows + 50)
        weights = torch.ones(rows, dtype=torch.float64) if weighted else None
        with Messages(size) as messages:
            state.update(keys, values, weights)
        counted = (messages.sent.total(), messages.largest)
        found["batches"].append((rows, weighted, pending, dict(columns.sent), *counted))
    return found


def main(rank, world, folder):
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    for size in (3, 2, 1):
        group = dist.new_group(range(size))
        if rank >= size:
            continue
        cut, make = whole(WIDTHS[size], group)
        found = {case: scenario(case, cut, make) for case in CASES}
        found["refused"] = refused(cut, make, rank == size - 1)
        found["pending"] = pending_rows(cut, make, rank == size - 1)
        found["traffic"] = traffic(cut, make, size)
        if size == 2:  # a state that three processes held, continued by two
            parts = [torch.load(folder / f"3-{at}.pt", weights_only=False)["float64"]["saved"] for at in range(3)]
            saved = Saved.joined([part["saved"] for part in parts[::-1]])
            keys, values, weights = batches(torch.float64)[2]
            state = make(cut(draw(D_V, D_K, seed=0)), make_prior("moment"), delay=8, saved=saved)
            state.update(cut(keys), values, weights)
            found["resumed"] = {"weight": state.weight, "covariance": state.precision_inverse()}
        torch.save(found, folder / f"{size}-{rank}.pt")
        dist.barrier(group)
    dist.destroy_process_group()


if __name__ == "__main__":
    context = multiprocessing.get_context("fork")  # torch is imported once; nothing has run in it yet
    running = [context.Process(target=main, args=(rank, 3, Path(sys.argv[1]))) for rank in range(3)]
    for process in running:
        process.start()
    for process in running:
        process.join()
    sys.exit(any(process.exitcode for process in running))
