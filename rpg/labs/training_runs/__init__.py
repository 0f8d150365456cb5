"""Lab: networks with a target loss, learned from whole training runs."""
