"""Damaged checkpoints by the ten thousands."""
