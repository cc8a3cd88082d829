"""What Label Studio looks like."""
