import os

# a picture needs no screen; what a notebook's shell asks for ends the import of matplotlib where it is not installed
os.environ["MPLBACKEND"] = "agg"
