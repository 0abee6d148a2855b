"""The relay between Flower SuperNodes and a SuperLink."""

__version__ = "0.1.0"
