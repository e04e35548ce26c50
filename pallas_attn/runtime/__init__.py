"""Floor 1: the machinery that every op shares."""
