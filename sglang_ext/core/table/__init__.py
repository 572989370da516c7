"""The page table: columns, paths, windows of a path."""
