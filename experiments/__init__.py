"""The Net2Net experiment: a teacher, the arms that grow from it, and their curves."""
