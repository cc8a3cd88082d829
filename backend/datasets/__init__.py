"""A plain folder to a data set."""
