"""Make larger copies of a network: describe, widen, deepen."""
