"""The Net2Net experiments: a teacher, the arms that grow from it, and their curves."""

import io
import sys

for stream in (sys.stdout, sys.stderr):
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows ?, and ends no run
