"""API keys: how one looks, what is kept of it, where that is kept, and how workers come to know it."""
