"""Losses beside the denoiser's own."""
