"""State that outlives a call: in memory that the workers of a host share."""
