import os

# draw without a screen, even if the shell of a notebook names another backend, which may not be installed
os.environ["MPLBACKEND"] = "agg"
