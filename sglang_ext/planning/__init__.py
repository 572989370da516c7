"""What a model's KV takes and what fits, before and at the start of a server."""
