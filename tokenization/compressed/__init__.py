"""Pruned and quantised weights: values and masks, codes and scales, in place of tensors of floats."""
