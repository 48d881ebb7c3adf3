"""What noising and a denoising step are, as coefficients of rows: the linear forms that every kernel takes."""
