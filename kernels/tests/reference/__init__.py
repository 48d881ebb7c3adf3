"""What each op means: naive float64 torch, the only oracle."""
