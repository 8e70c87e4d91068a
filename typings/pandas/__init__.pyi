# pandas is Any to the type checker: its own annotations are incomplete, a column is a union of five types.
from typing import Any

def __getattr__(name: str) -> Any: ...
