# The checker takes every name of pandas for Any: its own annotations are incomplete, so that a column is a union of five.
from typing import Any

def __getattr__(name: str) -> Any: ...
