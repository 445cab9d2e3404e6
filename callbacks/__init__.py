"""Lightning callbacks: checkpoints, random state, progress bar, throughput, gates, validation figures."""
