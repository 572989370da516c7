"""``sglang-ext doctor``: what is wrong with an installation, a machine or a launch line."""
