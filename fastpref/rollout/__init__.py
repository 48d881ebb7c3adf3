"""Step pools: sampling them, scoring them, and what of them is trained on."""
