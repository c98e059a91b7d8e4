"""Reads that lie partly beyond their volumes."""

from __future__ import annotations

import torch


def reads_of(starts, extents, size):
    reads = {"image": torch.randn(len(starts), 1, *size)}
    return {**reads, "start": torch.tensor(starts), "extent": torch.tensor(extents)}
