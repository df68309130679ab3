"""Randomness depends only on the run's seed and on what is computed, never on the rank or process computing it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def sample_rng(seed: int, epoch: int, sample: int, repeat: int = 0) -> np.random.Generator:
    """RNG for one sample's augmentation in one epoch; for copy `repeat` of it, where sampling repeats it."""
    return np.random.Generator(np.random.PCG64([seed, epoch, sample, *([repeat] if repeat else [])]))


def source_seed(seed: int, source: int) -> int:
    """The seed of the plan and augmentation of one of several training sets: that of the run for the first, others for
    the rest, so that a set that is named twice is drawn from independently."""
    if not source:
        return seed
    low, high = np.random.SeedSequence([seed, 2, source]).generate_state(2)
    return (int(high) << 32 | int(low)) & (2**63 - 1)


def micro_batch_seed(seed: int, number: int) -> int:
    """A 63-bit seed for all of torch's draws in micro-batch `number`: stochastic depth, dropout, points."""
    low, high = np.random.SeedSequence([seed, 1, number]).generate_state(2)
    return (int(high) << 32 | int(low)) & (2**63 - 1)


def seed_micro_batch(seed: int, number: int, device: torch.device) -> torch.Generator:
    """Seed torch's global RNG for the forward pass; return a generator on `device` for the loss's points."""
    torch.manual_seed(micro_batch_seed(seed, number))
    return torch.Generator(device).manual_seed(micro_batch_seed(seed + 1, number))


def transform_generator(seed: int, number: int, device: torch.device) -> torch.Generator:
    """A generator on `device` for the user's augmentation of micro-batch `number`."""
    return torch.Generator(device).manual_seed(micro_batch_seed(seed + 2, number))


@contextmanager
def deterministic_algorithms(enabled: bool) -> Iterator[None]:
    """Inside, if enabled, a GPU adds floats in a fixed order too; torch raises RuntimeError where it cannot.

    Modules of ours replace such operations by others where torch.are_deterministic_algorithms_enabled().
    """
    if not enabled:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
    attention = torch.backends.cuda
    before = (torch.are_deterministic_algorithms_enabled(), attention.mem_efficient_sdp_enabled(),
              attention.cudnn_sdp_enabled())
    torch.use_deterministic_algorithms(True)
    attention.enable_mem_efficient_sdp(False)  # their backward passes are not deterministic
    attention.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        attention.enable_mem_efficient_sdp(before[1])
        attention.enable_cudnn_sdp(before[2])
