"""Lab: neural fields, one small network per image, whose weights are the datum."""
