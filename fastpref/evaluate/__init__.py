"""Sampling, the measures of style and content, and the report. Reads what training wrote; never imported by it."""
