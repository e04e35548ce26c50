"""The type of what a pytree class of this library holds."""

from typing import Any

# An array; under a transformation, what stands for one: a tracer, a ShapeDtypeStruct, a PartitionSpec. Hence no
# narrower type: the shapes are in the docstrings, and every op checks them.
Leaf = Any
