"""Floor 2: one folder per op; ops do not import each other."""
