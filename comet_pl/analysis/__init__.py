"""Instruments: gates, memories, operation and byte counts."""
