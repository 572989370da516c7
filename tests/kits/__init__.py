"""SGLang's own kits for servers, against a server with our cache.

They are imported from the installed wheel.
"""
