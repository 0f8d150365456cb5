"""Networks: recurrent diffusion and p-diff. No files, no trainer."""
