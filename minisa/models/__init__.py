"""Model names to files: what can be fetched, and fetching it."""
