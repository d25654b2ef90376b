"""This port's proof."""
