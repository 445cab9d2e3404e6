"""Lightning callbacks: checkpoints, random state, progress bar, throughput, gate monitor, validation figures."""
