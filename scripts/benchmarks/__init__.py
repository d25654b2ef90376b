"""What the benchmarks measure, side by side."""
