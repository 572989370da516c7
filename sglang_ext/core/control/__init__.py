"""What people ask of the cache, beside requests: prefixes that stay, prefixes that go."""
