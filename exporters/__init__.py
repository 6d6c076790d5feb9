"""Rewritten models in the formats that runtimes load."""
