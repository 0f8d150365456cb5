"""Lab: neural fields, one small network per image or shape, whose weights represent it."""
