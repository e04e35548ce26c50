"""A small byte-level language model served with continuous batching from a paged (FP8) KV cache."""
