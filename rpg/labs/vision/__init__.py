"""Dense targets: networks that say where things are in an image."""
