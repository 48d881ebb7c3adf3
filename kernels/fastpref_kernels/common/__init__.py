"""What several ops share: keys, layouts, checks, dispatch, the two forms of an op, parts of kernels."""
