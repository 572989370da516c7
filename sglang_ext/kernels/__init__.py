"""Kernels of this project. Their sources are in the folder ``kernels`` of a checkout."""
