"""Checks that every pretext task must pass, in the manner of scikit-learn's `check_estimator`.

Each `check_*` takes a `Case` and raises an AssertionError that says what is wrong.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from recipes import WIDTHS, Case
from torch import Tensor

from medcl.networks.backbones import BackboneSpec, build_backbone
from medcl.pretext.base import PretextTask
from medcl.pretext.registry import TASKS, task_class
from medcl.store.crops import Partitions

Tensors = dict[str, Tensor]


def build(case: Case, seed: int = 0, **options: Any) -> PretextTask:
    """The task in training mode, with weights drawn from `seed`."""
    torch.manual_seed(seed)
    return task_class(case.task)(case.network(), case.plan, case.resolved(**options)).train()


def volume(number: int, shape: tuple[int, int, int]) -> Tensor:
    """A synthetic subject (1, *shape): smooth anatomy that all share, and some of its own."""

    def blobs(seed: int, cells: int) -> Tensor:
        coarse = torch.randn(1, 1, cells, cells, cells, generator=torch.Generator().manual_seed(seed))
        return F.interpolate(coarse, size=shape, mode="trilinear", align_corners=True)[0]

    return blobs(1000, 5) + 0.7 * blobs(number, 6) + 0.1 * blobs(2000 + number, 16)


def batch_for(task: PretextTask, volumes: range) -> Tensors:
    """Reads as `medcl.store.crops.ReadDataset` gives them; one axis is shorter than the read, one longer.

    Axes that are divided into partitions are long enough for the partitions to differ.
    """
    reads: dict[str, list[Tensor]] = {name: [] for name in ("image", "seed", "volume", "place", "start", "extent")}
    a, b, c = task.read_size
    grid = task.places.grid if isinstance(task.places, Partitions) else (1, 1, 1)
    sizes = zip((a + 6, b, c - 2), task.read_size, grid, strict=True)
    shape = tuple(n if g == 1 else read * (g + 1) for n, read, g in sizes)
    assert not isinstance(task.places, Partitions) or task.places.distinct(shape, task.read_size)
    for number in volumes:
        image, rng = volume(number, shape), np.random.default_rng(number)
        for place, start in enumerate(task.places(shape, task.read_size, rng)):
            index = [
                (torch.arange(n) + s).clamp(0, extent - 1)
                for s, n, extent in zip(start, task.read_size, shape, strict=True)
            ]
            reads["image"].append(image[:, index[0]][:, :, index[1]][:, :, :, index[2]])
            reads["seed"].append(torch.tensor(int(rng.integers(0, 2**62))))
            reads["volume"].append(torch.tensor(number))
            reads["place"].append(torch.tensor(place))
            reads["start"].append(torch.tensor(start))
            reads["extent"].append(torch.tensor(shape))
    return {name: torch.stack(rows) for name, rows in reads.items()}


def views_of(task: PretextTask, volumes: int | range) -> Tensors:
    with torch.no_grad():
        return task.views(batch_for(task, volumes if isinstance(volumes, range) else range(volumes)))


def trained(task: PretextTask) -> list[torch.nn.Parameter]:
    return [p for p in task.parameters() if p.requires_grad]


def step(task: PretextTask, views: Tensors, optimizer: torch.optim.Optimizer, progress: float = 0.0) -> Tensors:
    optimizer.zero_grad()
    parts = task.loss(views)
    parts["loss"].backward()
    optimizer.step()
    task.after_step(progress)
    return {name: value.detach() for name, value in parts.items()}


def check_one_step(case: Case) -> None:
    """A finite loss; gradient for what should train and nothing else; a start that has not collapsed."""
    one_step(case)


def check_one_step_and_its_saved_state(case: Case) -> None:
    """`check_one_step`, and that loading the weights gives back the loss: for what is slow to run and to build."""
    task, views, loss = one_step(case)
    saved = {name: tensor.clone() for name, tensor in task.state_dict().items()}
    with torch.no_grad():
        for parameter in task.parameters():
            parameter.add_(0.1)
        task.load_state_dict(saved, strict=True)
        assert torch.equal(task.loss(views)["loss"], loss)


def one_step(case: Case) -> tuple[PretextTask, Tensors, Tensor]:
    task = build(case)
    views = views_of(task, case.volumes)
    z, marks = task.embed(views)
    parts = task.objective(z, marks)
    assert parts["loss"].shape == () and parts["loss"].dtype == torch.float32
    assert all(bool(value.isfinite().all()) for value in parts.values())
    parts["loss"].backward()
    assert_gradient_reaches_what_trains(task)
    assert_not_collapsed(task, views, z, marks)
    return task, views, parts["loss"].detach()


def assert_gradient_reaches_what_trains(task: PretextTask) -> None:
    backbone = task.backbone
    parts = {part: backbone.tensor_names(part) for part in ("encoder", "decoder", "head")}
    ids = {id(p): name for name, p in backbone.net.named_parameters(remove_duplicate=False)}
    reached: dict[str, set[str]] = {part: set() for part in parts}
    wanted = {
        part: {ids[id(p)] for p in backbone.net.parameters() if ids[id(p)] in names} for part, names in parts.items()
    }
    for name, parameter in task.named_parameters():
        gradient = parameter.grad
        if gradient is not None:
            assert parameter.requires_grad and bool(gradient.isfinite().all()), name
        if id(parameter) in ids:
            own = ids[id(parameter)]
            part = next(part for part in parts if own in parts[part])
            if gradient is not None:
                reached[part].add(own)
        elif parameter.requires_grad:
            assert gradient is not None, f"no gradient reaches {name}"
        # a bias in front of a normalisation has a gradient of 0 by right; a weight has not
        if gradient is not None and gradient.ndim > 1:
            assert bool(gradient.any()), f"the gradient of {name} is zero"
    encoder = reached["encoder"] if "encoder" in task.trains else wanted["encoder"]
    if "encoder" not in task.trains:
        assert not reached["encoder"]
    past = reached["decoder"] | reached["head"]
    found = depths(task, wanted["encoder"])
    assert (encoder, past) in found
    if "decoder" in task.trains:  # as deep as the task says it looks, and no less
        looking = (m for m in task.modules() if hasattr(getattr(m, "options", None), "blocks"))
        depth = next((m.blocks for m in looking), None)
        wanted_past = found[-1 if depth is None else 1 + 2 * depth][1] & wanted["decoder"]
        assert reached["decoder"] == wanted_past != set(), "part of the decoder is not reached"


def depths(task: PretextTask, encoder: set[str]) -> list[tuple[set[str], set[str]]]:
    """Parameters of encoder and of decoder that a loss can reach, for every depth of the network that it may look at.

    Skip encoders, as those of `swin_unetr`, are reached by losses that look at every level, or past them.
    """
    backbone = task.backbone
    ids = {id(p): name for name, p in backbone.net.named_parameters(remove_duplicate=False)}
    a, b, c = backbone.multiple
    smallest = (2 * a, b, c)  # instance norm wants more than one voxel at the bottom
    wanted = [p.requires_grad for p in backbone.net.parameters()]
    backbone.net.requires_grad_(True)
    features = backbone.encode(torch.randn(1, 1, *smallest))
    mine = list(backbone.net.parameters())
    looks = {0: features[-1], **{n: backbone.decode(features, n) for n in (*range(1, len(features)), None)}}  # in order
    out: list[tuple[set[str], set[str]]] = [(encoder, set())]
    for look in looks.values():
        found = torch.autograd.grad(look.sum(), mine, allow_unused=True, retain_graph=True)
        names = {ids[id(p)] for p, g in zip(mine, found, strict=True) if g is not None}
        past = names - encoder
        out += [(names & encoder, past), (encoder, past)]
    for parameter, before in zip(mine, wanted, strict=True):
        parameter.requires_grad_(before)
    return out


def assert_not_collapsed(task: PretextTask, views: Tensors, z: Tensors, marks: Tensors) -> None:
    with torch.no_grad():
        pairs = task.pairs(views, z, marks)
    rows = {"embeddings": None if pairs is None else pairs.z, "features": marks.get("features")}
    for name, tensor in rows.items():
        if tensor is None:
            continue
        flat = tensor.detach().float().flatten(0, -2)
        # two points always lie on a line
        assert len(flat) < 3 or effective_rank(flat) > 1.5, f"the {name} lie on a line"
        unit = F.normalize(flat, dim=1)
        assert float((unit - unit.mean(0)).norm(dim=1).mean()) > 1e-3, f"all {name} are the same"


def effective_rank(rows: Tensor) -> float:
    """exp of the entropy of the normalised singular values of the centred rows (Roy and Vetterli, 2007)."""
    values = torch.linalg.svdvals(rows - rows.mean(0))
    p = values / values.sum().clamp(min=1e-12)
    return float(torch.exp(-(p * p.clamp(min=1e-12).log()).sum()))


def check_equal_seeds_and_saved_state_give_equal_steps(case: Case) -> None:
    """The second step of a run equals that of the same run, and that of a run loaded from its first step."""
    results = []
    for _ in range(2):
        task = build(case)
        views = views_of(task, case.volumes)
        optimizer = torch.optim.AdamW(trained(task), 1e-3)
        step(task, views, optimizer, 0.3)
        saved = {name: tensor.clone() for name, tensor in task.state_dict().items()}
        moments = copy.deepcopy(optimizer.state_dict())
        step(task, views, optimizer, 0.6)
        results.append(task.state_dict())
    assert_equal_states(*results)
    fresh = build(case, seed=1)
    fresh.load_state_dict(saved, strict=True)
    optimizer = torch.optim.AdamW(trained(fresh), 1e-3)
    optimizer.load_state_dict(moments)
    step(fresh, views, optimizer, 0.6)
    assert_equal_states(results[0], fresh.state_dict())


def assert_equal_states(one: Tensors, other: Tensors) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), f"{name} differs"


def check_one_batch_can_be_learned(case: Case) -> None:
    """Some dozens of Adam steps on one batch end well below the start, and below what knows no anatomy."""
    task, recipe = build(case), case.recipe
    views = views_of(task, case.volumes)
    with torch.no_grad():
        z, marks = task.embed(views)
        trivial = task.trivial(z, marks)
        floor = trivial.pop("collapsed", 0.0)  # where equal embeddings are the optimum itself
        trivial = {k: v for k, v in trivial.items() if k in ("constant", "orthogonal")}
        start = float(task.objective(z, marks)["loss"])
    optimizer = torch.optim.AdamW(trained(task), recipe.lr, weight_decay=0.0)
    # the network itself is no other task's: where it is slow, a shorter look shows that the loss falls
    steps, goal = (recipe.steps, recipe.goal) if case.backbone == "unet" else (recipe.steps // 2, 0.5 + recipe.goal / 2)
    for _ in range(steps):
        last = float(step(task, views, optimizer)["loss"])
    bounds = {"start": start, **trivial}
    assert last - floor < goal * (min(bounds.values()) - floor), f"ends at {last:.4f}; {bounds}"


def check_half_precision_at_a_low_temperature(case: Case) -> None:
    """Loss and gradient are finite in bf16 autocast, at a temperature of 0.01 where the task has one."""
    names = [f.name for f in dataclasses.fields(task_class(case.task).Options) if f.name.endswith("temperature")]
    task = build(case, **dict.fromkeys(names, 0.01), **cold_parts(case))
    views = views_of(task, case.volumes)
    with torch.autocast("cpu", torch.bfloat16):
        loss = task.loss(views)["loss"]
    loss.backward()
    assert loss.dtype == torch.float32 and bool(loss.isfinite())
    for name, parameter in task.named_parameters():
        assert parameter.grad is None or bool(parameter.grad.isfinite().all()), name


def cold_parts(case: Case) -> dict[str, Any]:
    """Options of the tasks that a task is made of, at a temperature of 0.01."""
    parts = {k: v for k, v in case.resolved().items() if k in TASKS}
    return {name: {**options, "temperature": 0.01} for name, options in parts.items()}


def check_views_are_functions_of_each_read(case: Case) -> None:
    """A read gives the same views alone as among others, twice over, and is not written to."""
    task = build(case)
    batch = batch_for(task, range(case.volumes))
    before = {name: tensor.clone() for name, tensor in batch.items()}
    with torch.no_grad():
        whole, again = task.views(batch), task.views(batch)
        for name, tensor in batch.items():
            assert torch.equal(tensor, before[name]), f"{name} of the batch was written to"
        count, row = len(batch["image"]), 1
        alone = task.views({name: tensor[row : row + 1] for name, tensor in batch.items()})
    for name, tensor in whole.items():
        assert torch.equal(tensor, again[name]), name
        assert len(tensor) % count == 0, f"{name} has {len(tensor)} rows for {count} reads"
        each = len(tensor) // count
        # the views of a read are side by side, or a batch of first views is followed by one of second views
        layouts = tensor.view(count, each, *tensor.shape[1:])[row], tensor.view(each, count, *tensor.shape[1:])[:, row]
        assert any(same(layout, alone[name]) for layout in layouts), f"{name} depends on the other reads"


def same(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-5, atol=1e-5) if a.is_floating_point() else torch.equal(a, b)


def check_other_seeds_give_other_views(case: Case) -> None:
    task = build(case)
    batch = batch_for(task, range(2))
    with torch.no_grad():
        one, other = task.views(batch), task.views({**batch, "seed": batch["seed"] + 1})
    assert any(not same(tensor, other[name]) for name, tensor in one.items())


def check_nothing_is_learnt_where_there_is_no_data(case: Case) -> None:
    """Whatever a read holds beyond its volume: equal gradients, of networks of volumes and of slices."""
    for dims in (3,) if case.backbone == "swin_unetr" else (3, 2):  # which sees no slices by themselves
        torch.manual_seed(0)
        plan = case.plan if dims == 3 else case.plan.slicewise()
        spec = BackboneSpec(case.backbone, strides=plan.strides, width=WIDTHS[case.backbone], spatial_dims=dims)
        task = task_class(case.task)(build_backbone(spec), plan, case.resolved())
        batch = batch_for(task, range(case.volumes))
        batch["start"][:, 1], batch["extent"][:, 1] = -2, batch["image"].shape[3] - 4
        inside = torch.zeros(batch["image"].shape[2:], dtype=torch.bool)
        inside[:, 2:-2] = True
        other = {**batch, "image": torch.where(inside, batch["image"], 1e3 * torch.randn_like(batch["image"]))}
        one, two = (gradients_of(task, reads) for reads in (batch, other))
        assert any(gradient.any() for gradient in one.values())
        assert one.keys() == two.keys()
        for name, gradient in one.items():
            assert torch.isfinite(gradient).all() and torch.equal(gradient, two[name]), f"{name} in {dims}D"


def gradients_of(task: PretextTask, batch: Tensors) -> Tensors:
    """Gradients of the loss, and of the term that keeps the rank, by name."""
    for parameter in task.parameters():
        parameter.grad = None
    torch.manual_seed(1)  # dropout
    with torch.no_grad():
        views = task.views(batch)
    z, marks = task.embed(views)
    (task.objective(z, marks)["loss"] + 0.1 * task.unused_rate(marks)).backward()
    return {name: p.grad.clone() for name, p in task.named_parameters() if p.grad is not None}


CHECKS = (
    check_one_step,
    check_equal_seeds_and_saved_state_give_equal_steps,
    check_one_batch_can_be_learned,
    check_half_precision_at_a_low_temperature,
    check_views_are_functions_of_each_read,
    check_other_seeds_give_other_views,
    check_nothing_is_learnt_where_there_is_no_data,
)
# Inputs of 64 voxels take seconds a step on one thread: what needs many steps runs on the other backbones alone.
SWIN_CHECKS = (check_one_step_and_its_saved_state,)
SWIN_IN_BF16 = ("mae", "pixcontrast", "voco")  # which is how it is trained on a GPU; one task of each kind
