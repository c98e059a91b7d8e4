"""Weights, gradients and optimiser state divided over ranks (FSDP2, `torch.distributed.fsdp.fully_shard`).

Pretext tasks run parts of a network by themselves (`encode`, `decode`, a few blocks), so the whole is never called and
one shard for it would never be gathered. Every module that holds parameters is therefore a unit of its own: whoever
calls it, its weights are gathered for that call and given back after it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from medcl.networks.backbones import Backbone, build_backbone


def shard(module: nn.Module, mesh: Any) -> None:
    """Divides the parameters of `module` over the ranks of a device mesh, in place.

    Args:
        module: of which every submodule uses its own parameters in its `forward` alone.
        mesh: a one-dimensional `torch.distributed.device_mesh.DeviceMesh`.
    """
    from torch.distributed.fsdp import fully_shard

    for part in reversed(list(module.modules())):  # children before those that hold them
        if any(True for _ in part.parameters(recurse=False)):
            part.register_forward_hook(_copied)  # before FSDP's own hook
            # given back at once also where no gradient comes by: a teacher's never does
            fully_shard(part, mesh=mesh, reshard_after_forward=True)


def _copied(module: nn.Module, inputs: Any, output: Any) -> Any:
    """Some layers return a view (instance normalisation does); a change in place would drop what FSDP hangs on it."""
    return output.clone() if isinstance(output, Tensor) and output._is_view() else output


def is_sharded(module: nn.Module) -> bool:
    """Whether the module's parameters are divided over processes."""
    return any(hasattr(p, "full_tensor") for p in module.parameters())


def whole(backbone: Backbone) -> Backbone:
    """The network with all of its weights on the CPU; itself where it is not divided. All ranks must call it."""
    if not is_sharded(backbone):
        return backbone
    state = {name: full(tensor.detach()).cpu() for name, tensor in backbone.net.state_dict().items()}
    copy = build_backbone(backbone.spec)
    copy.net.load_state_dict(state, strict=True)
    return copy


def full(tensor: Tensor) -> Tensor:
    """A tensor of which every rank holds a part, joined; any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def own(tensor: Tensor) -> Tensor:
    """What this rank holds of a parameter, without its gradient: a view of the same memory."""
    tensor = tensor.detach()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
