"""Room on the device: who goes next, and what is copied before."""
