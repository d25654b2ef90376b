"""The harness that compares the port with the reference. `transformers` is imported in `references` alone."""
