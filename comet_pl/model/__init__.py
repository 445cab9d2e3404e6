"""The model: torch and transformers only."""
