"""Lab: detection, segmentation and a diffusion U-Net as target networks."""
