"""Learning from annotations."""
