"""Pipelines, rounds and sweeps: many runs in order, each resumable."""
