"""Which mode each block of a chain runs in under a byte budget: the door, and the core in Python."""
