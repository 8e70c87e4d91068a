"""Decide which teacher unit each student unit copies, before a single weight is written."""
