"""Lightning callbacks. comet_pl/build.py chooses them."""
