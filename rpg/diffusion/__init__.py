"""The mathematics of diffusion: objectives and samplers."""
