"""`python -m pallas_attn`: what runs on this machine, and why the rest does not."""

import importlib.util

import jax

import pallas_attn as pa


def main() -> None:
    """Print the devices, the versions and the support table."""
    print(f"pallas_attn {pa.__version__}, jax {jax.__version__}, on {', '.join(str(d) for d in jax.devices())}")
    for package in ("jax_triton", "triton"):
        found = importlib.util.find_spec(package) is not None
        print(f"{package}: {'installed' if found else 'not installed'}")
    print()
    print(pa.support_table())


if __name__ == "__main__":
    main()
