"""Small networks for sensors that nobody calibrated."""
