"""Two processes take the step that one takes with their joined batch: for every task, in one pair of processes."""

from __future__ import annotations

import datetime
import traceback
from collections.abc import Sequence
from pathlib import Path

import pytest
import sharded_step
import torch
import torch.distributed as dist
from battery import build, views_of
from recipes import Case, cases
from torch import Tensor

from medcl.losses.segmentation import consistency, dice_ce, shares
from medcl.pretext.base import PretextTask

RANKS = 2
PER_RANK = 2  # volumes
RUNS = [pytest.param(case, id=str(case), marks=[pytest.mark.battery] if case.options else [])
        for case in cases(("unet",))]  # fmt: skip
# A batch of another size is rounded otherwise, and a hidden unit of a head may fall on the other side of its ReLU: on
# one processor PixPro's gradient above that ReLU agrees to 2e-6 and below it to 4e-3, 3e-4 of the whole. Without the
# other rank's volumes it is 0.07 off or more.
ROUNDING = 1e-3
STAGES = Case("global_local", "unet", (("mode", "stagewise"),))


def gradients(case: Case, volumes: range) -> tuple[float, dict[str, Tensor]]:
    task = build(case)
    loss = task.loss(views_of(task, volumes))["loss"]
    loss.backward()
    return float(loss.detach()), {n: p.grad for n, p in task.named_parameters() if p.grad is not None}


class Loss(torch.nn.Module):
    """A task whose forward is its loss, which is what data-parallel training wraps."""

    def __init__(self, task: PretextTask):
        super().__init__()
        self.task = task

    def forward(self, views: dict[str, Tensor]) -> Tensor:
        z, marks = self.task.joined(views)
        return self.task.objective(z, marks)["loss"] + self.task.unused_rate(marks)


def staged(rank: int | None) -> list[dict[str, Tensor]]:
    """Weights after two steps of each stage, the rank term included: on one rank of two, or (None) alone."""
    task = build(STAGES)
    wrapped = Loss(task)
    if rank is not None:  # each stage leaves parameters without gradient
        wrapped = torch.nn.parallel.DistributedDataParallel(wrapped, find_unused_parameters=True)  # type: ignore
    volumes = range(RANKS * PER_RANK) if rank is None else range(rank * PER_RANK, (rank + 1) * PER_RANK)
    optimizer = torch.optim.SGD(task.parameters(), 0.01, weight_decay=0.1)
    weights = []
    for progress in (0.25, 0.5, 0.75, 1.0):
        optimizer.zero_grad()
        wrapped(views_of(task, volumes)).backward()
        optimizer.step()
        task.after_step(progress)
        weights.append({name: p.detach().clone() for name, p in task.named_parameters()})
    return weights


def supervised(rows: slice) -> list[Tensor]:
    """Losses of segmentation, and their gradients, of some rows of a batch whose rows differ much in what they hold."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(4, 3, 4, 4, 4, generator=generator)
    noise = torch.rand(2, 4, 1, 4, 4, 4, generator=generator)
    label = (noise[0] * torch.tensor([1.0, 1.1, 2.0, 3.0]).view(4, 1, 1, 1, 1)).long()
    weight = (noise[1] < torch.tensor([0.1, 0.5, 0.9, 1.0]).view(4, 1, 1, 1, 1)).float()
    guess = torch.softmax(torch.randn(4, 3, 4, 4, 4, generator=generator), 1)
    found = []
    for loss in (
        lambda x: dice_ce(x, shares(label[rows], 3)),
        lambda x: dice_ce(x, shares(label[rows], 3), weight[rows]),
        lambda x: consistency(x, guess[rows], weight[rows]),
    ):
        mixing = torch.eye(3, requires_grad=True)
        value = loss(torch.einsum("kc,ncxyz->nkxyz", mixing, image[rows]))
        value.backward()
        found += [value.detach(), mixing.grad]
    return found  # type: ignore[return-value]


def work(rank: int, folder: str, chosen: Sequence[Case]) -> None:
    """One rank: mean loss and mean gradient over ranks of every case, written by rank 0."""
    torch.set_num_threads(1)
    wait = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", f"file://{folder}/ranks", rank=rank, world_size=RANKS, timeout=wait)
    results: dict[str, object] = {}
    for case in chosen:
        try:
            loss, grads = gradients(case, range(rank * PER_RANK, (rank + 1) * PER_RANK))
            mean = torch.cat([torch.tensor([loss]), *(g.flatten() for g in grads.values())])
            dist.all_reduce(mean)
            results[str(case)] = (mean / RANKS, list(grads))
        except Exception:
            results[str(case)] = traceback.format_exc()
            break  # the ranks are no longer in step
    else:
        try:
            results["stages"] = staged(rank)
        except Exception:
            results["stages"] = traceback.format_exc()
        try:
            means = supervised(slice(rank * PER_RANK, (rank + 1) * PER_RANK))
            for tensor in means:
                dist.all_reduce(tensor)
            results["supervised"] = [tensor / RANKS for tensor in means]
        except Exception:
            results["supervised"] = traceback.format_exc()
        try:
            results["sharded"] = sharded_step.compare("unet")
        except Exception:
            results["sharded"] = traceback.format_exc()
    if rank == 0:
        torch.save(results, f"{folder}/results.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def joint_results(tmp_path_factory, request) -> dict:
    folder: Path = tmp_path_factory.mktemp("ranks")
    with_case = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    chosen = list(dict.fromkeys(each["case"] for each in with_case if isinstance(each.get("case"), Case)))
    chosen = [case for case in chosen if case in [run.values[0] for run in RUNS]]
    torch.multiprocessing.spawn(work, (str(folder), chosen), nprocs=RANKS)
    return torch.load(folder / "results.pt", weights_only=True)


@pytest.mark.parametrize("case", RUNS)
def test_two_ranks_give_the_gradient_of_one_with_the_joined_batch(joint_results, case):
    result = joint_results.get(str(case), "not run, because an earlier task failed")
    assert not isinstance(result, str), result
    joint, names = result
    loss, grads = gradients(case, range(RANKS * PER_RANK))
    assert names == list(grads)
    assert float(joint[0]) == pytest.approx(loss, rel=1e-5)
    single = torch.cat([g.flatten() for g in grads.values()])
    assert float((joint[1:] - single).norm() / single.norm()) < ROUNDING


@pytest.mark.parametrize("case", RUNS)
def test_the_gradient_of_a_rank_alone_is_another_one(case):
    """The comparison above can fail: the two ranks' batches do not ask for the same step by chance."""
    _, whole = gradients(case, range(RANKS * PER_RANK))
    _, first = gradients(case, range(PER_RANK))
    a, b = (torch.cat([g.flatten() for g in grads.values()]) for grads in (whole, first))
    assert float((a - b).norm() / a.norm()) > 1e-2


def test_stages_on_two_ranks_are_those_of_one_with_the_joined_batch(joint_results):
    joint = joint_results["stages"]
    assert not isinstance(joint, str), joint
    alone = staged(None)
    for step, (ours, theirs) in enumerate(zip(joint, alone, strict=True)):
        assert ours.keys() == theirs.keys()
        # of all weights together: single biases near 0 carry rounding that four steps enlarge
        apart, size = (torch.cat([w.flatten() for w in each]).norm() for each in (
            [ours[name] - theirs[name] for name in ours], theirs.values()
        ))  # fmt: skip
        assert float(apart / size) < ROUNDING, f"step {step} differs by {float(apart / size)}"
    encoder = [n for n in joint[0] if n.removeprefix("backbone.net.") in build(STAGES).backbone.tensor_names("encoder")]
    assert encoder and all(torch.equal(joint[1][name], joint[3][name]) for name in encoder)  # frozen, not decayed
    assert any(not torch.equal(joint[0][name], joint[1][name]) for name in encoder)


def test_segmentation_losses_of_two_ranks_are_those_of_one_with_the_joined_batch(joint_results):
    """The Dice of a class over the batch is no mean of the ranks' own, nor is a mean over trusted voxels."""
    joint = joint_results["supervised"]
    assert not isinstance(joint, str), joint
    alone = supervised(slice(None))
    halves = [supervised(slice(k, k + PER_RANK)) for k in (0, PER_RANK)]
    for k, (ours, theirs) in enumerate(zip(joint, alone, strict=True)):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
        apart = (halves[0][k] + halves[1][k]) / 2 - theirs
        assert float(apart.norm() / theirs.norm()) > 1e-3  # a rank's own loss is another one


def test_a_divided_network_takes_the_steps_of_a_whole_one(joint_results):
    assert not isinstance(joint_results["sharded"], str), joint_results["sharded"]
    sharded_step.check(joint_results["sharded"])
