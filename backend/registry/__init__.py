"""Which model serves a project."""
