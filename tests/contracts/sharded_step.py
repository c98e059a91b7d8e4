"""For tests/networks/test_sharding.py, on two processes: steps of a divided network against those of a whole one."""

from __future__ import annotations

import copy
import json
import sys

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


def main(name: str) -> None:
    dist.init_process_group("gloo")
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
    if rank == 0:
        print(json.dumps({
            "sharded": is_sharded(many) and not is_sharded(one), "held": held, "norms": norms,
            "apart": max(float((a - b).abs().max()) for a, b in pairs),
        }))  # fmt: skip
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
