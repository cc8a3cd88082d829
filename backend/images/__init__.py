"""An address to an RGB image."""
