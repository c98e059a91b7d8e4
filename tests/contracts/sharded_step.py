"""On two processes: steps of a divided network against those of a whole one, and of its momentum teacher."""

from __future__ import annotations

import copy
import json
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from medcl.networks.backbones import BackboneSpec, build_backbone
from medcl.networks.ema import MomentumTeacher
from medcl.networks.sharding import full, is_sharded, own, shard, whole

STRIDES, SIDE = ((2, 2, 2), (2, 2, 2)), {"unet": 16, "dynunet": 16, "swin_unetr": 64}


def train(backbone, teacher, x) -> list[float]:
    """Two steps of gradient descent on a loss of all maps and logits; the norm of every gradient."""
    norms = []
    optimizer = torch.optim.SGD(backbone.parameters(), 0.01)
    for _ in range(2):
        maps = backbone.encode(x)
        loss = torch.stack([m.square().mean() for m in (*maps, backbone.decode(maps), backbone.decode(maps, 1))]).sum()
        (loss + (teacher.module.encode(x)[-1].detach() - maps[-1]).square().mean()).backward()
        norms.append(float(full(torch.nn.utils.clip_grad_norm_(backbone.parameters(), 1.0))))
        optimizer.step()
        optimizer.zero_grad()
        teacher.update(backbone, 0.9)
    return norms


def compare(name: str) -> dict[str, Any]:
    """What a backbone's steps give, divided over the processes of the group and whole."""
    rank, mesh = dist.get_rank(), init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    strides = ((2, 2, 2),) * 5 if name == "swin_unetr" else STRIDES
    one = build_backbone(BackboneSpec(name, 1, 3, strides, 12 if name == "swin_unetr" else 4)).eval()
    many = copy.deepcopy(one)
    teachers = [MomentumTeacher(one), MomentumTeacher(many)]
    shard(many, mesh)
    shard(teachers[1], mesh)
    x = torch.randn(2, 1, *(SIDE[name],) * 3, generator=torch.Generator().manual_seed(1))
    norms = [train(one, teachers[0], x), train(many, teachers[1], x[rank : rank + 1])]
    pairs = [
        (a, b) for mine, theirs in ((one, whole(many)), (teachers[0].module, whole(teachers[1].module)))
        for a, b in zip(mine.net.state_dict().values(), theirs.net.state_dict().values(), strict=True)
    ]  # fmt: skip
    held = sum(own(p).numel() for p in many.parameters()) / sum(p.numel() for p in one.parameters())
    return {
        "sharded": is_sharded(many) and not is_sharded(one), "held": held, "norms": norms,
        "apart": max(float((a - b).abs().max()) for a, b in pairs),
    }  # fmt: skip


def check(found: dict[str, Any]) -> None:
    assert found["sharded"] and found["held"] < 0.6  # an uneven tensor's remainder is the first rank's
    for divided, whole_one in zip(found["norms"][1], found["norms"][0], strict=True):
        assert abs(divided - whole_one) < 1e-4 * whole_one
    assert found["apart"] < 1e-5


def main(name: str) -> None:
    dist.init_process_group("gloo")
    found = compare(name)
    if dist.get_rank() == 0:
        print(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
