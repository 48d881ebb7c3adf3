"""fastpref: preference alignment of diffusion models (SFT, Diffusion-DPO, Diffusion-RPO)."""

__version__ = "0.1.0"
