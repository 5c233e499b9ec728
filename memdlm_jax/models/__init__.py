"""Backbones behind the denoiser protocol; a backbone knows no training."""
