"""Floor 0: the words of the domain. Imports jax and numpy only."""
