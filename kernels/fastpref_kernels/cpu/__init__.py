"""The ops in chunked torch: what CPU runs and float64 take. Device-agnostic, O(chunk) temporary memory."""
