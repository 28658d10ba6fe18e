"""Errors of a user's input: configuration, data, checkpoint. A message says what is wrong, where, and how to fix it."""

from __future__ import annotations


class VitaError(Exception):
    """Base of every error that a user can fix. Command lines turn it into one line and an exit status."""

    exit_status = 1


class ConfigError(VitaError):
    """A recipe, flag or layout that cannot work. Raised before anything expensive starts."""

    exit_status = 2


class DataError(VitaError):
    """A dataset, shard or medium that is missing, damaged or of another shape than promised."""


class CheckpointError(VitaError):
    """A checkpoint or Hugging Face folder that is missing, damaged or of another shape than the model."""


class DamagedError(CheckpointError):
    """A checkpoint whose files are no longer those that were written: missing, of another size, or changed. Training
    sets it aside and goes on from an older one; whatever else is wrong with a checkpoint is no reason to."""
