"""Placeholder while being written."""
from __future__ import annotations
from proximo.collect.envs import SerialEnvs as WorkerEnvs  # noqa: F401
