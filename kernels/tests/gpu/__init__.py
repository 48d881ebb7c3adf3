"""The ops on a real GPU: against eager torch in float64, and timed."""
