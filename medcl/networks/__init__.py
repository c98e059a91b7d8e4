"""MONAI backbones with one pyramid interface, and the heads on top of them."""
