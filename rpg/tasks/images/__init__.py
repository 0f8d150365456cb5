"""Tasks that classify images."""
