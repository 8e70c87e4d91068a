"""Learn, in one forward pass, which axis of which tensor carries which units."""
