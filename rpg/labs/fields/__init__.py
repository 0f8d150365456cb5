"""Neural fields: one small network for every image, whose weights are the datum."""
