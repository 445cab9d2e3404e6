"""Run folders, checkpoints and sweeps."""
