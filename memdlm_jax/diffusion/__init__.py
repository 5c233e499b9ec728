"""What any masked diffusion language model needs; knows no memory and no backbone."""
