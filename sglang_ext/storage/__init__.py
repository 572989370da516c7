"""The storage tier: threads, files and the port behind which every backend stands."""
