"""`python -m pallas_attn`: what runs on this machine, and why the rest does not."""

import importlib.util

import jax

import pallas_attn as pa
from pallas_attn.core.arch import arch_of


def main() -> None:
    """Print versions, devices and the support table."""
    print(f"pallas_attn {pa.__version__}, jax {jax.__version__}")
    for device in jax.devices():
        arch = arch_of(device.compute_capability) if device.platform == "gpu" else None
        print(f"device {device.id}: {device.device_kind}{f' ({arch.name}, {arch.sm})' if arch else ''}")
    for package in ("jax_triton", "triton"):
        found = importlib.util.find_spec(package) is not None
        print(f"{package}: {'installed' if found else 'not installed'}")
    print(f"\n{pa.support_table()}")


if __name__ == "__main__":
    main()
