"""Image, compose file and chart of a server, and what checks them."""
