"""Fault drills: real Flower federations are disturbed in mid-run, and it is looked at what becomes of them.

Run it with scripts/drills. It exists for the developers of the relay and is not installed with it.
"""
