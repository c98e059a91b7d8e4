"""Every backbone: the pyramid interface gives what MONAI's own forward gives, and its parts partition its tensors."""

from __future__ import annotations

import pytest
import torch

from medcl.errors import MedclError
from medcl.networks.backbone import NORMS
from medcl.networks.backbones import BACKBONES, BackboneSpec, build_backbone

ISOTROPIC, THICK = ((2, 2, 2),) * 3, ((2, 2, 1), (2, 2, 2), (2, 2, 1))


def build(name: str, strides=ISOTROPIC, classes: int = 3, **more):
    torch.manual_seed(0)
    width = 12 if name == "swin_unetr" else 4
    return build_backbone(BackboneSpec(name, 1, classes, strides, width, **more))


def image_for(name: str) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(1, 1, 64, 32, 32) if name == "swin_unetr" else torch.randn(2, 1, 16, 32, 16)


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("strides", [ISOTROPIC, THICK], ids=["isotropic", "thick"])
def test_encode_and_decode_are_monais_forward(name, strides):
    backbone, x = build(name, strides).eval(), image_for(name)
    with torch.no_grad():
        features = backbone.encode(x)
        assert torch.equal(backbone.decode(features), backbone.net(x))
        partly = backbone.decode(features, blocks=1)
    assert [f.shape[1] for f in features] == list(backbone.channels)
    for feature, reduction in zip(features, backbone.reductions, strict=True):
        assert tuple(feature.shape[2:]) == tuple(n // r for n, r in zip(x.shape[2:], reduction, strict=True))
    assert all(features[-1].shape[i] <= partly.shape[i] <= x.shape[i] for i in (2, 3, 4))


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("norm", NORMS)
def test_parts_partition_the_state_dict(name, norm):
    backbone = build(name, norm=norm)
    parts = [backbone.tensor_names(part) for part in ("encoder", "decoder", "head")]
    assert sum(map(len, parts)) == len(set().union(*parts)) == len(backbone.net.state_dict())
    assert all(parts)


@pytest.mark.parametrize("name", BACKBONES)
def test_only_the_head_depends_on_the_number_of_classes(name):
    few, many = build(name, classes=2), build(name, classes=5)
    shapes = [{k: v.shape for k, v in b.net.state_dict().items()} for b in (few, many)]
    changed = {k for k in shapes[0] if shapes[0][k] != shapes[1].get(k)}
    assert changed and changed <= few.tensor_names("head")


@pytest.mark.parametrize("name", BACKBONES)
def test_gradient_of_the_features_stays_in_the_encoder(name):
    backbone = build(name)
    sum(f.square().mean() for f in backbone.encode(image_for(name))).backward()
    encoder = {id(p) for p in backbone.encoder_parameters()}
    for parameter in backbone.parameters():
        assert (parameter.grad is not None) == (id(parameter) in encoder)


def test_bf16_gradients_are_right_where_maps_are_two_planes_deep():
    """Torch's own bf16 weight gradient is garbage there on CPUs (up to 1e32)."""
    backbone = build("unet")
    x = torch.randn(4, 1, 16, 16, 16)

    def gradients(autocast: bool):
        backbone.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            sum(f.float().square().mean() for f in backbone.encode(x)).backward()
        return [p.grad.clone() for p in backbone.encoder_parameters()]

    for exact, rounded in zip(gradients(False), gradients(True), strict=True):
        assert (exact - rounded).norm() <= 0.2 * exact.norm() + 1e-3


def test_unknown_names_are_refused_with_what_is_known():
    with pytest.raises(MedclError, match="unet, dynunet, swin_unetr"):
        build("resnet")
    with pytest.raises(MedclError, match="instance, layer, batch"):
        build("unet", norm="weight")
