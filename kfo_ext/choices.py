"""What options may be set to, without torch: the command line says and checks it before it imports anything."""

INITS = ("reference", "zero_head", "torch")
PRECISIONS = ("ieee", "tf32", "bf16")

# Of every count and seed: torch takes no more.
LARGEST_INTEGER = 2**63 - 1
# Threads beyond end libgomp, and with it the process, without a word.
MOST_THREADS = 1024
# More of them are built until the system ends the process.
MOST_LAYERS = 1000
