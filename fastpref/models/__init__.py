"""Loading diffusers models and treating them as policy and reference."""
