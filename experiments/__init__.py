"""The Net2Net experiments: a teacher, the arms that grow from it, and their curves."""
