"""Lab: lottery tickets."""
