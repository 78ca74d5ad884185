"""Put this folder on PYTHONPATH for engines that load no plugins; see sitecustomize.py."""
