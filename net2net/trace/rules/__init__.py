"""What each torch function does to units: one short rule a family."""

from .elementwise import EXPANSIONS, apply

__all__ = ["EXPANSIONS", "apply"]
