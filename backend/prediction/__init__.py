"""What a predict worker runs."""
