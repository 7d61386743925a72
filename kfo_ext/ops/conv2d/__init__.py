"""The convolution of each task's images with that task's weights, and its derivatives."""
