"""A fuzzer for checkpoint loading."""
