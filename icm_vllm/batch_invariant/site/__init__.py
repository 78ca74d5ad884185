"""The folder to put on PYTHONPATH for engines that load no plugins; see sitecustomize.py in it."""
