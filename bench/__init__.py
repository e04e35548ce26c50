"""Benchmarks and demonstrations of pallas_attn; never imported by the library."""
