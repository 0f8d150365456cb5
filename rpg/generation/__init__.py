"""Generation: from a request to files."""
