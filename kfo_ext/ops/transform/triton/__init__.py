"""The transform's Triton kernels: their plan, their launches, and the kernels."""
