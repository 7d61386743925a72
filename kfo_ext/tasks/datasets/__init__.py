"""Task families of real images, read from the files that they are distributed in."""
