"""The comparison of this port with transformers."""
