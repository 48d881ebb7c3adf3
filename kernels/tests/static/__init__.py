"""Ahead-of-time compilation of every kernel for GPUs that are not there, and the gates on what comes out."""
