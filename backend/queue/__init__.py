"""Redis and RQ."""
