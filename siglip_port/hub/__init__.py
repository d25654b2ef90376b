"""Checkpoints on the Hub: the cache, and downloads that go on."""
